"""Weights that share a few values, and the shortest bytes for what is stored."""

from jaxcompress.clustering._additive import AdditiveInfo as AdditiveInfo
from jaxcompress.clustering._additive import additive_quantize as additive_quantize
from jaxcompress.clustering._additive_spec import AdditiveSpec as AdditiveSpec
from jaxcompress.clustering._bytes import Reader as Reader
from jaxcompress.clustering._bytes import Writer as Writer
from jaxcompress.clustering._cluster import ClusterInfo as ClusterInfo
from jaxcompress.clustering._cluster import cluster as cluster
from jaxcompress.clustering._entropy import Coder as Coder
from jaxcompress.clustering._entropy import decode_codes as decode_codes
from jaxcompress.clustering._entropy import encode_codes as encode_codes
from jaxcompress.clustering._importance import input_importance as input_importance
from jaxcompress.clustering._spec import CodebookSpec as CodebookSpec
from jaxcompress.clustering._transform import CodebookState as CodebookState
from jaxcompress.clustering._transform import trained_codebooks as trained_codebooks
