"""Sums over the rows that go through a kernel, of a dense and of a pruned model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcompress.structured._least_squares import Moments
from jaxcompress.structured._record import Site, record
from jaxcompress.tree import leaves_with_paths
from jaxcompress.types import Params


def gather(
    apply: Callable[..., Any],
    dense: Params,
    paths: Sequence[str],
    batches: Sequence[tuple[Any, ...]],
    row_mask: Callable[..., Any] | None,
) -> Callable[[Params, str], Moments]:
    """`(pruned, path) -> Moments` of what the pruned model feeds into a kernel, and of what it should write there.

    The target of a row is what the dense model writes and adds it to, less what the pruned model adds it to.

    The dense model runs once; what it writes is held: rows x outputs float32 numbers for each kernel. The pruned model
    runs whole at every call: one compilation for all kernels of a shape takes less time than one for each would, by
    far, unless there are very many batches.

    Args:
        apply: `(params, *inputs) -> outputs`.
        dense: its parameters.
        paths: of kernels, as for `record`.
        batches: tuples of inputs.
        row_mask: `(*inputs) -> mask` of rows that count; None: all do.

    Raises:
        ValueError: from the function: no row counts, or something that goes into the kernel is NaN or Inf; the mask has
            another length than there are rows. Names the kernel.
    """
    run = record(apply, paths)

    @jax.jit
    def wanted(dense: Params, batch: tuple[Any, ...]) -> dict[str, jax.Array]:
        return {
            path: _written(site, dense, path) + _residual(site, dense, path)
            for path, site in run(dense, *batch).items()
        }

    targets = [wanted(dense, tuple(batch)) for batch in batches]
    shapes = {path: _matrix(dense, path).shape for path in paths}

    @functools.partial(jax.jit, static_argnums=0)
    def sums(
        alike: tuple[str, ...], params: Params, index: jax.Array, target: jax.Array, batch: tuple[Any, ...]
    ) -> dict[str, jax.Array]:
        sites = run(params, *batch)
        rows = None if row_mask is None else jnp.asarray(row_mask(*batch)).reshape(-1) > 0
        if rows is not None and len(rows) != len(target):
            raise ValueError(f"`row_mask` gives {len(rows)} entries; the input of {alike[0]!r} has {len(target)} rows.")
        branches = [
            functools.partial(lambda site, path: (site.inputs, _residual(site, params, path)), sites[path], path)
            for path in alike
        ]
        inputs, residual = jax.lax.switch(index, branches)
        return _sums(inputs.astype(jnp.float32), target - residual, rows)

    def moments(pruned: Params, path: str) -> Moments:
        alike = tuple(other for other in paths if shapes[other] == shapes[path])
        total: dict[str, Any] = {}
        for batch, target in zip(batches, targets, strict=True):
            found = sums(alike, pruned, jnp.asarray(alike.index(path)), target[path], tuple(batch))
            total = {name: total.get(name, 0.0) + np.asarray(value, np.float64) for name, value in found.items()}
        if not all(np.isfinite(value).all() for value in total.values()):
            raise ValueError(f"What goes into {path!r}, or what is added to its output, holds NaN or Inf.")
        if not total["count"]:
            raise ValueError(f"`row_mask` leaves no row of the input of {path!r}.")
        return Moments(**total | {name: float(total[name]) for name in ("count", "square")})

    return moments


def _sums(
    inputs: Float[Array, "N D"], target: Float[Array, "N O"], rows: Bool[Array, " N"] | None
) -> dict[str, jax.Array]:
    count = jnp.asarray(len(inputs), jnp.float32)
    if rows is not None:
        # Not a product: what does not count may be NaN.
        inputs, target = jnp.where(rows[:, None], inputs, 0.0), jnp.where(rows[:, None], target, 0.0)
        count = rows.sum(dtype=jnp.float32)
    return {
        "count": count,
        "inputs": inputs.sum(axis=0),
        "targets": target.sum(axis=0),
        "gram": inputs.T @ inputs,
        "cross": inputs.T @ target,
        "square": jnp.square(target).sum(),
    }


def _written(site: Site, params: Params, path: str) -> jax.Array:
    leaves = dict(leaves_with_paths(params))
    kernel = leaves[path] if site.input_axis == 0 else leaves[path].T
    product = site.inputs.astype(jnp.float32) @ kernel.astype(jnp.float32)
    return product if site.bias is None else product + leaves[site.bias].astype(jnp.float32)[None, :]


def _residual(site: Site, params: Params, path: str) -> jax.Array:
    if site.residual is not None:
        return site.residual.astype(jnp.float32)
    return jnp.zeros((len(site.inputs), _matrix(params, path).shape[1 - site.input_axis]), jnp.float32)


def _matrix(params: Params, path: str) -> Any:
    return dict(leaves_with_paths(params))[path]
