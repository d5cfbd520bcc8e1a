"""Random models that re-arrange a weight before it meets its input: are its statistics those of its own order?

Each case splits, merges, transposes, slices, reverses, pads, rolls, permutes, scales, masks and repeats a leaf, and
then multiplies it with inputs: plainly, in parts, in several places, in scans (also nested) over some of its axes, by a
traced index, or in branches. The reference is brute force in float64 NumPy: every entry of the leaf is perturbed alone,
and what the outputs do says which row meets which input. The library must give that Gram matrix, for every output, or
refuse the leaf by name.

    python examples/benchmarks/random_chains.py [--quick] [--cases N] [--seed N]

`wrong` in the last line must be 0; `refused` counts the reasons.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import calibration, trace

Move = Callable[[Any, Any], Any]
"""`(numpy or jax.numpy, array) -> array`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with one leaf, linear in it.

    Attributes:
        apply: `(numpy or jax.numpy, leaf, inputs) -> list of outputs`.
        leaf: the weight.
        inputs: what it meets.
        story: what happens, in words.
        uneven: whether outputs get multiples of their own, so that Gram matrices are equal up to a factor,
            or their mean is the one.
    """

    apply: Callable[[Any, Any, Any], list[Any]]
    leaf: np.ndarray
    inputs: tuple[np.ndarray, ...]
    story: str
    uneven: bool


def make_case(seed: int) -> Case:
    """A random case."""
    return _Maker(np.random.default_rng(seed)).case()


class _Maker:
    """Draws models."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.story: list[str] = []
        self.uneven = False
        self.inputs: list[np.ndarray] = []

    def case(self) -> Case:
        shape = tuple(int(n) for n in self.rng.choice([2, 3, 4, 6, 8], size=self.rng.integers(2, 5)))
        while math.prod(shape) > 192:
            shape = (*shape[1:-1], 2, 2)[-max(len(shape) - 1, 2) :]
        leaf = self.rng.normal(size=shape)
        self.story.append(f"leaf {shape}")
        kind = self.rng.choice(
            ["plain", "plain", "parts", "uses", "scan", "scan", "nested", "index", "cond", "stacked"]
        )
        self.story.append(str(kind))
        apply = getattr(self, f"_{kind}")(leaf)
        return Case(apply, leaf, tuple(self.inputs), " | ".join(self.story), self.uneven)

    def _input(self, *shape: int) -> int:
        self.inputs.append(self.rng.normal(size=shape))
        return len(self.inputs) - 1

    def _plain(self, leaf: np.ndarray) -> Callable[..., Any]:
        move = self.chain(leaf.shape)
        product = self.product(move(np, leaf).shape)
        return lambda xp, w, x: [product(xp, move(xp, w), x)]

    def _parts(self, leaf: np.ndarray) -> Callable[..., Any]:
        """Parts along one axis, each multiplied by itself with the same input, or with its own."""
        move = self.chain(leaf.shape, length=int(self.rng.integers(0, 3)))
        moved = move(np, leaf)
        axis = int(self.rng.integers(moved.ndim))
        cut = int(self.rng.integers(1, moved.shape[axis])) if moved.shape[axis] > 1 else 0
        if not cut:
            product = self.product(moved.shape)
            return lambda xp, w, x: [product(xp, move(xp, w), x)]
        self.story.append(f"split axis {axis} at {cut}")
        shapes = [
            tuple(n if k == axis else m for k, m in enumerate(moved.shape)) for n in (cut, moved.shape[axis] - cut)
        ]
        contracted = self.contracted(moved.ndim)
        shared = bool(self.rng.random() < 0.6) and axis not in contracted
        self.story.append("one input" if shared else "inputs of their own")
        if shared:
            first = self.product(shapes[0], contracted, batch=False)
            second = first
        else:
            first, second = self.product(shapes[0], contracted), self.product(shapes[1], contracted)

        def apply(xp: Any, w: Any, x: Any) -> list[Any]:
            one, two = xp.split(move(xp, w), [cut], axis=axis)
            return [first(xp, one, x), second(xp, two, x)]

        return apply

    def _uses(self, leaf: np.ndarray) -> Callable[..., Any]:
        """Two places, re-arranged in different ways."""
        one, two = self.chain(leaf.shape, length=2), self.chain(leaf.shape, length=2)
        first, second = self.product(one(np, leaf).shape), self.product(two(np, leaf).shape)
        return lambda xp, w, x: [first(xp, one(xp, w), x), second(xp, two(xp, w), x)]

    def _scan(self, leaf: np.ndarray) -> Callable[..., Any]:
        """Over the first axis, after a chain, with another chain inside."""
        move = self.chain(leaf.shape, rank=2)
        moved = move(np, leaf)
        inner = self.chain(moved.shape[1:], length=int(self.rng.integers(0, 3)))
        place = len(self.inputs)
        product = self.product(inner(np, moved[0]).shape, steps=moved.shape[0])
        reverse = bool(self.rng.random() < 0.3)

        def apply(xp: Any, w: Any, x: Any) -> list[Any]:
            def body(layer: Any, rows: Any) -> Any:
                return product(xp, inner(xp, layer), {place: rows})

            return [_scanned(xp, body, (move(xp, w), x[place]), reverse)]

        return apply

    def _nested(self, leaf: np.ndarray) -> Callable[..., Any]:
        """Two scans, one inside the other."""
        move = self.chain(leaf.shape, length=2, rank=3)
        moved = move(np, leaf)
        if moved.ndim < 3:
            product = self.product(moved.shape)
            return lambda xp, w, x: [product(xp, move(xp, w), x)]
        place = len(self.inputs)
        product = self.product(moved.shape[2:], steps=moved.shape[0])
        self.inputs[place] = np.broadcast_to(
            self.inputs[place][:, None], (moved.shape[0], moved.shape[1], *self.inputs[place].shape[1:])
        ) * self.rng.normal(size=(moved.shape[0], moved.shape[1], *(1,) * (self.inputs[place].ndim - 1)))

        def apply(xp: Any, w: Any, x: Any) -> list[Any]:
            def layer(own: Any, rows: Any) -> Any:
                return product(xp, own, {place: rows})

            def stage(layers: Any, rows: Any) -> Any:
                return _scanned(xp, layer, (layers, rows), False)

            return [_scanned(xp, stage, (move(xp, w), x[place]), False)]

        return apply

    def _index(self, leaf: np.ndarray) -> Callable[..., Any]:
        """Entries along an axis by a traced index."""
        move = self.chain(leaf.shape, rank=2)
        moved = move(np, leaf)
        axis = int(self.rng.integers(moved.ndim))
        rest = tuple(n for k, n in enumerate(moved.shape) if k != axis)
        place = len(self.inputs)
        product = self.product(rest, steps=moved.shape[axis])
        order = self.rng.permutation(moved.shape[axis])
        self.story.append(f"index axis {axis}")

        def apply(xp: Any, w: Any, x: Any) -> list[Any]:
            own = move(xp, w)

            def body(at: Any, rows: Any) -> Any:
                entry = own.take(at, axis=axis) if xp is np else jax.lax.dynamic_index_in_dim(own, at, axis, False)
                return product(xp, entry, {place: rows})

            return [_scanned(xp, body, (xp.asarray(order), x[place]), False)]

        return apply

    def _cond(self, leaf: np.ndarray) -> Callable[..., Any]:
        """One branch of two, each with a chain of its own; the other one is never taken."""
        one, two = self.chain(leaf.shape, length=2), self.chain(leaf.shape, length=2)
        shape = one(np, leaf).shape
        contracted = self.contracted(len(shape))
        first = self.product(shape, contracted)
        taken = bool(self.rng.random() < 0.5)
        same = two(np, leaf).shape == shape
        self.story.append(f"{'first' if taken else 'second'} branch taken")

        def apply(xp: Any, w: Any, x: Any) -> list[Any]:
            def other(w: Any) -> Any:
                return first(xp, two(xp, w) if same else one(xp, w) * 1, x)

            if xp is np:
                return [first(np, one(np, w), x) if taken else other(w)]
            chosen = (x[0] ** 2).sum() >= 0 if taken else (x[0] ** 2).sum() < 0
            return [jax.lax.cond(chosen, lambda w: first(xp, one(xp, w), x), other, w)]

        return apply

    def _stacked(self, leaf: np.ndarray) -> Callable[..., Any]:
        """Its entries, taken apart and stacked again, then scanned or multiplied as they are."""
        order = [int(k) for k in self.rng.permutation(leaf.shape[0])]
        place = len(self.inputs)
        product = self.product(leaf.shape[1:], steps=leaf.shape[0])
        self.story.append(f"stacked {order}")

        def apply(xp: Any, w: Any, x: Any) -> list[Any]:
            layers = xp.stack([w[k] for k in order])
            return [_scanned(xp, lambda own, rows: product(xp, own, {place: rows}), (layers, x[place]), False)]

        return apply

    def contracted(self, rank: int) -> list[int]:
        """Some axes to sum over."""
        count = 1 if rank < 3 or self.rng.random() < 0.6 else 2
        return sorted(int(axis) for axis in self.rng.choice(rank, size=min(count, rank), replace=False))

    def product(
        self,
        shape: tuple[int, ...],
        contracted: list[int] | None = None,
        batch: bool = True,
        steps: int | None = None,
    ) -> Callable[..., Any]:
        """A matmul with inputs, over some axes of a value, perhaps with batch axes."""
        contracted = self.contracted(len(shape)) if contracted is None else contracted
        batched = [
            k
            for k in range(len(shape))
            if k not in contracted and batch and len(shape) > 2 and self.rng.random() < 0.25
        ]
        letters = "abcdefgh"[: len(shape)]
        order = [letters[k] for k in (*contracted, *batched)]
        self.rng.shuffle(order)
        own, sizes = "n" + "".join(order), dict(zip(letters, shape, strict=True))
        out = "n" + "".join(letters[k] for k in range(len(shape)) if k not in contracted)
        rows = (*((steps,) if steps else ()), 3, *(sizes[letter] for letter in order))
        place = self._input(*rows)
        swap = self.rng.random() < 0.3
        rule = f"{letters},{own}->{out}" if swap else f"{own},{letters}->{out}"
        self.story.append(rule)

        def apply(xp: Any, value: Any, x: Any) -> Any:
            return xp.einsum(rule, *((value, x[place]) if swap else (x[place], value)))

        return apply

    def chain(self, shape: tuple[int, ...], length: int | None = None, rank: int = 1) -> Move:
        """Some moves in a row."""
        moves: list[Move] = []
        for _ in range(self.rng.integers(0, 6) if length is None else length):
            move, name = self.move(shape)
            after = move(np, np.zeros(shape)).shape
            if not after or len(after) < rank or math.prod(after) > 256 or 0 in after:
                continue
            moves.append(move)
            self.story.append(f"{name} {after}")
            shape = after

        def apply(xp: Any, value: Any) -> Any:
            for move in moves:
                value = move(xp, value)
            return value

        return apply

    def move(self, shape: tuple[int, ...]) -> tuple[Move, str]:
        """One move."""
        rng, rank = self.rng, len(shape)
        axis = int(rng.integers(rank))
        n = shape[axis]
        kinds = ["split", "split", "merge", "merge", "transpose", "transpose", "slice", "reverse", "pad", "roll"]
        kinds += ["permute", "scalar", "scale", "negate", "mask", "add", "join", "repeat", "unit", "regroup"]
        kind = str(rng.choice(kinds))
        if kind == "split":
            sizes = [d for d in range(2, n) if n % d == 0]
            if not sizes:
                return (lambda xp, v: v), "nothing"
            d = int(rng.choice(sizes))
            return (lambda xp, v: v.reshape(*shape[:axis], d, n // d, *shape[axis + 1 :])), "split"
        if kind == "merge" and rank > 1:
            at = int(rng.integers(rank - 1))
            return (lambda xp, v: v.reshape(*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])), "merge"
        if kind == "regroup" and rank > 1:
            flat = math.prod(shape)
            d = int(rng.choice([d for d in range(1, flat + 1) if flat % d == 0]))
            return (lambda xp, v: v.reshape(d, flat // d)), "regroup"
        if kind == "transpose":
            order = [int(k) for k in rng.permutation(rank)]
            return (lambda xp, v: v.transpose(order)), "transpose"
        if kind == "slice" and n > 1:
            low, step = int(rng.integers(n - 1)), int(rng.integers(1, 3))
            high = int(rng.integers(low + 1, n + 1))
            index = (slice(None),) * axis + (slice(low, high, step),)
            return (lambda xp, v: v[index]), "slice"
        if kind == "reverse":
            return (lambda xp, v: xp.flip(v, axis)), "reverse"
        if kind == "pad":
            widths = [(int(rng.integers(2)), int(rng.integers(2))) if k == axis else (0, 0) for k in range(rank)]
            return (lambda xp, v: xp.pad(v, widths)), "pad"
        if kind == "roll":
            by = int(rng.integers(n))
            return (lambda xp, v: xp.roll(v, by, axis)), "roll"
        if kind == "permute":
            order = rng.permutation(n)
            return (lambda xp, v: xp.take(v, order, axis=axis)), "permute"
        if kind == "scalar":
            factor = float(rng.normal())
            return (lambda xp, v: v * factor), "scalar"
        if kind == "scale":
            self.uneven = True
            factors = rng.uniform(0.5, 2, size=[m if k == axis else 1 for k, m in enumerate(shape)])
            if rng.random() < 0.5:
                return (lambda xp, v: v / xp.asarray(factors, v.dtype)), "divide"
            return (lambda xp, v: v * xp.asarray(factors, v.dtype)), "scale"
        if kind == "negate":
            return (lambda xp, v: -v), "negate"
        if kind == "mask":
            self.uneven = True
            mask = rng.random(size=[m if k == axis else 1 for k, m in enumerate(shape)]) < 0.7
            return (lambda xp, v: xp.where(xp.asarray(mask), v, xp.zeros((), v.dtype))), "mask"
        if kind == "add":
            more = rng.normal(size=shape)
            return (lambda xp, v: v + xp.asarray(more, v.dtype) - xp.asarray(more, v.dtype)), "add"
        if kind == "join":
            cut = n // 2
            one, two = (slice(None),) * axis + (slice(cut, None),), (slice(None),) * axis + (slice(0, cut),)
            return (lambda xp, v: xp.concatenate([v[one], v[two]], axis=axis)), "join"
        if kind == "repeat":
            self.uneven = True
            return (lambda xp, v: xp.repeat(v, 2, axis=axis)), "repeat"
        return (lambda xp, v: xp.expand_dims(v, axis)), "unit"


def _scanned(xp: Any, body: Callable[..., Any], stacks: tuple[Any, ...], reverse: bool) -> Any:
    """What a scan over the first axes of arrays collects."""
    if xp is np:
        return np.stack([body(*(stack[k] for stack in stacks)) for k in range(len(stacks[0]))])
    return jax.lax.scan(lambda _, sliced: (None, body(*sliced)), None, stacks, reverse=reverse)[1]


def derivative(case: Case) -> np.ndarray:
    """(outputs, entries of the leaf): what each output changes by where one entry alone changes, in float64."""
    at_zero = np.concatenate([y.reshape(-1) for y in case.apply(np, np.zeros(case.leaf.shape), case.inputs)])
    columns = []
    for k in range(case.leaf.size):
        unit = np.zeros(case.leaf.size)
        unit[k] = 1
        made = case.apply(np, unit.reshape(case.leaf.shape), case.inputs)
        columns.append(np.concatenate([y.reshape(-1) for y in made]) - at_zero)
    return np.stack(columns, axis=1)


def verdict(case: Case, layout: trace.LeafLayout, found: Any) -> str:
    """Whether statistics are those of the case: "equal", or what is wrong."""
    axes = layout.stack_axes, layout.input_axes, layout.output_axes
    sizes = [math.prod(case.leaf.shape[axis] for axis in part) for part in axes]
    rows = derivative(case).reshape(-1, *case.leaf.shape)
    rows = rows.transpose(0, *(1 + axis for part in axes for axis in part)).reshape(-1, *sizes)
    made = (np.abs(rows) > 1e-9).any(axis=2).reshape(len(rows), -1)
    if (made.sum(axis=1) > 1).any():
        return "wrong: a number that the model writes is of several outputs"
    grams = np.einsum("nsdo,nseo->sode", rows, rows)
    given = np.asarray(found.gram, np.float64).reshape(sizes[0], sizes[1], sizes[1])
    for entry in range(sizes[0]):
        used = [gram for gram in grams[entry] if np.abs(gram).max() > 1e-9]
        masked = " mask " in case.story
        if not used and not masked and np.abs(given[entry]).max() > 1e-6:
            return "wrong: rows of an entry that no output uses"
        seen = np.any([np.diagonal(gram) > 1e-9 for gram in used], axis=0) if used else np.zeros(sizes[1], bool)
        if not masked and np.abs(given[entry][~seen]).max(initial=0) > 1e-6:
            return "wrong: inputs that no output uses"
        # Outputs that the model multiplies by numbers of their own, or masks: the mean of their Gram matrices.
        if used and case.uneven and any(_close(np.mean(own, axis=0), given[entry]) for own in (used, grams[entry])):
            continue
        for gram in used:
            # A mask may hide inputs from some outputs only: the Gram matrix is that of all inputs.
            own = np.diagonal(gram) > 1e-9 if masked else np.ones(sizes[1], bool)
            gram, stored = gram[np.ix_(own, own)], given[entry][np.ix_(own, own)]
            scale = (gram * stored).sum() / max((stored**2).sum(), 1e-30) if case.uneven else 1.0
            if not _close(gram, scale * stored):
                return "wrong: another Gram matrix"
    return "equal"


def _close(wanted: np.ndarray, found: np.ndarray) -> bool:
    return np.allclose(wanted, found, rtol=1e-3, atol=1e-3 * np.abs(wanted).max(initial=0))


def run(seeds: list[int]) -> list[tuple[int, str, str]]:
    """(seed, verdict, story) of cases, traced and compiled together."""
    cases = {f"case{seed}": make_case(seed) for seed in seeds}
    params = {name: jnp.asarray(case.leaf, jnp.float32) for name, case in cases.items()}
    inputs = {name: tuple(jnp.asarray(x, jnp.float32) for x in case.inputs) for name, case in cases.items()}

    def apply(params: Any, inputs: Any) -> Any:
        return {name: case.apply(jnp, params[name], inputs[name]) for name, case in cases.items()}

    layouts = trace.layouts(apply, params, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", trace.LeftOutWarning)
        try:
            found = calibration.input_statistics(apply, params, [(inputs,)], statistics=("gram",))
        except ValueError as err:
            # Nothing of a small batch is left.
            found, caught = {}, [err]
    told = dict(re.findall(r"'(case\d+)': (.*)", "\n".join(str(getattr(w, "message", w)) for w in caught)))
    results = []
    for seed, (name, case) in zip(seeds, cases.items(), strict=True):
        if isinstance(found.get(name), calibration.InputStatistics):
            results.append((seed, verdict(case, layouts[name], found[name]), case.story))
            continue
        reason = told.get(name) or layouts[name].reason
        results.append((seed, f"refused: {reason}" if reason else "wrong: left out without a word", case.story))
    return results


def main() -> None:
    """Runs cases, and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = 60 if options.quick else options.cases
    results = []
    for start in range(0, count, 20):
        results += run([options.seed + k for k in range(start, min(start + 20, count))])
        print(f"{len(results)} of {count}", flush=True)
    for seed, what, story in results:
        if what.startswith("wrong"):
            print(f"seed {seed}: {what}: {story}")
    kinds = collections.Counter(what.split(":")[0] for _, what, _ in results)
    reasons = collections.Counter(re.sub(r"[\d\[\](), ]+", " ", what) for _, what, _ in results if "refused" in what)
    figures = {name: kinds.get(name, 0) for name in ("equal", "refused", "wrong")}
    print(json.dumps({**figures, "cases": count, "reasons": dict(reasons.most_common())}))


if __name__ == "__main__":
    main()
