"""What a one-shot method did to each leaf, or to each entry of a stack, by name.

Shape letters: E stack entries; S matrices, one for each stack entry and group; D inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Bool, Num

from jaxcompress._src.trace.layout import LeafLayout
from jaxcompress._src.tree.paths import entry_name
from jaxcompress._src.weights.matrices import MatrixLeaf
from jaxcompress._src.weights.unseen import nothing_seen, unseen_counts

_Info = TypeVar("_Info")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What a one-shot method did to one leaf, or to one stack entry; techniques add fields of their own.

    Errors are relative output errors, ||X W - X W'|| / ||X W|| over the calibration rows X. Where a method knows no
    inputs, X is the unit matrix, or what the importance of the weights says; None: not measured, or no row was seen.

    Infos are static pytree nodes, so that a traced function may return them.

    Attributes:
        error_before: what the method started from; see each method.
        error: of what it made of the weights.
        damping: share of the mean diagonal that was added to XᵀX; None where nothing is inverted.
        retries: how often the damping had to grow; above 0 the matrix was singular beyond the damping asked for.
        unseen_inputs: number of inputs that are 0 in every row; see the argument `unseen` of the methods.
        unseen_entries: 1 if all inputs are such (an expert that no row reached), otherwise 0.
        note: why the leaf was left as it is; empty otherwise.
    """

    error_before: float | None = None
    error: float | None = None
    damping: float | None = None
    retries: int = 0
    unseen_inputs: int = 0
    unseen_entries: int = 0
    note: str = ""

    def __init_subclass__(cls, **options: Any) -> None:
        """Registers each kind of info with JAX, which does not look at base classes."""
        super().__init_subclass__(**options)
        jax.tree_util.register_static(cls)


def entry_names(path: str, shape: Sequence[int], layout: LeafLayout) -> list[str]:
    """`path[i]` for each entry of a stack (`path[i,j]` where it has two axes); `path` of a leaf without a stack."""
    sizes = [shape[axis] for axis in layout.stack_axes]
    return [entry_name(path, *index) for index in np.ndindex(*sizes)]


def entry_infos(
    leaf: MatrixLeaf,
    make: Callable[..., _Info],
    *,
    errors: Mapping[str, Num[Array, " E"]],
    unseen: Bool[Array, "S D"] | None = None,
    **figures: Num[Array | np.ndarray, "..."],
) -> dict[str, _Info]:
    """One info for each stack entry, by its name.

    Args:
        leaf: the leaf.
        make: gets the figures of one entry as keywords.
        errors: by field; None in the info of an entry of which no input was seen.
        unseen: inputs that are 0 in every row; gives the fields `unseen_inputs` and `unseen_entries`.
        figures: by field, (E,) or (S,); of the groups of an entry the largest figure counts.

    Example:
        >>> from jaxcompress.trace import LeafLayout
        >>> import jax.numpy as jnp
        >>> layout = LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,))
        >>> leaf = MatrixLeaf(path="layers", weight=jnp.ones((2, 1, 1)), layout=layout)
        >>> errors, unseen = {"error": jnp.array([0.5, 0.0])}, jnp.array([[False], [True]])
        >>> entry_infos(leaf, dict, errors=errors, unseen=unseen)["layers[1]"]
        {'unseen_inputs': 1, 'unseen_entries': 1, 'error': None}
    """
    names = entry_names(leaf.path, leaf.weight.shape, leaf.layout)
    if not names:
        return {}
    # `np.asarray` of an array that is still being computed would wait for it with the interpreter's lock held.
    unseen, measured = jax.device_get((unseen, {**errors, **figures}))
    marks = None if unseen is None else unseen.reshape(len(names), leaf.layout.groups, unseen.shape[1])
    rows = {field: np.asarray(values).reshape(len(names), -1) for field, values in measured.items()}
    infos = {}
    for i, name in enumerate(names):
        fields = {} if marks is None else unseen_counts(marks[i])
        fields |= {field: values[i].max().item() for field, values in rows.items()}
        if marks is not None and nothing_seen(marks[i]):
            fields |= dict.fromkeys(errors)
        infos[name] = make(**fields)
    return infos
