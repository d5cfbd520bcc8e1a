"""Weights that share a few values."""

from jaxcompress._src.clustering.additive import additive_quantize as additive_quantize
from jaxcompress._src.clustering.additive_spec import AdditiveSpec as AdditiveSpec
from jaxcompress._src.clustering.cluster import cluster as cluster
from jaxcompress._src.clustering.importance import input_importance as input_importance
from jaxcompress._src.clustering.spec import CodebookSpec as CodebookSpec
from jaxcompress._src.clustering.transform import trained_codebooks as trained_codebooks
