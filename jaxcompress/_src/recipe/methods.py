"""The one table of what a recipe can name: stage -> method -> function. Options are the function's own keywords."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxcompress._src.clustering.additive import additive_quantize
from jaxcompress._src.clustering.cluster import cluster
from jaxcompress._src.clustering.transform import trained_codebooks
from jaxcompress._src.lowrank.factors import compress_factors
from jaxcompress._src.lowrank.gates import rank_gates
from jaxcompress._src.lowrank.lora import lora
from jaxcompress._src.lowrank.residual import with_residual
from jaxcompress._src.lowrank.svd import activation_svd, fisher_svd, svd
from jaxcompress._src.pruning.gradual import gradual
from jaxcompress._src.pruning.group_lasso import group_lasso
from jaxcompress._src.pruning.magnitude import magnitude
from jaxcompress._src.pruning.movement import movement
from jaxcompress._src.pruning.rigl import rigl
from jaxcompress._src.pruning.soft_movement import soft_movement
from jaxcompress._src.pruning.sparse_evolution import sparse_evolution
from jaxcompress._src.pruning.sparsegpt import sparsegpt
from jaxcompress._src.pruning.sr_ste import sr_ste
from jaxcompress._src.pruning.straight_through import straight_through_magnitude
from jaxcompress._src.pruning.tune import alps, tune_masked
from jaxcompress._src.pruning.wanda import wanda
from jaxcompress._src.quantization.bias import correct_biases
from jaxcompress._src.quantization.gptq import gptq
from jaxcompress._src.quantization.gptq_sequential import gptq_sequential
from jaxcompress._src.quantization.hqq import hqq
from jaxcompress._src.quantization.input_transforms import lsq_inputs, pact_inputs
from jaxcompress._src.quantization.inputs import quantize_inputs
from jaxcompress._src.quantization.learned_rounding import learned_rounding
from jaxcompress._src.quantization.lsq import lsq
from jaxcompress._src.quantization.quantize import fixed_point, quantize
from jaxcompress._src.quantization.reconstruct import reconstruct
from jaxcompress._src.quantization.smooth import awq, smooth
from jaxcompress._src.quantization.spec import QuantSpec
from jaxcompress._src.quantization.transform import quantization_aware
from jaxcompress._src.types import Params, Transform
from jaxcompress._src.units.gates import hard_concrete
from jaxcompress._src.units.one_shot import fisher_shrink, magnitude_shrink


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    A recipe knows the arguments of a function by their names. It gives `params`, `select`, `layouts`, `groups`, and
    what comes from texts: `statistics`, `apply`, `batches`, `fisher`, `loss` and a few more (see `one_shot`). Others
    are options of the step if a file can say their values (see `options`), and their lines in the docstring explain
    them.

    Attributes:
        function: a one-shot method, `(params, ...) -> (params, info)`, or what makes a training transform.
        at_once: method of the same stage that does in one shot what this transform does in a training.
        sequential: of methods that take `statistics`, whether leaves are compressed one after another, each with the
            inputs that the earlier ones leave it; None: there is no such choice.
        keeps_zeros: whether weights that are 0 stay 0.
        defaults: values of options that a file leaves out, where they are not those of the function but suit files
            (scales of 16 bits) and trainings of few steps.
        statistics: what a transform begins with: `(evidence, params, select, keywords) -> statistics`.
        gives_values: whether the leaves that it selects get their final values from it.
        last: whether this one-shot method comes after all trainings, because it acts on what they leave.
    """

    function: Callable[..., Any]
    at_once: str | None = None
    sequential: bool | None = None
    keeps_zeros: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Callable[..., Params] | None = None
    gives_values: bool = True
    last: bool = False

    @property
    def trains(self) -> bool:
        """Whether it is a transform, which needs a training."""
        return inspect.signature(self.function).return_annotation is Transform

    @property
    def selects(self) -> bool:
        """Whether it acts on leaves that a step selects."""
        return "select" in inspect.signature(self.function).parameters

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


def _method(function: Callable[..., Any], **facts: Any) -> Method:
    return Method(function=function, **facts)


_OFTEN = {"every": 10}
_SCALES = {"scale_dtype": "bfloat16"}
_TABLES = {"dtype": "bfloat16"}

METHODS: Mapping[str, Mapping[str, Method]] = {
    "shrink": {
        "fisher": _method(fisher_shrink),
        "magnitude": _method(magnitude_shrink),
        "hard_concrete": _method(hard_concrete),
    },
    "prune": {
        "gradual": _method(gradual, at_once="magnitude", defaults=_OFTEN),
        "magnitude": _method(magnitude),
        "wanda": _method(wanda, sequential=False),
        "sparsegpt": _method(sparsegpt, sequential=True),
        "alps": _method(alps, sequential=True),
        "tune_masked": _method(tune_masked),
        "straight_through_magnitude": _method(straight_through_magnitude, at_once="magnitude", defaults=_OFTEN),
        "movement": _method(movement, defaults=_OFTEN),
        "soft_movement": _method(soft_movement),
        "rigl": _method(rigl, defaults=_OFTEN),
        "sparse_evolution": _method(sparse_evolution, defaults=_OFTEN),
        "sr_ste": _method(sr_ste),
        "group_lasso": _method(group_lasso),
    },
    "lowrank": {
        "svd": _method(svd),
        "activation_svd": _method(activation_svd),
        "fisher_svd": _method(fisher_svd),
        "with_residual": _method(with_residual),
        "compress_factors": _method(compress_factors),
        "lora": _method(lora, gives_values=False),
        "rank_gates": _method(
            rank_gates, statistics=lambda evidence, params, select, _: evidence.statistics(params, select)
        ),
    },
    "quantize": {
        "quantization_aware": _method(quantization_aware, at_once="quantize", keeps_zeros=True, defaults=_SCALES),
        "quantize": _method(quantize, keeps_zeros=True, defaults=_SCALES),
        "fixed_point": _method(fixed_point, keeps_zeros=True),
        "smooth": _method(smooth, keeps_zeros=True),
        "hqq": _method(hqq, defaults=_SCALES),
        "awq": _method(awq, keeps_zeros=True, defaults=_SCALES),
        "gptq": _method(gptq, sequential=False, defaults=_SCALES),
        "gptq_sequential": _method(gptq_sequential, defaults=_SCALES),
        "reconstruct": _method(reconstruct, defaults=_SCALES),
        "learned_rounding": _method(learned_rounding),
        "correct_biases": _method(correct_biases, keeps_zeros=True),
        "quantize_inputs": _method(quantize_inputs, keeps_zeros=True, gives_values=False, last=True),
        "lsq": _method(lsq, keeps_zeros=True, defaults=_SCALES),
        "lsq_inputs": _method(
            lsq_inputs,
            keeps_zeros=True,
            gives_values=False,
            defaults={"per_tensor": True},
            statistics=lambda evidence, params, select, keywords: evidence.input_ranges(
                params, keywords["spec"], select
            ),
        ),
        "pact_inputs": _method(
            pact_inputs,
            keeps_zeros=True,
            gives_values=False,
            statistics=lambda evidence, params, select, keywords: evidence.input_ranges(
                params, QuantSpec(bits=keywords.get("bits", 4), symmetric=False, per_tensor=True), select
            ),
        ),
    },
    "cluster": {
        "trained_codebooks": _method(trained_codebooks, at_once="cluster", keeps_zeros=True, defaults=_TABLES | _OFTEN),
        "cluster": _method(cluster, keeps_zeros=True, defaults=_TABLES),
        "additive_quantize": _method(additive_quantize, defaults=_TABLES),
    },
}
"""In the order in which stages run; the first method of a stage is the one of a step that names none."""
