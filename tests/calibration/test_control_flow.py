"""Kernels in branches and loops, against the same program in NumPy that notes every row that a kernel multiplies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import calibration, trace, tree

D = 3
"""Width of everything."""

ROUTES = np.array([[0, 1, 2, 1], [2, 0, 0, 1]])
"""What branches are taken by, for each batch."""


class Program:
    """A random nest of matmuls, branches and loops; `steps` is a list of tuples (kind, ...)."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.shapes = {}
        self.steps = self.some(depth=2)

    def leaf(self, *stack):
        known = [name for name, shape in self.shapes.items() if shape[:-2] == stack]
        if known and self.rng.random() < 0.25:
            return str(self.rng.choice(known))
        name = f"w{len(self.shapes)}"
        self.shapes[name] = (*stack, D, D)
        return name

    def some(self, depth):
        return [self.one(depth) for _ in range(self.rng.integers(1, 3))]

    def one(self, depth):
        kind = self.rng.choice(["dot", "pair", "branch", "scan", "layers", "fori", "while"])
        if depth == 0 or kind in ("dot", "pair"):
            return (kind, self.leaf(), self.leaf()) if kind == "pair" else ("dot", self.leaf())
        if kind == "layers":
            return kind, self.leaf(2), self.some(depth - 1)
        if kind == "branch":
            branches = [self.some(depth - 1) for _ in range(self.rng.integers(2, 4))]
            # All branches read one value: they must not share what is summed of it.
            return kind, int(self.rng.integers(len(ROUTES[0]))), branches
        return kind, int(self.rng.integers(1, 4)), self.some(depth - 1)

    def in_jax(self, params, y, route, steps=None, i=0):
        for kind, *args in self.steps if steps is None else steps:
            if kind == "dot":
                y = jnp.tanh(y @ params[args[0]])
            elif kind == "pair":
                y = jnp.tanh(y @ params[args[0]]) - jnp.tanh(y @ params[args[1]])
            elif kind == "branch":
                branches = [lambda y, i, s=s: self.in_jax(params, y, route, s, i) for s in args[1]]
                at = (route[args[0]] + i) % len(branches)
                y = (
                    jax.lax.cond(at > 0, branches[1], branches[0], y, i)
                    if len(branches) == 2
                    else jax.lax.switch(at, branches, y, i)
                )
            elif kind in ("scan", "layers"):
                over = params[args[0]] if kind == "layers" else jnp.zeros(args[0])

                def step(carry, w, kind=kind, args=args):
                    y, j = carry
                    y = jnp.tanh(y @ w) if kind == "layers" else y
                    return (self.in_jax(params, y, route, args[1], j), j + 1), None

                (y, _), _ = jax.lax.scan(jax.checkpoint(step), (y, i), over)
            elif kind == "fori":
                y = jax.lax.fori_loop(
                    0, args[0], lambda j, y, s=args[1], i=i: self.in_jax(params, y, route, s, i + j), y
                )
            else:
                body = lambda c, s=args[1], i=i: (c[0] + 1, self.in_jax(params, c[1], route, s, i + c[0]))  # noqa: E731
                y = jax.lax.while_loop(lambda c, n=args[0]: c[0] < n, body, (0, y))[1]
        return y

    def in_numpy(self, params, y, route, rows, steps=None, i=0):
        for kind, *args in self.steps if steps is None else steps:
            if kind in ("dot", "pair"):
                for name in args:
                    rows.setdefault(name, []).append(y)
                parts = [np.tanh(y @ params[name]) for name in args]
                y = parts[0] if kind == "dot" else parts[0] - parts[1]
            elif kind == "branch":
                at = (route[args[0]] + i) % len(args[1])
                y = self.in_numpy(params, y, route, rows, args[1][at], i)
            else:
                for j in range(2 if kind == "layers" else args[0]):
                    if kind == "layers":
                        rows.setdefault((args[0], j), []).append(y)
                        y = np.tanh(y @ params[args[0]][j])
                    y = self.in_numpy(params, y, route, rows, args[1], i + j)
        return y


@pytest.fixture(scope="module")
def programs():
    """Sixteen programs in one model: one compilation."""
    rng = np.random.default_rng(0)
    programs = {f"p{seed}": Program(seed) for seed in range(16)}
    params = {name: {k: rng.normal(size=shape) for k, shape in p.shapes.items()} for name, p in programs.items()}
    return programs, jax.tree.map(lambda w: w.astype(np.float32), params)


@pytest.mark.filterwarnings("ignore::jaxcompress.trace.LeftOutWarning")
def test_random_nests_of_branches_and_loops(programs):
    programs, params = programs
    xs = np.random.default_rng(1).normal(size=(len(ROUTES), 4, D)).astype(np.float32)

    def apply(params, x, route):
        return {name: program.in_jax(params[name], x, route) for name, program in programs.items()}

    batches = [
        (jnp.asarray(x[: 4 - n]), jnp.asarray(route)) for n, (x, route) in enumerate(zip(xs, ROUTES, strict=True))
    ]
    found = calibration.input_statistics(apply, jax.tree.map(jnp.asarray, params), batches, statistics=("gram",))
    unreached = 0
    for name, program in programs.items():
        rows = {}
        for x, route in batches:
            wide = {k: w.astype(np.float64) for k, w in params[name].items()}
            program.in_numpy(wide, np.asarray(x, np.float64), np.asarray(route), rows)
        for key, shape in program.shapes.items():
            own = found[name][key]
            entries = [key] if len(shape) == 2 else [(key, j) for j in range(shape[0])]
            if not any(entry in rows for entry in entries):
                unreached += 1
                assert own is tree.Unselected, (name, key)
                continue
            for j, entry in enumerate(entries):
                x = np.concatenate([np.zeros((0, D)), *rows.get(entry, [])])
                gram, count = (own.gram, own.count) if len(shape) == 2 else (own.gram[j], own.count[j])
                assert count == len(x), (name, key, j)
                np.testing.assert_allclose(gram, x.T @ x, rtol=1e-3, atol=1e-3, err_msg=f"{name} {key} {j}")
    assert unreached > 3


def test_branches_that_read_one_value():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(2, 2)), jnp.float32) for name in "abc"}
    layers = jnp.array([0, 1, 0])

    def apply(params, x):
        def layer(y, kind):
            return jnp.tanh(jax.lax.switch(kind, [lambda y: y @ params["a"], lambda y: y @ params["b"]], y)), None

        y = jax.lax.scan(layer, x, layers)[0]
        return y, jax.lax.cond(x.sum() > 1e9, lambda: x @ params["c"], lambda: x)

    x = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    with pytest.warns(trace.LeftOutWarning, match=r"1 leaf:\n  'c': it got no rows"):
        found = calibration.input_statistics(apply, params, [(x,)])
    assert (found["a"].count.item(), found["b"].count.item(), found["c"]) == (12, 6, tree.Unselected)
    with pytest.raises(ValueError, match=r"1 leaf:\n  'c': it got no rows"):
        calibration.input_statistics(apply, params, [(x,)], select=tree.by_ndim(min=2))
