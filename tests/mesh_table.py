"""Public functions on a mesh: a model whose leaves are sharded in every way, and what is called on it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._src.pruning.masks import magnitude_masks
from jaxcompress._src.pruning.normalize import normalized_scores
from jaxcompress._src.quantization.learned_rounding import RoundingSchedule
from jaxcompress._src.units.swap import fisher_matrix
from jaxcompress.clustering import CodebookSpec
from jaxcompress.pruning import n_of_m
from jaxcompress.quantization import QuantSpec
from jaxcompress.structured import UnitGroup, UnitSlices

SPECS = {
    "fsdp": {"kernel": P("data", None), "bias": P("data")},
    "tensor": {"kernel": P(None, "model")},
    "both": {"kernel": P("data", "model")},
    "whole": {"kernel": P(None, None), "scale": P(None)},
}
SIZE = 16
ROWS = P("data", None)
SPEC = QuantSpec(bits=4, group_size=8)
TWO_OF_FOUR = n_of_m(2, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """One device, or a mesh of 4 x 2 with axes of one type."""

    kind: AxisType | None

    @functools.cached_property
    def mesh(self) -> Any:
        return None if self.kind is None else jax.make_mesh((4, 2), ("data", "model"), axis_types=(self.kind,) * 2)

    def put(self, value: Any, spec: Any) -> Any:
        return value if self.mesh is None else jax.device_put(value, NamedSharding(self.mesh, spec))

    def reshard(self, value: Any, *spec: Any) -> Any:
        """An Explicit mesh must be told, any other one must not."""
        return reshard(value, NamedSharding(self.mesh, P(*spec))) if self.kind == AxisType.Explicit else value

    @functools.cached_property
    def params(self) -> Any:
        rng = np.random.default_rng(0)
        tree = {name: {"kernel": jnp.asarray(rng.normal(size=(SIZE, SIZE)) / 4, jnp.float32)} for name in SPECS}
        tree["whole"]["scale"] = jnp.asarray(rng.uniform(0.5, 2.0, size=SIZE), jnp.float32)
        tree["fsdp"]["bias"] = jnp.asarray(rng.normal(size=SIZE), jnp.float32)
        return jax.tree.map(self.put, tree, SPECS)

    @functools.cached_property
    def x(self) -> Any:
        return self.put(jnp.asarray(np.random.default_rng(1).normal(size=(24, SIZE)), jnp.float32), ROWS)

    @functools.cached_property
    def batches(self) -> Any:
        return [(self.x,)]

    def apply(self, params: Any, x: Any) -> Any:
        """Weights are gathered, cut along one axis, along the other, summed over devices."""
        x = jnp.tanh(
            x @ self.reshard(params["fsdp"]["kernel"], None, None) + self.reshard(params["fsdp"]["bias"], None)[None]
        )
        x = jnp.tanh(x @ params["tensor"]["kernel"])
        kernel = self.reshard(params["both"]["kernel"], "model", None)
        out: Any = {"out_sharding": NamedSharding(self.mesh, ROWS)} if self.kind == AxisType.Explicit else {}
        x = jnp.einsum("ni,io->no", x, kernel, **out)
        return (jnp.tanh(x) * params["whole"]["scale"][None]) @ params["whole"]["kernel"]

    def loss(self, params: Any, batch: Any) -> Any:
        return jnp.square(jc.execute(self.apply)(params, batch[0])).mean()

    def trained(self, params: Any, x: Any) -> Any:
        return jnp.square(self.apply(jc.quantization.fake_quantize(params, SPEC), x)).mean()

    @functools.cached_property
    def layouts(self) -> Any:
        return jc.trace.layouts(self.apply, self.params, self.x)

    @functools.cached_property
    def statistics(self) -> Any:
        return jc.calibration.input_statistics(self.apply, self.params, self.batches)

    @functools.cached_property
    def masks(self) -> Any:
        return magnitude_masks(self.params, sparsity=0.5, pattern=TWO_OF_FOUR)

    @functools.cached_property
    def quantized(self) -> Any:
        return jc.quantization.quantize(self.params, SPEC)[0]


def units() -> tuple[UnitGroup, ...]:
    parts = (
        UnitSlices(path="fsdp/kernel", axis=1),
        UnitSlices(path="fsdp/bias", axis=0),
        UnitSlices(path="tensor/kernel", axis=0, gated=True),
    )
    return (UnitGroup(name="hidden", count=SIZE, slices=parts),)


def _distance(tree: Any, params: Any) -> float:
    dense, found = (np.asarray(jc.materialize(each)["both"]["kernel"], np.float64) for each in (params, tree))
    return float(np.linalg.norm(found - dense) / np.linalg.norm(dense))


KEEP = {"hidden": np.arange(SIZE) % 3 > 0}

ONE = jc.tree.by_path("both/kernel")
UNEVEN = dataclasses.replace(SPEC, symmetric=False)
LEARNING = RoundingSchedule(steps=2)
PER_TENSOR = QuantSpec(bits=8, per_tensor=True)

CALLS: dict[str, Callable[[Place], Any]] = {
    "layouts": lambda m: [str(jax.tree.leaves(m.layouts))],
    "folds": lambda m: [str(jc.trace.folds(m.apply, m.params, m.x))],
    "input_statistics": lambda m: m.statistics,
    "sequential": lambda m: jc.calibration.sequential(
        m.apply,
        m.params,
        m.batches,
        lambda p, s, layouts: jc.pruning.wanda(p, s, layouts=layouts, pattern=TWO_OF_FOUR),
        select=ONE,
    ),
    "gradients": lambda m: jc.calibration.gradients(m.loss, m.params, m.batches),
    "fisher": lambda m: jc.calibration.fisher(m.loss, m.params, m.batches, per_example=False),
    "masks, n of m": lambda m: m.masks,
    "masks, global": lambda m: magnitude_masks(m.params, sparsity=0.5, scope="global"),
    "masks, blocks": lambda m: magnitude_masks(m.params, sparsity=0.5, pattern=jc.pruning.block(4, 4), select=ONE),
    "apply_masks": lambda m: jc.pruning.apply_masks(m.params, m.masks),
    "normalized_scores": lambda m: normalized_scores(jc.pruning.magnitude_scores(m.params, select=ONE), by="l2"),
    "wanda": lambda m: jc.pruning.wanda(m.params, m.statistics, pattern=TWO_OF_FOUR),
    "sparsegpt": lambda m: jc.pruning.sparsegpt(m.params, m.statistics, sparsity=0.5, select=ONE),
    "tune_masked": lambda m: jc.pruning.tune_masked(m.params, m.masks, m.statistics),
    "sensitivity": lambda m: (
        jc.pruning.loss_sensitivity(
            m.loss, m.params, m.batches, jc.pruning.magnitude_scores(m.params, select=ONE), grid=(0.0, 0.5)
        ).losses
    ),
    "quantize": lambda m: m.quantized,
    "fake_quantize": lambda m: jc.quantization.fake_quantize(m.params, SPEC),
    "fake_quantize, gradient": lambda m: jax.jit(jax.grad(m.trained))(m.params, m.x),
    "fixed_point": lambda m: jc.quantization.fixed_point(m.params, 8, select=ONE)[0],
    "gptq": lambda m: jc.quantization.gptq(m.params, m.statistics, SPEC, select=ONE),
    "awq": lambda m: jc.quantization.awq(m.params, m.statistics, SPEC, grid_size=2, select=ONE),
    # Its zero points are means in which sums of other orders tip single codes.
    "hqq": lambda m: [round(_distance(jc.quantization.hqq(m.params, UNEVEN, select=ONE)[0], m.params), 2)],
    "smooth": lambda m: jc.quantization.smooth(m.params, m.statistics, jc.trace.folds(m.apply, m.params, m.x)),
    "reconstruct": lambda m: jc.quantization.reconstruct(m.apply, m.params, m.batches, SPEC, select=ONE),
    "correct_biases": lambda m: jc.quantization.correct_biases(m.apply, m.params, m.quantized, m.batches),
    "learned_rounding": lambda m: jc.quantization.learned_rounding(
        m.apply, m.params, m.quantized, m.batches, together=lambda path: 0, schedule=LEARNING
    ),
    "rounding_errors": lambda m: jc.quantization.rounding_errors(m.params, m.quantized, m.statistics),
    "quantize_inputs": lambda m: jc.execute(m.apply)(
        jc.quantization.quantize_inputs(
            m.quantized, PER_TENSOR, ranges=jc.quantization.input_ranges(m.apply, m.params, m.batches, PER_TENSOR)
        )[0],
        m.x,
    ),
    "cluster": lambda m: jc.clustering.cluster(m.params, CodebookSpec(values=4), select=ONE),
    "activation_svd": lambda m: jc.materialize(
        jc.lowrank.activation_svd(m.params, m.statistics, rank=4, select=ONE)[0]
    ),
    "execute": lambda m: jc.execute(m.apply)(m.quantized, m.x),
    "execute, jit": lambda m: jax.jit(jc.execute(m.apply))(m.quantized, m.x),
    "materialize": lambda m: jc.materialize(m.quantized),
    "unit scores": lambda m: jc.structured.magnitude_unit_scores(m.params, units()),
    "gate gradients": lambda m: fisher_matrix(
        jc.structured.gate_gradients(m.loss, m.params, units(), m.batches, per_example=False)
    ),
    "discover_units": lambda m: [str(jc.structured.discover_units(m.apply, m.params, m.x))],
    "shrink": lambda m: jc.structured.shrink(m.params, units(), KEEP),
    "structured.refit": lambda m: jc.structured.refit(m.apply, m.params, units(), KEEP, m.batches),
    "size_report": lambda m: [str(jc.report.size_report(m.quantized))],
}
