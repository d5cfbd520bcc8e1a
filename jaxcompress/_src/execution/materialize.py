"""Plain arrays from compressed ones."""

import jax

from jaxcompress._src.meshes import on_auto_axes
from jaxcompress._src.types import Params, is_compressed, plain


@on_auto_axes
def materialize(params: Params) -> Params:
    """`params` with every compressed leaf replaced by the plain array that it stands for.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.arrays import QuantizedArray
        >>> leaf = QuantizedArray(data=jnp.array([2], "int8"), scale=jnp.array([0.5]), dtype=jnp.dtype("float32"))
        >>> materialize({"w": leaf, "b": 1})
        {'b': 1, 'w': Array([1.], dtype=float32)}
    """
    return jax.tree.map(plain, params, is_leaf=is_compressed)
