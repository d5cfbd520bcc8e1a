"""Trees of parameters: paths, selectors, partial trees, keys."""

from jaxcompress._src.tree.maps import leaves_with_paths as leaves_with_paths
from jaxcompress._src.tree.maps import map_with_path as map_with_path
from jaxcompress._src.tree.partition import combine as combine
from jaxcompress._src.tree.partition import partition_trainable as partition_trainable
from jaxcompress._src.tree.selectors import all_of as all_of
from jaxcompress._src.tree.selectors import any_of as any_of
from jaxcompress._src.tree.selectors import by_ndim as by_ndim
from jaxcompress._src.tree.selectors import by_path as by_path
from jaxcompress._src.tree.selectors import exclude as exclude
from jaxcompress._src.tree.stacks import join_stacks as join_stacks
from jaxcompress._src.tree.stacks import split_stacks as split_stacks
from jaxcompress._src.tree.unselected import Unselected as Unselected
