"""Batches and devices of compiled products: `product(*of_rows, codes, *parameters)` of matrices becomes one of arrays.

Operands of rows are x, [M, K], and whatever else has a row for each of its rows. Rows of a batch are rows, and every
device multiplies what it has.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def with_rows_merged(product: Callable[..., Array], of_rows: int = 1) -> Callable[..., Array]:
    """Under `vmap`, batches of x are more rows; where weights have one, too, there is one product after the other.

    Args:
        product: takes x, [M, K], perhaps more matrices of M rows, and those that x is multiplied with; returns [M, N].
        of_rows: how many operands have M rows.

    Returns:
        The product with this rule.
    """

    @jax.custom_batching.custom_vmap
    def batched(*operands: Array) -> Array:
        return product(*operands)

    @batched.def_vmap
    def rule(size: int, is_batched: Sequence[bool], *operands: Any) -> tuple[Array, bool]:
        if not any(is_batched[of_rows:]):
            rows = [
                part if is_in else jnp.broadcast_to(part, (size, *part.shape))
                for part, is_in in zip(operands[:of_rows], is_batched, strict=False)
            ]
            merged = [part.reshape(size * part.shape[1], part.shape[2]) for part in rows]
            y = batched(*merged, *operands[of_rows:])
            return y.reshape(size, rows[0].shape[1], y.shape[-1]), True

        def one(index: Array) -> Array:
            at = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False)
            parts = zip(operands, is_batched, strict=True)
            return batched(*(at(part) if is_in else part for part, is_in in parts))

        return jax.lax.map(one, jnp.arange(size)), True

    return batched


def partitioned(product: Callable[..., Array], out_major: bool, of_rows: int = 1) -> Callable[..., Array]:
    """A product that every device computes of what it has.

    Rows and outputs are cut as they come. Inputs are cut where the codes are, if whole groups are, and then the
    products are added up; otherwise each device gets all of them.

    Args:
        product: takes x, [M, K], perhaps matrices [M, 1], codes and their parameters, with the axes of the codes;
            returns [M, N], which is linear in what each group of inputs contributes.
        out_major: whether the axis of the outputs is the first one of codes and parameters.
        of_rows: how many operands have M rows.

    Returns:
        The product with this rule.
    """
    k, n = (1, 0) if out_major else (0, 1)

    def partition(mesh: Any, arguments: Sequence[Any], result: Any) -> Any:
        x, (codes, *parameters) = arguments[0], arguments[of_rows:]
        rows = _entry(result, 0)
        outputs = _without(_entry(result, 1), rows)
        inputs = _without(_without(_entry(codes, k), rows), outputs)
        ways = math.prod(mesh.shape[name] for name in _names(inputs))
        # An odd number of inputs fills half of its last byte, so that shares of the bytes are not shares of the inputs.
        sizes = [codes.shape[k], *(part.shape[k] for part in parameters if part.shape[k] > 1)]
        if any(size % ways for size in sizes) or x.shape[1] % codes.shape[k]:
            inputs = None

        def sharding(*entries: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*entries))

        def of_weights(part: Any) -> NamedSharding:
            entries: list[Any] = [None, None]
            entries[k] = inputs if part.shape[k] > 1 else None
            entries[n] = outputs if part.shape[n] > 1 else None
            return sharding(*entries)

        def local(*operands: Array) -> Array:
            y = product(*operands)
            return y if inputs is None else jax.lax.psum(y, _names(inputs))

        of_each_row = [sharding(rows, None)] * (of_rows - 1)
        shardings = (sharding(rows, inputs), *of_each_row, *(of_weights(part) for part in (codes, *parameters)))
        return mesh, local, sharding(rows, outputs), shardings

    def rule(mesh: Any, operands: Sequence[Any], results: Any) -> str:
        del mesh, results
        others = [f"m one_of_row{i}" for i in range(1, of_rows)]
        for i, operand in enumerate(operands[of_rows:]):
            names = ["n", f"k{i}"] if out_major else [f"k{i}", "n"]
            if operand.shape[n] == 1:
                names[n] = f"one{i}"
            others.append(" ".join(names))
        return f"m k, {', '.join(others)} -> m n"

    def infer(mesh: Any, arguments: Sequence[Any], result: Any) -> NamedSharding:
        del result
        rows = _entry(arguments[0], 0)
        return NamedSharding(mesh, PartitionSpec(rows, _without(_entry(arguments[of_rows], n), rows)))

    partitioned = custom_partitioning(product)
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return partitioned


def _entry(aval: Any, axis: int) -> Any:
    spec = tuple(aval.sharding.spec)
    return spec[axis] if axis < len(spec) else None


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _without(entry: Any, taken: Any) -> Any:
    names = tuple(name for name in _names(entry) if name not in _names(taken))
    return names or None
