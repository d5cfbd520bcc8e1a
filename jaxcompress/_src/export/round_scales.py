"""Scales that float16 holds, before a model is measured and written."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.quantized import QuantizedArray
from jaxcompress._src.export.info import CannotHoldError
from jaxcompress._src.export.integers import float16_scales
from jaxcompress._src.types import Params, is_compressed


def round_scales(params: Params) -> Params:
    """Rounds the scales of quantized leaves to float16, in which GPTQ's and GGUF files hold them.

    The codes stay. So what is measured afterwards is what these files hold, bit by bit: of symmetric leaves, and in
    GPTQ's layout of all. Blocks with an offset (Q4_1) round scale x zero point once more.

    Args:
        params: the tree; leaves that are no `QuantizedArray` of integers stay as they are.

    Returns:
        The tree with scales of float16's values, in their dtype.

    Raises:
        ValueError: float16 does not hold a scale; names the leaf.

    Example:
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params, _ = quantize({"kernel": jnp.linspace(-1.0, 1.0, 256).reshape(64, 4)}, QuantSpec(bits=4))
        >>> float(params["kernel"].scale[0, 0]), float(round_scales(params)["kernel"].scale[0, 0])
        (0.13333334028720856, 0.1333...)
    """

    def rounded(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedArray) or leaf.levels is not None:
            return leaf
        try:
            scale = float16_scales(np.asarray(leaf.scale).astype(np.float32))
        except CannotHoldError as err:
            raise ValueError(f"Leaf {jax.tree_util.keystr(path, simple=True, separator='/')!r}: {err}.") from err
        return dataclasses.replace(leaf, scale=jnp.asarray(scale.astype(np.float32)))

    return jax.tree_util.tree_map_with_path(rounded, params, is_leaf=is_compressed)
