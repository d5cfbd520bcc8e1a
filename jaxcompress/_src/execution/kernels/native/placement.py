"""Batches and devices of compiled products: `product(x, codes, *parameters)` of matrices becomes one of arrays.

Rows of a batch are rows, and every device multiplies what it has.
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


def with_rows_merged(product: Callable[..., Array]) -> Callable[..., Array]:
    """Under `vmap`, batches of x are more rows; where weights have one, too, there is one product after the other.

    Args:
        product: takes x, [M, K], and the matrices that it is multiplied with; returns [M, N].

    Returns:
        The product with this rule.
    """

    @jax.custom_batching.custom_vmap
    def batched(*operands: Array) -> Array:
        return product(*operands)

    @batched.def_vmap
    def rule(size: int, is_batched: Sequence[bool], x: Any, *weights: Any) -> tuple[Array, bool]:
        x_is_batched, *weights_are = is_batched
        if not any(weights_are):
            y = batched(x.reshape(x.shape[0] * x.shape[1], x.shape[2]), *weights)
            return y.reshape(size, -1, y.shape[-1]) if x.size else jnp.zeros((*x.shape[:2], y.shape[-1]), y.dtype), True

        def one(index: Array) -> Array:
            at = functools.partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False)
            parts = zip((x, *weights), (x_is_batched, *weights_are), strict=True)
            return batched(*(at(part) if is_in else part for part, is_in in parts))

        return jax.lax.map(one, jnp.arange(size)), True

    return batched


def partitioned(product: Callable[..., Array], out_major: bool) -> Callable[..., Array]:
    """A product that every device computes of what it has.

    Rows and outputs are cut as they come. Inputs are cut where the codes are, if whole groups are, and then the
    products are added up; otherwise each device gets all of them.

    Args:
        product: takes x, [M, K], codes and their parameters, with the axes of the codes; returns [M, N].
        out_major: whether the axis of the outputs is the first one of codes and parameters.

    Returns:
        The product with this rule.
    """
    k, n = (1, 0) if out_major else (0, 1)

    def partition(mesh: Any, arguments: Sequence[Any], result: Any) -> Any:
        x, codes, *parameters = arguments
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

        shardings = (sharding(rows, inputs), *(of_weights(part) for part in (codes, *parameters)))
        return mesh, local, sharding(rows, outputs), shardings

    def rule(mesh: Any, operands: Sequence[Any], results: Any) -> str:
        del mesh, results
        weights = []
        for i, operand in enumerate(operands[1:]):
            names = ["n", f"k{i}"] if out_major else [f"k{i}", "n"]
            if operand.shape[n] == 1:
                names[n] = f"one{i}"
            weights.append(" ".join(names))
        return f"m k, {', '.join(weights)} -> m n"

    def infer(mesh: Any, arguments: Sequence[Any], result: Any) -> NamedSharding:
        del result
        rows = _entry(arguments[0], 0)
        return NamedSharding(mesh, PartitionSpec(rows, _without(_entry(arguments[1], n), rows)))

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
