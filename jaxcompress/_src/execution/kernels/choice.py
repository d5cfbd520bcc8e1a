"""Which implementation multiplies with a compressed leaf."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import core

from jaxcompress._src.arrays.protocol import Multiply, call, describe_leaf, leaf_of_product
from jaxcompress._src.execution.kernels import cpu, native_cpu, native_expansion, pallas
from jaxcompress._src.execution.kernels.kernel import PLAIN, Kernel
from jaxcompress._src.execution.kernels.matmul import Matmul
from jaxcompress._src.execution.kernels.native import library
from jaxcompress._src.execution.kernels.ordering import widened_after
from jaxcompress._src.execution.kernels.processor import instruction_sets
from jaxcompress._src.types import is_compressed, plain

KERNELS: tuple[Kernel, ...] = (
    native_cpu.INT8,
    native_cpu.INT8_GROUPS,
    native_cpu.FLOAT,
    native_expansion.SPARSE,
    native_expansion.EXPANSION,
    cpu.INT8_PADDED,
    cpu.ROUNDED_FLOATS,
    cpu.REQUANTIZED_INT8,
    *pallas.KERNELS,
)
"""In the order in which they are tried."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedMatmul:
    """How one product with a compressed leaf is computed.

    Attributes:
        path: of the leaf.
        kind: of the leaf, or of the part of it that is multiplied.
        rows: of the plain operand, such as tokens.
        inputs: entries that each sum runs over.
        outputs: sums of each row.
        kernel: its name; "plain" is what the array does by itself.
        error: by how much its result differs from the plain one.
        refused: why kernels that come before it were not taken, by name.
    """

    path: str
    kind: str
    rows: int
    inputs: int
    outputs: int
    kernel: str
    error: str
    refused: Mapping[str, str]


Planned = Callable[[str, PlannedMatmul], None]
"""Told about every product, with the platform."""

Multiplier = Callable[[Any, Any, Mapping[str, Any], str], Any]
"""`(left, right, parameters of lax.dot_general, path) -> product`, or None where only the plain array has one."""


def checked_kernels(names: Sequence[str] | None) -> tuple[Kernel, ...]:
    """The kernels to try, in order: those of the names, or all that are chosen without being asked for.

    Raises:
        ValueError: an unknown name; a kernel that this machine lacks (says what is missing).
    """
    if names is None:
        return tuple(kernel for kernel in KERNELS if kernel.default)
    if isinstance(names, str):
        raise ValueError(f"`kernels` is a sequence of names, got the text {names!r}; write ({names!r},).")
    by_name = {kernel.name: kernel for kernel in KERNELS}
    asked = [name for name in names if name != PLAIN]
    for name in asked:
        if name not in by_name:
            raise ValueError(f"There is no kernel {name!r}; there are {', '.join([*by_name, PLAIN])}.")
        if (missing := by_name[name].missing()) is not None:
            raise ValueError(f"Kernel {name!r} cannot run here: {missing}.")
    return tuple(by_name[name] for name in asked)


def multiplier(names: Sequence[str] | None, planned: Planned) -> Multiplier:
    """A product that chooses among kernels, for each platform that the program may be lowered for.

    Outside of a trace it is compiled, with its choice, once for each kind, shape and dtype: to choose takes longer than
    most products do.

    Args:
        names: as for `checked_kernels`; where there are none, programs hold nothing but what computes their values.
        planned: told about each choice.
    """
    checked_kernels(names)
    chosen_anew = _choosing(names, planned)

    def multiply(left: Any, right: Any, parameters: Mapping[str, Any], path: str) -> Any:
        key = _key(names, left, right, parameters)
        if key is None:
            return chosen_anew(left, right, parameters, path)
        return _compiled_once(*key)(left, right)

    return multiply


def _key(names: Sequence[str] | None, left: Any, right: Any, parameters: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a choice depends on besides the operands; None within a trace, and where a leaf cannot be looked up."""
    leaves, structure = jax.tree.flatten((left, right))
    if any(not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, core.Tracer) for leaf in leaves):
        return None
    key = (
        None if names is None else tuple(names),
        tuple(sorted(parameters.items())),
        (library.instruction_set(), instruction_sets()),
    )
    try:
        hash((structure, key))
    except TypeError:  # of a static field, such as a quantizer of the user's
        return None
    return key


@functools.lru_cache(maxsize=1024)
def _compiled_once(names: tuple[str, ...] | None, parameters: tuple[Any, ...], processor: Any) -> Callable[..., Any]:
    """The product of two operands as one program; it is not for tracers."""
    del processor
    choose = _choosing(names, lambda *_: None)
    return jax.jit(lambda left, right: choose(left, right, dict(parameters), ""))


def _choosing(names: Sequence[str] | None, planned: Planned) -> Callable[..., Any]:
    kernels = checked_kernels(names)
    ordered = names is None or len(names) > 0

    def multiply(
        left: Any, right: Any, parameters: Mapping[str, Any], path: str, elsewhere: frozenset[str] = frozenset()
    ) -> Any:
        # `elsewhere` are platforms that do not come here, because kernels multiply the whole of which this is a part.
        if not (is_compressed(left) or is_compressed(right)):
            return jax.lax.dot_general_p.bind(left, right, **parameters)
        leaf, other, side = leaf_of_product(left, right)
        matmul = Matmul(leaf=leaf, other=plain(other), side=side, parameters=parameters)

        def by_itself(leaf: Any, other: jax.Array) -> Any:
            by_part = functools.partial(multiply, elsewhere=elsewhere | chosen.keys())
            within = _within(leaf, functools.partial(_required, by_part, path))
            # What multiplies with its parts comes here again with each of them.
            leaf = widened_after(leaf, other) if ordered and not within else leaf
            return call(leaf, "dot", other, side, parameters, **within)

        chosen: dict[str, Kernel] = {}
        for platform in dict.fromkeys(kernel.platform for kernel in KERNELS if kernel.platform not in elsewhere):
            # A symbolic number of rows may be any.
            fit = _first_fit if isinstance(matmul.rows, int) else _none_fits
            kernel, refused = fit(matmul, [each for each in kernels if each.platform == platform])
            planned(platform, _described(matmul, path, kernel, refused))
            if kernel is not None:
                chosen[platform] = kernel
        if not chosen:
            return by_itself(leaf, matmul.other)

        def by_kernel(kernel: Kernel, leaf: Any, other: jax.Array) -> jax.Array:
            multiply_part = functools.partial(_required, multiply, path)
            return kernel.multiply(dataclasses.replace(matmul, leaf=leaf, other=other), multiply_part)

        branches = {platform: functools.partial(by_kernel, kernel) for platform, kernel in chosen.items()}
        return jax.lax.platform_dependent(leaf, matmul.other, **branches, default=by_itself)

    return multiply


def _required(multiply: Multiplier, path: str, left: Any, right: Any, parameters: Mapping[str, Any]) -> jax.Array:
    """The product of a part of a leaf; of plain arrays where the part has none."""
    result = multiply(left, right, parameters, path)
    return jax.lax.dot_general_p.bind(plain(left), plain(right), **parameters) if result is None else result


def _within(leaf: Any, multiply: Multiply) -> dict[str, Any]:
    return {"multiply": multiply} if getattr(type(leaf), "multiplies_parts", False) else {}


def _first_fit(matmul: Matmul, kernels: Sequence[Kernel]) -> tuple[Kernel | None, dict[str, str]]:
    refused: dict[str, str] = {}
    for kernel in kernels:
        reason = kernel.missing() or kernel.why_not(matmul)
        if reason is None:
            return kernel, refused
        refused[kernel.name] = reason
    return None, refused


def _none_fits(matmul: Matmul, kernels: Sequence[Kernel]) -> tuple[None, dict[str, str]]:
    return None, {kernel.name: f"the number of rows is symbolic: {matmul.rows}" for kernel in kernels}


def _described(matmul: Matmul, path: str, kernel: Kernel | None, refused: Mapping[str, str]) -> PlannedMatmul:
    return PlannedMatmul(
        path=path,
        kind=describe_leaf(matmul.leaf),
        rows=matmul.rows,
        inputs=matmul.inputs,
        outputs=matmul.outputs,
        kernel=PLAIN if kernel is None else kernel.name,
        error="none" if kernel is None else kernel.error,
        refused=refused,
    )
