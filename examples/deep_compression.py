"""Deep Compression of a LeNet: prune, share values, entropy-code, and count the bytes of the file.

A dense network is trained; its weights are pruned by global rank while it learns from its dense self; what is left gets
a few values by k-means, which are trained on; and codes, tables and manifest are written entropy-coded. The file is
read again, and its error is that of the model that came back. Beside it, a dense control: the dense network after as
many extra epochs on labels. Where a plan shifts images, those of the control are shifted too, and it teaches as well.

Settings were chosen with `--validate`, which holds out training rows; without it the test rows are reported.

    python examples/deep_compression.py [--model lenet-300-100] [--images fashion-mnist] [--quick] [--plot FILE]

The images are fetched once (see `workbench.fashion_mnist`); the last line printed is JSON.
"""

import argparse
import dataclasses
import functools
import heapq
import json
import lzma
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lenets import NETWORKS, Network
from workbench import Images, disk_bytes, fashion_mnist, mnist_5k

import jaxcompress as jc
from jaxcompress import checkpoint, pruning
from jaxcompress.clustering import CodebookSpec, trained_codebooks
from jaxcompress.distillation import hard_labels, make_train_step, soft_targets
from jaxcompress.report import size_report
from jaxcompress.schedules import cubic
from jaxcompress.tree import by_path, leaves_with_paths

Params = dict[str, dict[str, Any]]
BATCH = 128
DENSE_EPOCHS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What differs between networks and data sets; chosen on rows held out from training.

    Attributes:
        sparsity: of all kernels together.
        prune_epochs: of gradual pruning; the last two fifths at the final masks.
        cluster_epochs: of training shared values.
        rate: largest learning rate while pruning.
        decay: weight decay while pruning.
        cost: `CodebookSpec.rate`, what a bit costs.
        values: of a kernel, 0 included.
        last_values: of the last kernel, whose few weights matter most.
        temperature: of distillation.
        cluster_rate: largest learning rate of weights while they share values: they are assigned anew until seven
            tenths of the epochs have passed. 0: only tables are trained.
        table_rate: learning rate of tables at the start.
        shift: after the dense training, shift every image by up to a pixel whenever it is seen, and learn from the mean
            of the dense network and the control, which see the image as shifted.
    """

    sparsity: float
    prune_epochs: int
    cluster_epochs: int
    rate: float = 4e-3
    decay: float = 0.1
    cost: float = 0.001
    values: int = 8
    last_values: int = 8
    temperature: float = 2.0
    cluster_rate: float = 0.0
    table_rate: float = 2e-4
    shift: bool = False


PLANS = {
    ("lenet-300-100", "fashion-mnist"): Plan(
        sparsity=0.948,
        prune_epochs=100,
        cluster_epochs=30,
        decay=0.05,
        last_values=16,
        cluster_rate=2e-4,
        table_rate=1e-3,
        shift=True,
    ),
    ("lenet-300-100", "mnist-5k"): Plan(sparsity=0.98, prune_epochs=100, cluster_epochs=40, decay=0.5, cost=0.002),
    ("lenet-5", "fashion-mnist"): Plan(sparsity=0.96, prune_epochs=12, cluster_epochs=2),
    ("lenet-5", "mnist-5k"): Plan(sparsity=0.985, prune_epochs=40, cluster_epochs=10, decay=0.5),
}


def main() -> None:
    arguments = parse()
    images = {"fashion-mnist": fashion_mnist, "mnist-5k": mnist_5k}[arguments.images](arguments.data)
    plan = PLANS[arguments.model, arguments.images]
    if arguments.quick:
        plan = dataclasses.replace(plan, prune_epochs=3, cluster_epochs=1)
    rows = split(images, validate=arguments.validate, quick=arguments.quick)
    results = run(NETWORKS[arguments.model], rows, plan, seed=arguments.seed, quick=arguments.quick)
    print(table(results))
    if arguments.plot:
        plot(results, f"{arguments.model}, {arguments.images}", arguments.plot)
    of = "validation" if arguments.validate else "test"
    print(json.dumps({"model": arguments.model, "images": arguments.images, "of": of, **results}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("lenet-300-100", "lenet-5"), default="lenet-300-100")
    parser.add_argument("--images", choices=("fashion-mnist", "mnist-5k"), default="fashion-mnist")
    parser.add_argument("--data", type=Path, help="where the images are; fetched by default")
    parser.add_argument("--quick", action="store_true", help="2,000 images and few epochs")
    parser.add_argument("--validate", action="store_true", help="report training rows that are held out instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def split(images: Images, *, validate: bool, quick: bool) -> dict[str, dict[str, jax.Array]]:
    """Rows to train on and rows to report."""
    held = len(images.train_labels) // (4 if len(images.train_labels) < 10000 else 12)
    count = 2000 if quick else len(images.train_labels) - held if validate else len(images.train_labels)
    x, y = (images.train_images, images.train_labels) if validate else (images.test_images, images.test_labels)
    reported = (x[-held:], y[-held:]) if validate else (x, y)
    pairs = {"train": (images.train_images[:count], images.train_labels[:count]), "held": reported}
    return {name: {"x": jnp.asarray(x), "labels": jnp.asarray(y)} for name, (x, y) in pairs.items()}


def run(network: Network, rows: Any, plan: Plan, *, seed: int, quick: bool) -> dict[str, Any]:
    """All stages."""
    epochs = 2 if quick else DENSE_EPOCHS
    keys = jax.random.split(jax.random.key(seed), 5)
    train = functools.partial(train_epochs, network, rows["train"])
    dense = train(network.init(keys[0]), epochs, key=keys[1], rate=2e-3, decay=0.05).params
    train = functools.partial(train, shift=plan.shift)
    control = train(dense, plan.prune_epochs + plan.cluster_epochs, key=keys[2], rate=2e-3, decay=0.05).params
    train = functools.partial(
        train, teachers=(dense, control) if plan.shift else (dense,), temperature=plan.temperature
    )
    per_epoch = len(rows["train"]["labels"]) // BATCH
    pruned = prune(train, dense, plan, per_epoch, key=keys[3])
    shared = share_values(train, pruned, plan, per_epoch, key=keys[4])
    restored, size = through_the_file(shared)
    stages = {
        "dense": (dense, dense_bytes(dense)),
        "control": (control, dense_bytes(control)),
        "pruned": (pruned, through_the_file(pruned)[1]),
        "shared values": (shared, size_report(shared).total.stored_bytes),
        "entropy-coded": (restored, size),
    }
    whole = dense_bytes(dense)
    return {
        "stages": {
            name: {"bytes": count, "times": round(whole / count, 1), "error": error(network, tree, rows["held"])}
            for name, (tree, count) in stages.items()
        },
        **compare_coders(shared, size),
    }


def prune(train: Any, params: Params, plan: Plan, per_epoch: int, *, key: jax.Array) -> Params:
    """Gradual pruning by global rank, distilled."""
    steps = plan.prune_epochs * per_epoch
    transform = pruning.gradual(
        schedule=cubic(0.3, plan.sparsity, begin=0, end=int(0.6 * steps)),
        every=max(per_epoch // 8, 1),
        scope="global",
        store="dense",
    )
    state = train(params, plan.prune_epochs, transform=transform, rate=plan.rate, decay=plan.decay, key=key)
    return transform.finalize(state.params, state.transform_state)


def share_values(train: Any, params: Params, plan: Plan, per_epoch: int, *, key: jax.Array) -> Params:
    """k-means of what is left, then training of the tables, and of the weights where the plan has a rate for them."""
    steps = plan.cluster_epochs * per_epoch
    kernels = CodebookSpec(values=plan.values, rate=plan.cost, dtype="bfloat16")
    last = dataclasses.replace(kernels, values=plan.last_values)
    biases = CodebookSpec(values=16, zero=False, dtype="bfloat16")
    until = int(0.7 * steps) if plan.cluster_rate else 0
    train_codebooks = functools.partial(trained_codebooks, every=max(per_epoch // 8, 1), until=until)
    transform = jc.chain(
        train_codebooks(kernels, select=by_path("(?!last/).*/kernel")),
        train_codebooks(last, select=by_path("last/kernel")),
        trained_codebooks(biases, select=by_path(".*/bias")),
    )
    state = train(
        params,
        plan.cluster_epochs,
        transform=transform,
        # The gradient of a value sums those of thousands of weights: rates that weights bear would shake it.
        transform_optimizer=optax.adam(optax.cosine_decay_schedule(plan.table_rate, steps)),
        rate=plan.cluster_rate,
        masks=jax.tree.map(lambda leaf: leaf != 0, params),
        key=key,
    )
    return transform.finalize(state.params, state.transform_state)


def through_the_file(params: Params) -> tuple[Params, int]:
    """What comes back from an entropy-coded checkpoint, bit for bit, and the bytes of all its files."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        checkpoint.save(path, params, storage="entropy")
        restored, _ = checkpoint.restore(path)
        size = disk_bytes(path)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(x, y)
    return restored, size


def compare_coders(shared: Params, size: int) -> dict[str, Any]:
    """The file against the entropy of what it stores, and against what other coders make of the same codes."""
    codes = [(np.asarray(leaf.codes()), leaf.bits) for _, leaf in leaves_with_paths(shared)]
    tables = sum(leaf.table.size * leaf.table.dtype.itemsize for _, leaf in leaves_with_paths(shared))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    as_bytes = b"".join(array.tobytes() for array, _ in codes)
    found = {
        "entropy of codes, and tables": sum(entropy_bytes(array) for array, _ in codes) + tables,
        "gaps and values by Huffman, and tables": tables + sum(huffman_bytes(array) for array, _ in codes),
        "codes as bytes through xz, and tables": tables + len(lzma.compress(as_bytes, lzma.FORMAT_XZ, filters=filters)),
    }
    return {"coders": {name: round(count) for name, count in found.items()} | {"the file": size}}


def entropy_bytes(codes: np.ndarray) -> float:
    shares = np.bincount(codes.ravel()) / codes.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum() * codes.size / 8)


def huffman_bytes(codes: np.ndarray) -> float:
    """The gaps between codes that are not the most frequent one, and those codes, each by an optimal prefix code.

    Half a byte is added for the length of each symbol's code. Gaps are cut at 255, as in Deep Compression.
    """
    flat = codes.ravel()
    common = int(np.bincount(flat).argmax())
    places = np.flatnonzero(flat != common)
    gaps = np.diff(places, prepend=-1) - 1
    fillers = int((gaps // 256).sum())
    gaps = np.concatenate([gaps % 256, np.full(fillers, 255)])
    values = np.concatenate([flat[places], np.full(fillers, common)])
    return sum(prefix_code_bits(symbols) / 8 + len(np.bincount(symbols)) / 2 for symbols in (gaps, values))


def prefix_code_bits(symbols: np.ndarray) -> int:
    """Of a Huffman code: the sum of what is merged on the way to one tree."""
    counts = [int(count) for count in np.bincount(symbols) if count]
    if len(counts) == 1:
        return counts[0]
    heapq.heapify(counts)
    bits = 0
    while len(counts) > 1:
        merged = heapq.heappop(counts) + heapq.heappop(counts)
        heapq.heappush(counts, merged)
        bits += merged
    return bits


def train_epochs(
    network: Network,
    rows: Mapping[str, jax.Array],
    params: Params,
    epochs: int,
    *,
    key: jax.Array,
    rate: float,
    decay: float = 0.0,
    teachers: Sequence[Params] = (),
    temperature: float = 2.0,
    shift: bool = False,
    masks: Params | None = None,
    transform: Any = None,
    transform_optimizer: Any = None,
) -> Any:
    """The train state after so many epochs. With teachers, their mean logits count nine times as much as labels."""
    per_epoch = len(rows["labels"]) // BATCH
    schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, rate, per_epoch // 2, epochs * per_epoch)
    weights = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    optimizer = optax.adamw(schedule, weight_decay=decay, mask=weights)
    losses: dict[str, Any] = {"labels": hard_labels()}
    if teachers:
        losses = {"labels": (0.1, hard_labels()), "soft": (0.9, soft_targets(temperature=temperature))}
    init_state, step = make_train_step(
        lambda tree, batch, *, key, train: {"logits": network.apply(tree, batch["x"])},
        lambda trees, batch, *, key, train: {"logits": mean_logits(network, trees, batch["x"])} if trees else {},
        optimizer if masks is None else optax.chain(optimizer, pruning.sparse_updates(masks)),
        losses=losses,
        transform=jc.identity() if transform is None else transform,
        transform_optimizer=transform_optimizer,
    )
    epoch = jax.jit(functools.partial(one_epoch, step, shift=shift), donate_argnums=0)
    key, own = jax.random.split(key)
    state = init_state(params, key=own)
    for number in range(epochs):
        begun = time.perf_counter()
        state, found = epoch(state, tuple(teachers), dict(rows), jax.random.fold_in(key, number))
        loss = float(found.mean())
        print(f"  epoch {number + 1}/{epochs}: loss {loss:.4f}, {time.perf_counter() - begun:.1f} s", flush=True)
    return state


def one_epoch(step: Any, state: Any, teachers: Any, rows: Any, key: jax.Array, *, shift: bool) -> tuple[Any, jax.Array]:
    """The train state after each row was seen once, in random order, and the losses: a scan over batches."""
    count = len(rows["labels"]) // BATCH
    order = jax.random.permutation(key, len(rows["labels"]))[: count * BATCH].reshape(count, BATCH)

    def visit(state: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        places, own = at
        batch = jax.tree.map(lambda column: column[places], rows)
        if shift:
            batch["x"] = shifted(batch["x"], own)
        state, figures = step(state, teachers, batch)
        return state, figures["loss"][0]

    return jax.lax.scan(visit, state, (order, jax.random.split(jax.random.fold_in(key, 0), count)))


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image shifted by -1, 0 or 1 pixel along either axis; what comes in is 0."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, images.shape[1:]))(padded, corners)


def mean_logits(network: Network, trees: Sequence[Params], images: jax.Array) -> jax.Array:
    return jnp.stack([network.apply(tree, images) for tree in trees]).mean(axis=0)


def outputs(network: Network, params: Params, rows: Mapping[str, jax.Array]) -> jax.Array:
    apply = jax.jit(jc.execute(network.apply))
    return jnp.concatenate([apply(params, rows["x"][at : at + 1000]) for at in range(0, len(rows["x"]), 1000)])


def error(network: Network, params: Params, rows: Mapping[str, jax.Array]) -> float:
    """Percent of the rows that are wrong."""
    return round(100 * float((outputs(network, params, rows).argmax(axis=1) != rows["labels"]).mean()), 2)


def dense_bytes(params: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def table(results: Mapping[str, Any]) -> str:
    lines = [f"{'stage':16}{'bytes':>12}{'times smaller':>15}{'error %':>9}"]
    lines += [
        f"{name:16}{row['bytes']:12,}{row['times']:15.1f}{row['error']:9.2f}" for name, row in results["stages"].items()
    ]
    lines += ["", *(f"{name:40}{count:10,} bytes" for name, count in results["coders"].items())]
    return "\n".join(lines)


def plot(results: Mapping[str, Any], title: str, path: Path) -> None:
    """Bytes after each stage, with the error above each bar."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    stages = {name: row for name, row in results["stages"].items() if name != "control"}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    bars = axes.bar(list(stages), [row["bytes"] for row in stages.values()], color="#0b7a75")
    for bar, row in zip(bars, stages.values(), strict=True):
        text = f"{row['times']:.0f}x\n{row['error']:.2f} % error"
        axes.annotate(text, (bar.get_x() + bar.get_width() / 2, bar.get_height()), ha="center", va="bottom")
    axes.set(yscale="log", ylabel="bytes", title=f"Deep Compression: {title}", ylim=(1e3, 1e7))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
