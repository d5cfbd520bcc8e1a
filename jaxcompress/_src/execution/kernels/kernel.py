"""What an implementation of a product says of itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxcompress._src.arrays.protocol import Multiply
from jaxcompress._src.execution.kernels.matmul import Matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to multiply with a compressed leaf.

    Attributes:
        name: by which `execute(apply, kernels=...)` asks for it.
        platform: the XLA platform that it runs on: "cpu", "tpu" or "cuda".
        multiply: the product, where `why_not` gave None; it is told what multiplies with parts of the leaf.
        why_not: why it cannot take a product, in one clause, or None.
        error: by how much it differs from the plain product.
        default: whether it is chosen without being asked for.
        missing: why it cannot run on this machine at all, in one clause, or None.
    """

    name: str
    platform: str
    multiply: Callable[[Matmul, Multiply], jax.Array]
    why_not: Callable[[Matmul], str | None]
    error: str
    default: bool = True
    missing: Callable[[], str | None] = lambda: None


PLAIN = "plain"
"""The name of what every leaf can do by itself."""


def unless(*reasons: tuple[Any, str]) -> str | None:
    """The text of the first pair whose condition holds; None if none does."""
    return next((text for condition, text in reasons if condition), None)
