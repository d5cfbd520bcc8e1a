"""The steps of a recipe: what is done to which leaves, and how a model is trained meanwhile."""

import dataclasses
import inspect
from collections.abc import Collection, Mapping
from typing import Any, Literal

from jaxcompress._src.recipe.methods import METHODS, Method
from jaxcompress._src.recipe.options import NEEDED, Option, at_steps, options_of, read_options
from jaxcompress._src.recipe.values import check_numbers, check_select, read_value

_COMMON = {
    "select": Option(
        name="select",
        kind=str,
        default=NEEDED,
        help="regular expression over whole paths: the leaves to act on, or whose parameters count for [[shrink]].",
    ),
    "frozen": Option(
        name="frozen", kind=bool, default=False, help="done in one shot before the training, which leaves it alone."
    ),
    "sequential": Option(
        name="sequential",
        kind=bool,
        default=None,
        help="leaves are compressed one after another, each with the inputs that the earlier ones leave it.",
    ),
}
"""Options of steps that are no keywords of their functions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a recipe: a method, and the leaves that it acts on.

    Attributes:
        stage: "shrink", "prune", "lowrank", "quantize" or "cluster".
        name: of the method in the table `METHODS`.
        select: regular expression over whole paths; None where the method selects no leaves.
        frozen: whether it is done in one shot before the training, although its method could train.
        sequential: whether leaves are compressed one after another, each with the inputs that the earlier ones leave
            it.
        keywords: of the method's function.
        at_once: keywords of the method that does the same in one shot, if there is one.
        inner: what compresses factors or residuals, in a method that takes a `compress`.
        table: as written.
    """

    stage: str
    name: str
    select: str | None
    frozen: bool
    sequential: bool
    keywords: Mapping[str, Any]
    at_once: Mapping[str, Any] | None
    inner: "Step | None"
    table: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The row of the table."""
        return METHODS[self.stage][self.name]

    @property
    def trains(self) -> bool:
        """Whether it needs a training."""
        return self.method.trains and not self.frozen

    @property
    def one_shot(self) -> "Step":
        """The step without a training.

        Raises:
            ValueError: its method does nothing without one.
        """
        if not self.method.trains:
            return self
        if self.method.at_once is None or self.at_once is None:
            raise ValueError(f"`{self.name}` trains: the recipe needs a table [distil].")
        return dataclasses.replace(self, name=self.method.at_once, keywords=self.at_once)


def read_step(stage: str, table: Mapping[str, Any]) -> Step:
    """A step from a table of options.

    Args:
        stage: a stage of `METHODS`.
        table: parsed TOML: `method` (by default the first of the stage), `select`, and the method's options; `frozen`
            where a method that trains may also be done in one shot, `sequential` where leaves may be done in turn.

    Raises:
        ValueError: an unknown method or option, a missing one, a value of the wrong type or out of range; names the
            option.

    Example:
        >>> step = read_step("prune", {"method": "alps", "select": ".*/kernel", "pattern": "2:4"})
        >>> step.trains, step.keywords["pattern"]
        (False, NOfM(n=2, m=4))
    """
    methods = METHODS[stage]
    name = table.get("method", next(iter(methods)))
    if not isinstance(name, str) or name not in methods:
        raise ValueError(f"unknown `method` {name!r}; known are {', '.join(methods)}.")
    method, options = methods[name], dict(table)
    options.pop("method", None)
    known = step_options(method)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; known are {', '.join(known)}.")
    common = {key: read_value(key, known[key].kind, options.pop(key)) for key in _COMMON if key in options}
    if "select" in common:
        check_select(common["select"])
    elif "select" in known and known["select"].default is NEEDED:
        raise ValueError("the option 'select' is needed.")
    keywords = read_options(method.function, options, defaults=method.defaults)
    inner = keywords.pop("compress", None)
    at_once, shared = None, {}
    if method.at_once is not None:
        other = methods[method.at_once]
        shared = {key: value for key, value in options.items() if key in options_of(other.function)}
        at_once = read_options(other.function, shared, defaults=other.defaults)
    _check_training(method, keywords, options, shared, frozen=common.get("frozen", False))
    return Step(
        stage=stage,
        name=name,
        select=common.get("select"),
        frozen=common.get("frozen", False),
        sequential=common.get("sequential", bool(method.sequential)),
        keywords=keywords,
        at_once=at_once,
        inner=None if inner is None else _inner(inner),
        table=dict(table),
    )


def step_options(method: Method) -> dict[str, Option]:
    """All options of a step but `method`: those of every step where they apply, and the keywords of its function."""
    offered = {"select": method.selects, "frozen": method.at_once, "sequential": method.sequential is not None}
    common = {name: _COMMON[name] for name, offer in offered.items() if offer}
    defaults = {"sequential": method.sequential, **method.defaults}
    if method in METHODS["shrink"].values():
        defaults["select"] = None
    options = common | options_of(method.function)
    return {
        name: dataclasses.replace(option, default=defaults.get(name, option.default))
        for name, option in options.items()
    }


def _inner(table: Any) -> Step:
    """What compresses the factors of low-rank leaves, or a residual: a one-shot step on whatever it is given."""
    if not isinstance(table, dict):
        raise ValueError(f"`compress` must be a table with `method` and its options, found {table!r}.")
    try:
        step = read_step("quantize", {"select": ".*", "method": "quantize", **table})
    except ValueError as err:
        raise ValueError(f"`compress`: {err}") from err
    names = inspect.signature(step.method.function).parameters
    if step.method.trains or not {"params", "select"} <= set(names) or "apply" in names:
        raise ValueError(f"`compress`: `method` {step.name!r} does not work on factors; gptq, hqq and quantize do.")
    return step


def _check_training(
    method: Method, keywords: Mapping[str, Any], options: Mapping[str, Any], at_once: Collection[str], *, frozen: bool
) -> None:
    """What can be wrong with options that a training needs is found before it."""
    if not method.trains:
        return
    if frozen:
        wrong = [name for name in options if name not in at_once]
        if wrong:
            raise ValueError(f"`{wrong[0]}` must be left out if `frozen` is true: frozen leaves do not train.")
    if "groups" not in inspect.signature(method.function).parameters or "groups" in keywords:  # units come from a model
        method.function(**at_steps(keywords, 100))


Remat = Literal["dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"]
"""Policies of `jax.checkpoint_policies`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One training: fine-tuning or distillation, by AdamW with linear warm-up and cosine decay.

    Attributes:
        epochs: passes over the rows.
        learning_rate: the highest.
        batch_size: rows in a batch.
        widths: rows are padded to the narrowest of these that holds them, and cut to the last one; each is one
            compilation. By default, `row_widths` of the rows: nothing is cut that `tokenize` has not cut.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        dropout: whether the model's dropout is on.
        temperature: T of the soft targets.
        soft_targets: weight of T² KL(teacher || student).
        pooled: weight of the mean squared error of the pooled vectors.
        hidden: weight of the mean squared error of the hidden states of all layers.
        hard_labels: weight of the cross-entropy with the labels.
        seed: of order and dropout.
        micro_batches: parts of a batch that are run one after another, to need less memory; must divide `batch_size`.
        float32_masters: whether the optimizer acts on float32 copies of weights that are narrower, in bfloat16 say.
        ema: decay, in [0, 1), of the averages of what is trained, which then are the result; 0: the last weights are.
        loss_scale: what the loss is multiplied by in the backward pass, so that small gradients of weights in float16
            do not become 0; 0: nothing.
        dynamic_loss_scale: whether the scale follows the gradients, from `loss_scale` (by default 2¹⁵) on: steps whose
            gradients are not finite are skipped, and halve it.
        remat: what is kept for the backward pass, as a policy of `jax.checkpoint_policies`: outputs of matmuls
            ("dots_saveable"), of those with weights ("dots_with_no_batch_dims_saveable"), or nothing
            ("nothing_saveable"), which saves memory in models that scan over their layers; the rest is computed twice.
            By default everything is.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 32
    widths: tuple[int, ...] = ()
    warmup: float = 0.1
    weight_decay: float = 0.0
    dropout: bool = False
    temperature: float = 1.0
    soft_targets: float = 0.0
    pooled: float = 0.0
    hidden: float = 0.0
    hard_labels: float = 0.0
    seed: int = 0
    micro_batches: int = 1
    float32_masters: bool = False
    ema: float = 0.0
    loss_scale: float = 0.0
    dynamic_loss_scale: bool = False
    remat: Remat | None = None

    def __post_init__(self) -> None:
        """Checks the options."""
        check_numbers(self)
        for name in ("epochs", "batch_size", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.batch_size % self.micro_batches:
            raise ValueError(f"`micro_batches` must divide `batch_size`, {self.batch_size}, got {self.micro_batches}.")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"`ema` must be in [0, 1), got {self.ema}.")
        if not self.loss_scale >= 0:
            raise ValueError(f"`loss_scale` must not be negative, got {self.loss_scale}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"`weight_decay` must not be negative, got {self.weight_decay}.")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"`warmup` is a share of the steps and must be in [0, 1), got {self.warmup}.")
        if list(self.widths) != sorted(set(self.widths)) or min(self.widths, default=1) < 1:
            raise ValueError(f"`widths` must be positive and ascending, got {list(self.widths)}.")
        weights = {name: getattr(self, name) for name in ("soft_targets", "pooled", "hidden", "hard_labels")}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"At least one loss needs a positive weight, and none a negative one, got {weights}.")
