"""Bias correction: what rounding shifts on average, taken back by the biases."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.calibration.layer_by_layer import layer_by_layer
from jaxcompress._src.calibration.moments import flat_weights, moments, targets
from jaxcompress._src.quantization.leaf_matrix import plain_kernels
from jaxcompress._src.tree.maps import leaves_by_path, leaves_with_paths, map_with_path, with_leaves
from jaxcompress._src.types import Params, is_compressed, plain


def correct_biases(
    apply: Callable[..., Any],
    params: Params,
    compressed: Params,
    batches: Iterable[tuple[Any, ...]],
    *,
    row_mask: Callable[..., Any] | None = None,
) -> tuple[Params, dict[str, float]]:
    """Sets each bias so that, on average, its kernel writes what it does in the dense model.

    Kernel after kernel, in the order of the model, with the biases before it corrected: b' = mean(t) - mean(x) W', with
    t = y W + b + s - r as in `reconstruct`. One pass; only biases change.

    Args:
        apply: `(params, *inputs) -> outputs`. Compressed kernels of plain matmuls get new biases, stack entry by stack
            entry; tables that are looked up, tied ones, experts and convolutions are passed over, and so are biases
            that something else reads, too.
        params: the dense tree.
        compressed: the same tree with compressed kernels.
        batches: tuples of inputs; all wait at the same kernel.
        row_mask: `(*inputs) -> weights`, one for each row of the kernels' inputs; by default all count alike.

    Returns:
        `(params, shifts)`: `compressed` with other biases, as plain arrays, and the root mean square of what was added
        to each, by the path of its kernel (`path[i]` of a stack); where several matmuls share a kernel and have
        biases of their own, by both paths.

    Raises:
        ValueError: no batches; no compressed kernel; a kernel in no plain matmul.

    Example:
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params = {"w": jnp.array([[0.6], [0.6], [7.0]]), "b": jnp.zeros(1)}
        >>> x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
        >>> small, _ = quantize(params, QuantSpec(bits=4, convention="narrow"))
        >>> corrected, _ = correct_biases(lambda p, x: x @ p["w"] + p["b"][None], params, small, [(x,)])
        >>> round(float(corrected["b"][0]), 3)  # 1.2 became 2, and x is 1.5 on average
        -1.2

    References:
        Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2.
    """
    all_batches = list(batches)
    if not all_batches:
        raise ValueError("`batches` is empty: biases need inputs.")
    small = {path for path, leaf in leaves_with_paths(compressed) if is_compressed(leaf)}
    parts = [part for part in plain_kernels(apply, params, all_batches[0])[0] if part.path in small]
    if not parts:
        raise ValueError("No kernel of a plain matmul is compressed: there is nothing to correct.")
    paths = sorted({part.path for part in parts})
    rounded = map_with_path(lambda _, leaf: plain(leaf), compressed)
    rows = flat_weights(row_mask, all_batches)
    current, changed, shifts = leaves_by_path(rounded), {}, {}
    for stop in layer_by_layer(apply, paths, (params, rounded), all_batches, repeated="each"):
        if stop.bias is None:
            continue
        (kernel, bias), (weights, before) = stop.weights(0), stop.weights(-1)
        sums = moments(stop.kernel.name, stop.pairs(), kernel, bias, rows)
        wanted, place = targets(sums, kernel, bias), stop.bias.path
        after = (wanted.targets - wanted.inputs @ np.asarray(weights, np.float64)) / wanted.count
        shared = sum(part == stop.kernel for part in parts) > 1
        name = f"{stop.kernel.name}, {place}" if shared else stop.kernel.name
        shifts[name] = float(np.sqrt(np.mean((after - np.asarray(before, np.float64)) ** 2)))
        changed[place] = stop.bias.put(changed.get(place, current[place]), after)
        stop.replace(bias=after)
    return with_leaves(compressed, {path: jnp.asarray(leaf) for path, leaf in changed.items()}), shifts
