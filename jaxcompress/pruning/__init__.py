"""Pruning: scores, masks, and pruning while training."""

from jaxcompress.pruning._gradual import GradualState as GradualState
from jaxcompress.pruning._gradual import gradual as gradual
from jaxcompress.pruning._leaf_info import LeafInfo as LeafInfo
from jaxcompress.pruning._masks import Scope as Scope
from jaxcompress.pruning._masks import apply_masks as apply_masks
from jaxcompress.pruning._masks import clip_weights as clip_weights
from jaxcompress.pruning._masks import masks_from_scores as masks_from_scores
from jaxcompress.pruning._masks import threshold_masks as threshold_masks
from jaxcompress.pruning._patterns import Block as Block
from jaxcompress.pruning._patterns import NOfM as NOfM
from jaxcompress.pruning._patterns import Pattern as Pattern
from jaxcompress.pruning._patterns import Unstructured as Unstructured
from jaxcompress.pruning._patterns import block as block
from jaxcompress.pruning._patterns import n_of_m as n_of_m
from jaxcompress.pruning._patterns import unstructured as unstructured
from jaxcompress.pruning._scores import gradient_scores as gradient_scores
from jaxcompress.pruning._scores import magnitude_scores as magnitude_scores
from jaxcompress.pruning._sparsegpt import sparsegpt as sparsegpt
from jaxcompress.pruning._store import store_masked as store_masked
from jaxcompress.pruning._tune import alps as alps
from jaxcompress.pruning._tune import tune_masked as tune_masked
from jaxcompress.pruning._wanda import wanda as wanda
from jaxcompress.pruning._wanda import wanda_scores as wanda_scores
