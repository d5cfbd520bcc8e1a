"""Which kernel multiplies with which leaf, and why."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcompress._src.execution.execute import evaluation_with, run_compressed
from jaxcompress._src.execution.kernels.choice import PlannedMatmul
from jaxcompress._src.execution.kernels.kernel import PLAIN
from jaxcompress._src.execution.values import Fallback
from jaxcompress._src.trace.traced import split_arrays

_PLATFORMS = {"gpu": "cuda"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model on compressed leaves is computed; `print` shows it as a table.

    Attributes:
        platform: the XLA platform that it is for.
        matmuls: the products with compressed leaves, in execution order; the body of a scan counts once.
        fallbacks: other uses of compressed leaves, for which the plain array is made.
    """

    platform: str
    matmuls: tuple[PlannedMatmul, ...]
    fallbacks: tuple[Fallback, ...]

    def __str__(self) -> str:
        """One line for each product and fall-back."""
        header = ("leaf", "kind", "rows x inputs x outputs", "kernel", "because")
        rows = [header, *(_row(each) for each in self.matmuls)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{each.path}: `{each.primitive}` makes the plain array" for each in self.fallbacks]
        return "\n".join([f"On {self.platform}:", *lines])


def plan(
    apply: Callable[..., Any],
    *args: Any,
    kernels: Sequence[str] | None = None,
    platform: str | None = None,
    **kwargs: Any,
) -> Plan:
    """Which kernel `execute(apply, kernels=kernels)(*args, **kwargs)` takes for each product; nothing is computed.

    Args:
        apply: as for `execute`.
        *args: as for `apply`, the parameters first; arrays may be abstract.
        kernels: as for `execute`.
        platform: "cpu", "gpu" or "tpu"; by default that of `jax.default_backend()`. The processor is always this one.
        **kwargs: keywords of `apply`; arrays may be abstract.

    Returns:
        The plan.

    Raises:
        ValueError: an unknown platform; kernels that `execute` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxcompress.arrays import QuantizedArray
        >>> codes, scale = jnp.ones((64, 32), "int8"), jnp.ones((1, 32))
        >>> params = {"w": QuantizedArray(data=codes, scale=scale, dtype=jnp.dtype("float32"))}
        >>> print(plan(lambda p, x: x @ p["w"], params, jnp.ones((4, 64)), kernels=(), platform="cpu"))
        On cpu:
        leaf  kind              rows x inputs x outputs  kernel  because
        w     int8 per-channel  4 x 64 x 32              plain   no other kernel was asked for
    """
    backend = jax.default_backend() if platform is None else platform
    if backend not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"`platform` must be 'cpu', 'gpu' or 'tpu', got {platform!r}.")
    arrays, static = split_arrays((args, kwargs), is_leaf=lambda _: False)
    noted: list[Fallback] = []
    matmuls: list[PlannedMatmul] = []

    def planned(where: str, matmul: PlannedMatmul) -> None:
        if where == _PLATFORMS.get(backend, backend):
            matmuls.append(matmul)

    def run(arrays: list[Any]) -> Any:
        full_args, full_kwargs = static.filled(arrays)
        evaluation = evaluation_with(kernels, note=noted.append, planned=planned)
        return run_compressed(apply, lambda: evaluation, *full_args, **full_kwargs)

    jax.eval_shape(run, arrays)
    # JAX may trace the body of a loop more than once.
    unique = {(each.path, each.kind, str(each)): each for each in matmuls}
    return Plan(platform=backend, matmuls=tuple(unique.values()), fallbacks=tuple(dict.fromkeys(noted)))


def _row(matmul: PlannedMatmul) -> tuple[str, ...]:
    size = f"{matmul.rows} x {matmul.inputs} x {matmul.outputs}"
    return matmul.path, matmul.kind, size, matmul.kernel, _because(matmul)


def _because(matmul: PlannedMatmul) -> str:
    if matmul.kernel != PLAIN:
        return f"differs by {matmul.error}" if matmul.error != "none" else "exact"
    by_reason: dict[str, list[str]] = {}
    for name, reason in matmul.refused.items():
        by_reason.setdefault(reason, []).append(name)
    reasons = [f"{reason} ({', '.join(names)})" for reason, names in by_reason.items()]
    return "; ".join(reasons) or "no other kernel was asked for"
