"""Every transform of the library, one row each: what the laws of the contract are tested on."""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from jaxcompress import gates, lowrank, pruning
from jaxcompress._src.quantization.input_transforms import quantized_inputs
from jaxcompress._src.quantization.inputs import InputRange
from jaxcompress._src.recipe.methods import METHODS
from jaxcompress._src.types import Transform
from jaxcompress._src.units.penalty import lambda_penalty
from jaxcompress.clustering import CodebookSpec, trained_codebooks
from jaxcompress.distillation import make_train_step
from jaxcompress.quantization import QuantSpec, lsq, lsq_inputs, pact_inputs, quantization_aware
from jaxcompress.schedules import constant, cubic
from jaxcompress.structured import UnitGroup, UnitSlices
from jaxcompress.tree import Unselected

STEPS = 5
SHAPE = (16, 24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One transform.

    Attributes:
        make: a new one.
        zeros: the share of zeros among the weights that `apply` returns after `STEPS` steps; a pair: bounds, where
            training decides.
        trains: has trainable state.
        variant: of the row above; not run on eight devices, too.
        exact: what is stored has the very bits of what was trained; otherwise sums are made in another order.
        rate: of the optimizer of the trainable state.
        statistics: what `init` is given.
    """

    make: Callable[[], Transform]
    zeros: float | tuple[float, float] = 0.0
    trains: bool = False
    variant: bool = False
    exact: bool = True
    rate: float = 10.0
    statistics: Callable[[], Any] = lambda: None


def _soon() -> Any:
    return cubic(0.0, 0.5, begin=0, end=STEPS - 1)


TABLE: dict[str, Row] = {
    "identity": Row(make=jc.identity),
    "gradual": Row(make=lambda: pruning.gradual(schedule=_soon(), every=1), zeros=0.5),
    "gradual, global": Row(
        make=lambda: pruning.gradual(schedule=_soon(), every=1, scope="global"), zeros=0.5, variant=True
    ),
    "gradual, 2:4": Row(
        make=lambda: pruning.gradual(schedule=_soon(), every=2, pattern=pruning.n_of_m(2, 4)),
        zeros=0.5,
        variant=True,
    ),
    "gradual, a sparsity per leaf": Row(
        make=lambda: pruning.gradual(
            schedule=cubic(0.0, 1.0, begin=0, end=STEPS - 1),
            every=1,
            sparsities=pruning.erdos_renyi(params(), sparsity=0.75),
        ),
        zeros=0.75,
        variant=True,
    ),
    "straight-through": Row(make=lambda: pruning.straight_through_magnitude(schedule=_soon(), scope="row"), zeros=0.5),
    "movement": Row(make=lambda: pruning.movement(schedule=_soon()), zeros=0.5, trains=True),
    "soft movement": Row(
        make=lambda: pruning.soft_movement(threshold=0.5, strength=1.0), zeros=(0.6, 0.85), trains=True
    ),
    "RigL": Row(make=lambda: pruning.rigl(sparsity=0.75, until=STEPS, every=2), zeros=0.75),
    "SET": Row(make=lambda: pruning.sparse_evolution(sparsity=0.5, until=STEPS, every=1), zeros=0.5),
    "SR-STE": Row(make=lambda: pruning.sr_ste(2, 4, strength=0.1), zeros=0.5),
    "group lasso": Row(make=lambda: pruning.group_lasso(strength=0.05, freeze_at=3), zeros=(0.03, 0.1)),
    "group lasso, blocks": Row(
        make=lambda: pruning.group_lasso(strength=0.05, grouping=pruning.block(4, 4)), zeros=(0.5, 0.75), variant=True
    ),
    "rank gates": Row(
        make=lambda: lowrank.rank_gates(strength=0.01, drop_rate=0.4), zeros=0.0, trains=True, exact=False
    ),
    "LoRA": Row(
        make=lambda: lowrank.lora(rank=3, alpha=6.0, train=jc.tree.by_path(".*bias")),
        trains=True,
        exact=False,
        rate=0.1,
    ),
    "LoRA, factors": Row(
        make=lambda: lowrank.lora(rank=3, store="factors", select=KERNELS), trains=True, rate=0.1, variant=True
    ),
    "hard concrete gates": Row(
        make=lambda: gates.hard_concrete([UNITS], penalty=lambda_penalty(10.0, examples=100)),
        zeros=0.5,
        trains=True,
        exact=False,
        rate=2.0,
    ),
    "4 bits": Row(make=lambda: quantization_aware(QuantSpec(bits=4, group_size=8)), zeros=(0.05, 0.1)),
    "4 bits, later": Row(make=lambda: quantization_aware(QuantSpec(bits=4), begin=2), zeros=(0.05, 0.12), variant=True),
    "codebooks of 3 bits": Row(
        make=lambda: trained_codebooks(CodebookSpec(values=8, zero=False)), zeros=0.0, trains=True, rate=0.05
    ),
    "codebooks of 3 bits, assigned anew": Row(
        make=lambda: trained_codebooks(CodebookSpec(values=8, rate=0.01), every=2, until=4, store="sparse"),
        zeros=0.0,
        trains=True,
        rate=0.05,
        variant=True,
    ),
    "gradual, then codebooks": Row(
        make=lambda: jc.chain(
            pruning.gradual(schedule=constant(0.5), every=1),
            trained_codebooks(CodebookSpec(values=8, dtype="bfloat16"), until=3),
        ),
        zeros=0.5,
        trains=True,
        rate=0.05,
    ),
    "8 bits, then fewer": Row(
        make=lambda: quantization_aware(QuantSpec(bits=4, symmetric=False), bits=lambda step: jnp.maximum(8 - step, 4)),
        zeros=(0.05, 0.1),
        variant=True,
    ),
    "learned steps, 3 bits": Row(
        make=lambda: lsq(QuantSpec(bits=3, group_size=8, scale_dtype="bfloat16")),
        zeros=(0.15, 0.25),
        trains=True,
        rate=1e-3,
    ),
    "learned steps and zero points, 2 bits": Row(
        make=lambda: lsq(QuantSpec(bits=2, symmetric=False, range_rule="mse")),
        zeros=(0.3, 0.45),
        trains=True,
        rate=1e-3,
        variant=True,
    ),
    "8 bits, inputs too": Row(
        make=lambda: jc.chain(quantization_aware(QuantSpec(bits=8)), quantized_inputs(QuantSpec(bits=8))),
        zeros=(0.0, 0.01),
    ),
    "learned steps of inputs, 4 bits": Row(
        make=lambda: jc.chain(
            lsq(QuantSpec(bits=4)), lsq_inputs(QuantSpec(bits=4, symmetric=False, per_tensor=True), select=KERNELS)
        ),
        zeros=(0.05, 0.15),
        trains=True,
        rate=1e-3,
        statistics=lambda: ranges(0.5, 7),
    ),
    "clipped inputs, 4 bits": Row(
        make=lambda: jc.chain(quantization_aware(QuantSpec(bits=8)), pact_inputs(4, select=KERNELS)),
        zeros=(0.0, 0.01),
        trains=True,
        rate=1e-3,
        statistics=lambda: ranges(0.1, 0),
        variant=True,
    ),
    "gradual, then 4 bits": Row(
        make=lambda: jc.chain(
            pruning.gradual(schedule=constant(0.5), every=1), quantization_aware(QuantSpec(bits=4, symmetric=False))
        ),
        zeros=0.5,
    ),
}


# Units of the first kernel only.
UNITS = UnitGroup(name="inputs", count=SHAPE[0], slices=(UnitSlices(path="first/kernel", axis=0, gated=True),))

KERNELS = jc.tree.by_path(".*kernel")


def ranges(scale: float, zero_point: int) -> Any:
    """Of the inputs of both kernels."""
    found = InputRange(jnp.float32(scale), jnp.uint8(zero_point))
    return {name: {"kernel": found, "bias": Unselected} for name in ("first", "second")}


def params() -> Any:
    """Two kernels, not square, but of one shape: kernels of one shape compile once."""
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=SHAPE) / 4, jnp.float32), "bias": jnp.zeros(SHAPE[1])}
        for name in ("first", "second")
    }


def model(tree: Any, x: jax.Array) -> jax.Array:
    """One layer, gated by the other."""
    first, second = (x @ layer["kernel"] + layer["bias"][None] for layer in (tree["first"], tree["second"]))
    return jnp.tanh(first) * second


def batch() -> dict[str, jax.Array]:
    """16 rows with targets."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(16, 16))
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(np.sin(np.tile(x, 2)[:, : SHAPE[1]] * 2), jnp.float32)}


def run(
    row: Row,
    place: Callable[[Any], Any] = lambda tree: tree,
    place_batch: Any = None,
    texts: list[str] | None = None,
) -> tuple[Any, Any, int]:
    """`(transform, train state, traces)` after `STEPS` donated steps with momentum and weight decay.

    Not Adam: it makes whole steps out of gradients that are rounding errors, which differ with the number of devices.

    Args:
        row: of the table.
        place: puts parameters on devices.
        place_batch: puts batches on devices.
        texts: gets the HLO of the step, which is then compiled ahead: it refuses a state that lies elsewhere.
    """
    traces = []

    def apply(tree: Any, inputs: Any, *, key: Any, train: bool) -> Any:
        traces.append(train)
        return {"y": model(tree, inputs["x"])}

    def squared(student: Any, teacher: Any, inputs: Any) -> Any:
        return jnp.square(student["y"] - inputs["y"]).sum(), jnp.float32(inputs["y"].size)

    transform = row.make()
    init_state, step = make_train_step(
        apply,
        None,
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9)),
        losses={"squared": squared},
        transform=transform,
        transform_optimizer=optax.sgd(row.rate) if row.trains else None,
    )
    state = init_state(place(params()), key=jax.random.key(3), statistics=row.statistics())
    inputs = (place_batch or place)(batch())
    if texts is not None:
        step = step.lower(state, None, inputs).compile()
        texts.append(step.as_text())
    for _ in range(STEPS):
        state, _ = step(state, None, inputs)
    return transform, state, len(traces)


def not_called(file: str, *, keywords: Collection[str] = ()) -> list[str]:
    """Names of the transforms that a file does not call: of all, or of those that take one of some keywords."""
    functions = [node.func for node in ast.walk(ast.parse(Path(file).read_text("utf-8"))) if isinstance(node, ast.Call)]
    called = {getattr(function, "attr", getattr(function, "id", None)) for function in functions}
    rows = [row.function for methods in METHODS.values() for row in methods.values() if row.trains]
    wanted = [row for row in rows if not keywords or set(keywords) & set(inspect.signature(row).parameters)]
    return sorted({row.__name__ for row in wanted} - called)


@functools.cache
def trained(name: str) -> tuple[Any, Any, int]:
    """`run` on one device, once per session."""
    return run(TABLE[name])
