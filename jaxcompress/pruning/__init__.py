"""Pruning: scores, masks, and pruning while training."""

from jaxcompress.pruning._counting_rules import CountingRule as CountingRule
from jaxcompress.pruning._gradual import GradualState as GradualState
from jaxcompress.pruning._gradual import gradual as gradual
from jaxcompress.pruning._masks import apply_masks as apply_masks
from jaxcompress.pruning._masks import clip_weights as clip_weights
from jaxcompress.pruning._masks import magnitude_masks as magnitude_masks
from jaxcompress.pruning._masks import masks_from_scores as masks_from_scores
from jaxcompress.pruning._masks import threshold_masks as threshold_masks
from jaxcompress.pruning._patterns import Block as Block
from jaxcompress.pruning._patterns import NOfM as NOfM
from jaxcompress.pruning._patterns import Pattern as Pattern
from jaxcompress.pruning._patterns import Unstructured as Unstructured
from jaxcompress.pruning._patterns import block as block
from jaxcompress.pruning._patterns import n_of_m as n_of_m
from jaxcompress.pruning._patterns import unstructured as unstructured
from jaxcompress.pruning._ranking import Scope as Scope
from jaxcompress.pruning._scores import gradient_scores as gradient_scores
from jaxcompress.pruning._scores import magnitude_scores as magnitude_scores
from jaxcompress.pruning._sparsity import leaf_sparsities as leaf_sparsities
from jaxcompress.pruning._sparsity import sparsity_of as sparsity_of
from jaxcompress.pruning._store import store_masked as store_masked
