"""Bias correction: what rounding shifts on average, taken back by the biases."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress._src.calibration.moments import flat_weights, moments
from jaxcompress._src.calibration.pause import side_by_side
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
        ValueError: no batches; no compressed kernel; as `calibration.pausing`.

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
    kept = list(batches)
    if not kept:
        raise ValueError("`batches` is empty: biases need inputs.")
    small = {path for path, leaf in leaves_with_paths(compressed) if is_compressed(leaf)}
    parts = [part for part in plain_kernels(apply, params, kept[0])[0] if part.path in small]
    if not parts:
        raise ValueError("No kernel of a plain matmul is compressed: there is nothing to correct.")
    paths = sorted({part.path for part in parts})
    rounded = map_with_path(lambda _, leaf: plain(leaf), compressed)
    rows = flat_weights(row_mask, kept)
    run = side_by_side(apply, paths, (params, rounded), kept, repeated="each")
    dense, current, changed, shifts = leaves_by_path(params), leaves_by_path(rounded), {}, {}
    replies: Any = None
    for _ in parts:
        pairs = run.send(replies)
        site = pairs[0][0]
        kernels = [site.kernel.matrix(tree[site.kernel.path]) for tree in (dense, current)]
        if site.bias is None:
            nothing = jnp.zeros(kernels[0].shape[1], kernels[0].dtype)
            replies = (kernels[0], nothing), (kernels[1], nothing)
            continue
        place, bias = site.bias.path, site.bias.matrix(dense[site.bias.path])[0]
        sums = moments(pairs, kernels[0], bias, rows)
        after = (sums.targets - sums.inputs @ np.asarray(kernels[1], np.float64)) / sums.count
        before = np.asarray(site.bias.matrix(current[place])[0], np.float64)
        name, uses = site.kernel.name, sum(part == site.kernel for part in parts)
        name = name if uses == 1 else f"{name}, {place}"
        shifts[name] = float(np.sqrt(np.mean((after - before) ** 2)))
        changed[place] = site.bias.put(changed.get(place, current[place]), after)
        replies = (kernels[0], bias), (kernels[1], jnp.asarray(site.bias.matrix(changed[place])[0]))
    return with_leaves(compressed, {path: jnp.asarray(leaf) for path, leaf in changed.items()}), shifts
