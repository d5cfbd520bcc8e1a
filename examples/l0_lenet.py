"""LeNets with L0 gates on their inputs, channels and neurons, until they are a fraction of their size.

Gates (hard concrete, one for every unit) are trained with the weights against a Lagrangian target; then the units that
fit into the target are chosen, their gates folded into the weights, the others taken out of the arrays, and the small
network is trained on. Beside it, with the same number of epochs each: the dense network, and one that was trained
dense, then cut to the same size by the norms of its units, and trained on.

    python examples/l0_lenet.py [--model lenet-300-100] [--images fashion-mnist] [--quick] [--plot FILE]
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lenets import NETWORKS, Network, Params
from workbench import Images, fashion_mnist, mnist_5k

import jaxcompress as jc
from jaxcompress import gates, structured
from jaxcompress.distillation import make_train_step, soft_targets
from jaxcompress.structured import UnitGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What differs between the networks and between the data sets; chosen on rows held out from training."""

    keep: float
    epochs: int
    gate_epochs: int
    batch: int = 100
    learning_rate: float = 1e-3
    dense_weight_decay: float = 0.3
    gate_rate: float = 0.02
    distilled: float = 0.9
    temperature: float = 2.0


PLANS = {
    ("lenet-300-100", "fashion-mnist"): Plan(keep=0.149, epochs=50, gate_epochs=25),
    ("lenet-300-100", "mnist-5k"): Plan(keep=0.1, epochs=120, gate_epochs=60),
    ("lenet-5", "fashion-mnist"): Plan(keep=0.1, epochs=6, gate_epochs=3),
    ("lenet-5", "mnist-5k"): Plan(keep=0.05, epochs=40, gate_epochs=20),
}
QUICK_ROWS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Images and labels on the device, and what the dense network says of them, where it teaches."""

    images: jax.Array
    labels: jax.Array
    teacher: jax.Array | None = None


def cross_entropy(student: Mapping[str, jax.Array], teacher: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    del teacher
    losses = optax.softmax_cross_entropy_with_integer_labels(student["logits"], batch["labels"])
    return losses.sum(), len(losses)


def losses_of(rows: Rows, plan: Plan) -> dict[str, Any]:
    if rows.teacher is None:
        return {"task": cross_entropy}
    soft = soft_targets(temperature=plan.temperature)
    return {"task": (1 - plan.distilled, cross_entropy), "soft": (plan.distilled, soft)}


def train(
    network: Network,
    params: Params,
    rows: Rows,
    plan: Plan,
    epochs: int,
    *,
    key: jax.Array,
    transform: Any = None,
    weight_decay: float = 0.0,
) -> Any:
    """The train state after so many epochs; an epoch is one call of a compiled scan over its batches."""
    batches = len(rows.labels) // plan.batch
    rate = optax.cosine_decay_schedule(plan.learning_rate, epochs * batches)
    init_state, step = make_train_step(
        lambda params, batch, *, key, train: {"logits": network.apply(params, batch["images"])},
        None,
        optax.adamw(rate, weight_decay=weight_decay),
        losses=losses_of(rows, plan),
        transform=jc.identity() if transform is None else transform,
        transform_optimizer=optax.adam(plan.gate_rate, b1=0.9),
    )

    @jax.jit
    def epoch(state: Any, table: Mapping[str, Any], key: jax.Array) -> tuple[Any, Any]:
        order = jax.random.permutation(key, len(table["labels"]))
        order = order[: batches * plan.batch].reshape(batches, plan.batch)

        def visit(state: Any, places: jax.Array) -> tuple[Any, Any]:
            state, figures = step(state, (), jax.tree.map(lambda column: column[places], table))
            return state, (figures["task"][0] / plan.batch, figures["penalty"][0])

        return jax.lax.scan(visit, state, order)

    key, own = jax.random.split(key)
    state = init_state(params, key=own)
    table = {"images": rows.images, "labels": rows.labels}
    if rows.teacher is not None:
        table["teacher"] = {"logits": rows.teacher}
    for number in range(epochs):
        start = time.perf_counter()
        state, (losses, penalties) = epoch(state, table, jax.random.fold_in(key, number))
        print(
            f"  epoch {number + 1}/{epochs}: loss {float(losses.mean()):.4f}, penalty {float(penalties[-1]):.4f}, "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )
    return state


def logits(network: Network, params: Params, rows: Rows) -> jax.Array:
    apply = jax.jit(network.apply)
    return jnp.concatenate([apply(params, rows.images[i : i + 1000]) for i in range(0, len(rows.labels), 1000)])


def accuracy(network: Network, params: Params, rows: Rows) -> float:
    """Percent of the rows."""
    return 100 * float((logits(network, params, rows).argmax(axis=1) == rows.labels).mean())


def with_gates(network: Network, params: Params, rows: Rows, plan: Plan, groups: Any, *, key: jax.Array) -> Any:
    """`(masked parameters, kept units)` after training with gates: the units that fit, their gates folded in."""
    batches = len(rows.labels) // plan.batch
    transform = gates.hard_concrete(
        groups,
        penalty=gates.lagrangian(
            sparsity=1 - plan.keep, warm_up=optax.linear_schedule(0.0, 1.0, plan.gate_epochs * batches // 2)
        ),
        drop_rate={"inputs": 0.2} if network.takes_features else 0.5,
    )
    state = train(network, params, rows, plan, plan.gate_epochs, key=key, transform=transform)
    log_alpha = state.transform_state.trainable["log_alpha"]
    print_gates(log_alpha, state.transform_state.trainable["multipliers"])
    keep = select(log_alpha, groups, state.params, plan)
    return gates.multiply_gates(state.params, groups, gates.gate_values(log_alpha, keep=keep)), keep


def by_norm(network: Network, params: Params, rows: Rows, plan: Plan, groups: Any, *, key: jax.Array) -> Any:
    """The same after training without gates, by the norm of a unit's weights, relative to that of its group."""
    # Without decay, weights of pixels that are always black would keep their first, large norm.
    state = train(network, params, rows, plan, plan.gate_epochs, key=key, weight_decay=plan.dense_weight_decay)
    norms = structured.magnitude_unit_scores(state.params, groups, per_weight=False)
    norms = {name: norm / jnp.sqrt(jnp.square(norm).mean()) for name, norm in norms.items()}
    keep = select(norms, groups, state.params, plan)
    values = {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}
    return gates.multiply_gates(state.params, groups, values), keep


def select(scores: Any, groups: Any, params: Params, plan: Plan) -> Any:
    """The units that fit, one of each group at least."""
    return structured.select_units(scores, groups, params, sparsity=1 - plan.keep, rule="rank", at_least=1).keep


def shrink(masked: Params, groups: tuple[UnitGroup, ...], keep: Any, *many: Rows) -> tuple[Params, list[Rows]]:
    """Smaller arrays, and rows without the input features that nobody reads."""
    small = structured.shrink(masked, groups, keep)
    if "inputs" not in keep:
        return small, list(many)
    features = jnp.asarray(np.flatnonzero(keep["inputs"]))
    taken = [dataclasses.replace(r, images=r.images.reshape(len(r.images), -1)[:, features]) for r in many]
    return small, taken


def report(network: Network, small: Params, masked: Params, sets: Any, small_sets: Any, dense_size: int) -> Any:
    """Figures of a shrunk network, and how far it is from the masked one before further training."""
    difference = network.apply(small, small_sets["test"].images[:1000]) - network.apply(
        masked, sets["test"].images[:1000]
    )
    size = count_weights(small)
    return {
        "architecture": architecture(network, small),
        "parameters": size,
        "weights_left_%": round(100 * size / dense_size, 2),
        "masked_and_shrunk_differ_by": float(jnp.abs(difference).max()),
    }


def count_weights(params: Params) -> int:
    return int(sum(leaf.size for leaf in jax.tree.leaves(params)))


def architecture(network: Network, params: Params) -> str:
    names = list(network.shapes)
    widths = [params[name]["kernel"].shape[-2] for name in names[:1] if network.takes_features]
    return "-".join(map(str, [*widths, *(params[name]["kernel"].shape[-1] for name in names[:-1])]))


def print_gates(log_alpha: Mapping[str, jax.Array], multipliers: Any) -> None:
    for name, values in log_alpha.items():
        shares = np.percentile(np.asarray(values), [0, 10, 25, 50, 75, 90, 100]).round(2)
        print(f"  log alpha of {name}: percentiles {shares.tolist()}")
    print(f"  multipliers { ({name: round(float(value), 3) for name, value in multipliers.items()}) }", flush=True)


def run(network: Network, images: Images, plan: Plan, *, held_out: int, seed: int) -> dict[str, Any]:
    """Trains the three networks; choices are made on the last `held_out` training rows, the test rows only reported."""
    sets = {
        "train": Rows(
            images=jnp.asarray(images.train_images[:-held_out]), labels=jnp.asarray(images.train_labels[:-held_out])
        ),
        "validation": Rows(
            images=jnp.asarray(images.train_images[-held_out:]), labels=jnp.asarray(images.train_labels[-held_out:])
        ),
        "test": Rows(images=jnp.asarray(images.test_images), labels=jnp.asarray(images.test_labels)),
    }
    keys = jax.random.split(jax.random.key(seed), 6)
    start = network.init(keys[0])
    groups = gates.layer_units(start, network.kernels, inputs=network.takes_features)
    dense_size = count_weights(start)

    print("dense", flush=True)
    dense = train(
        network, start, sets["train"], plan, plan.epochs, key=keys[1], weight_decay=plan.dense_weight_decay
    ).params
    figures: dict[str, Any] = {
        "dense": {"architecture": architecture(network, start), "parameters": dense_size, "weights_left_%": 100.0}
    }
    scores = {"dense": {name: accuracy(network, dense, rows) for name, rows in sets.items()}}
    if plan.distilled:
        sets["train"] = dataclasses.replace(sets["train"], teacher=logits(network, dense, sets["train"]))
    methods = (("gates", with_gates, keys[2], keys[3]), ("norm", by_norm, keys[4], keys[5]))
    for name, method, first, second in methods:
        print(name, flush=True)
        masked, keep = method(network, start, sets["train"], plan, groups, key=first)
        small, many = shrink(masked, groups, keep, *sets.values())
        small_sets = dict(zip(sets, many, strict=True))
        figures[name] = report(network, small, masked, sets, small_sets, dense_size)
        before = accuracy(network, small, small_sets["validation"])
        small = train(network, small, small_sets["train"], plan, plan.epochs - plan.gate_epochs, key=second).params
        scores[name] = {part: accuracy(network, small, rows) for part, rows in small_sets.items()}
        figures[name]["validation_before_fine_tuning"] = round(before, 2)
    for name, score in scores.items():
        figures[name] |= {part: round(value, 2) for part, value in score.items()}
    return figures


def print_table(results: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"{'':28}{'method':8}{'architecture':>16}{'weights left':>14}{'validation':>12}{'test':>8}{'error':>8}")
    for title, figures in results.items():
        for method, row in figures.items():
            print(
                f"{title:28}{method:8}{row['architecture']:>16}{row['weights_left_%']:>13.1f}%"
                f"{row['validation']:>12.2f}{row['test']:>8.2f}{100 - row['test']:>8.2f}"
            )
            title = ""


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Test errors by method, and the share of every layer's units that the gates keep, as a PNG file."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    colors = {"dense": "#8c96a3", "gates": "#0b7a75", "norm": "#d1495b"}
    figure, (errors, widths) = plt.subplots(1, 2, figsize=(10, 1.2 + 1.1 * len(results)), layout="constrained")
    for place, (title, figures) in enumerate(results.items()):
        for shift, (method, color) in enumerate(colors.items()):
            row = figures[method]
            label = f"{100 - row['test']:.1f} %  ({row['architecture']}, {row['weights_left_%']:.0f} %)"
            bar = errors.barh(place + 0.27 * (shift - 1), 100 - row["test"], height=0.25, color=color)
            errors.bar_label(bar, [label], fontsize=7, padding=3)
        names = NETWORKS[title.split()[0]].units
        kept = [int(n) for n in figures["gates"]["architecture"].split("-")]
        full = [int(n) for n in figures["dense"]["architecture"].split("-")]
        for layer, (name, some, all_) in enumerate(zip(names, kept, full, strict=True)):
            spot = place + 0.8 * ((layer + 0.5) / len(names) - 0.5)
            bar = widths.barh(spot, 100 * some / all_, height=0.7 / len(names), color=colors["gates"])
            widths.bar_label(bar, [f"{name}: {some} of {all_}"], fontsize=7, padding=3)
    for axes, title in ((errors, "test error (architecture, weights left)"), (widths, "units that the gates keep, %")):
        axes.set_yticks(range(len(results)), [title.replace(" ", "\n") for title in results], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.6 * axes.get_xlim()[1])
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    errors.legend(handles=[mpl.patches.Patch(color=color, label=name) for name, color in colors.items()], fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plan_of(arguments: argparse.Namespace, model: str, images: str) -> Plan:
    plan = PLANS[model, images]
    if arguments.quick:
        plan = dataclasses.replace(plan, epochs=4, gate_epochs=2)
    if arguments.epochs:
        plan = dataclasses.replace(plan, epochs=arguments.epochs, gate_epochs=arguments.epochs // 2)
    return plan if arguments.keep is None else dataclasses.replace(plan, keep=arguments.keep)


def read_images(arguments: argparse.Namespace, name: str) -> tuple[Images, int]:
    """The images, and how many of the training rows are held out."""
    if name == "fashion-mnist":
        images, held_out = fashion_mnist(arguments.fashion_mnist, note=print), 5000
    else:
        images, held_out = mnist_5k(arguments.mnist_5k, note=print), 500
    if arguments.quick:
        rows = slice(-QUICK_ROWS - held_out, None)
        images = dataclasses.replace(
            images, train_images=images.train_images[rows], train_labels=images.train_labels[rows]
        )
    return images, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NETWORKS, help="one of the two networks; both by default")
    parser.add_argument("--images", choices=["fashion-mnist", "mnist-5k"], help="one of the two sets; both by default")
    parser.add_argument("--fashion-mnist", type=Path, help="directory of its four files; fetched by default")
    parser.add_argument("--mnist-5k", type=Path, help="the file mnist_5k.csv.gz; fetched by default")
    parser.add_argument("--keep", type=float, help="share of the weights that is left")
    parser.add_argument("--epochs", type=int, help="of every network, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="a PNG file of the result (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="2,000 training rows and 4 epochs")
    arguments = parser.parse_args()
    results = {}
    for model, name in PLANS:
        if arguments.model in (None, model) and arguments.images in (None, name):
            images, held_out = read_images(arguments, name)
            plan = plan_of(arguments, model, name)
            print(model, name, plan)
            results[f"{model} {name}"] = run(NETWORKS[model], images, plan, held_out=held_out, seed=arguments.seed)
    print_table(results)
    if arguments.plot:
        draw(results, arguments.plot)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
