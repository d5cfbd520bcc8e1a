"""Trees of parameters: paths, selectors, partial trees, keys."""

from jaxcompress.tree._checks import check_finite as check_finite
from jaxcompress.tree._checks import is_traced as is_traced
from jaxcompress.tree._keys import split_key as split_key
from jaxcompress.tree._maps import flatten_like as flatten_like
from jaxcompress.tree._maps import leaf_paths as leaf_paths
from jaxcompress.tree._maps import leaves_with_paths as leaves_with_paths
from jaxcompress.tree._maps import map_with_path as map_with_path
from jaxcompress.tree._partition import combine as combine
from jaxcompress.tree._partition import partition as partition
from jaxcompress.tree._partition import partition_trainable as partition_trainable
from jaxcompress.tree._paths import entry_name as entry_name
from jaxcompress.tree._paths import path_string as path_string
from jaxcompress.tree._selectors import all_of as all_of
from jaxcompress.tree._selectors import any_of as any_of
from jaxcompress.tree._selectors import by_ndim as by_ndim
from jaxcompress.tree._selectors import by_path as by_path
from jaxcompress.tree._selectors import exclude as exclude
from jaxcompress.tree._stacks import join_stacks as join_stacks
from jaxcompress.tree._stacks import split_stacks as split_stacks
from jaxcompress.tree._unselected import Unselected as Unselected
from jaxcompress.tree._unselected import is_unselected as is_unselected
from jaxcompress.tree._unselected import map_selected as map_selected
from jaxcompress.tree._unselected import without_compressed as without_compressed
