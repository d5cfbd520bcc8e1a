"""How compressed leaves are written."""

import dataclasses
from collections.abc import Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafOptions:
    """The options of `save_onnx` that are about compressed leaves."""

    input_ranges: Literal["row", "tensor"]
    weight_bits: Literal[7, 8]
    accuracy_level: int

    def __post_init__(self) -> None:
        """Checks the choices."""
        for name, choices in (
            ("input_ranges", ("row", "tensor")),
            ("weight_bits", (7, 8)),
            ("accuracy_level", range(5)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {getattr(self, name)!r}.")

    def without_effect(self, leaves: Sequence["OnnxLeaf"]) -> list[str]:
        """What was asked for and concerns none of the leaves, with the reason."""
        # `input_ranges="row"` asks for what JAX does, which the other forms do in any case.
        operators = {
            "weight_bits": ("MatMulInteger", self.weight_bits == 8),
            "accuracy_level": ("MatMulNBits", self.accuracy_level == 0),
        }
        return [
            f"`{name}={getattr(self, name)!r}`, for no leaf is multiplied by `{operator}`"
            for name, (operator, default) in operators.items()
            if not default and not any(operator in leaf.form for leaf in leaves)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnnxLeaf:
    """What became of a compressed leaf at one of its uses.

    Attributes:
        path: of the leaf.
        form: in the file, such as `MatMulNBits, 4 bits, blocks of 32`.
        reason: why not a smaller or faster one; empty where there is none.
    """

    path: str
    form: str
    reason: str = ""
