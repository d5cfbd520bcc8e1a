"""Folds of kernels and activations that are re-arranged: where there is one, moving factors keeps the function."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.calibration import input_statistics
from jaxcompress.quantization import smooth
from jaxcompress.trace import folds


def _moves(rng, shape):
    """Reshapes, transposes and reversals that end in the shape that they began with."""
    steps, now = [], shape
    for _ in range(rng.integers(0, 4)):
        kind, at = rng.choice(["split", "merge", "transpose", "reverse"]), int(rng.integers(len(now)))
        if kind == "split" and now[at] in (4, 8):
            now = (*now[:at], 2, now[at] // 2, *now[at + 1 :])
            steps.append(now)
        elif kind == "merge" and at + 1 < len(now):
            now = (*now[:at], now[at] * now[at + 1], *now[at + 2 :])
            steps.append(now)
        elif kind == "transpose":
            order = tuple(int(k) for k in rng.permutation(len(now)))
            now = tuple(now[k] for k in order)
            steps.append(("transpose", order))
        elif kind == "reverse" and rng.random() < 0.3:
            steps.append(("reverse", at))

    def apply(x):
        for step in steps:
            if step[0] == "transpose":
                x = x.transpose(step[1])
            else:
                x = jnp.flip(x, step[1]) if step[0] == "reverse" else x.reshape(step)
        return x.reshape(shape)

    return apply


def _model(seed):
    """A scale or a kernel in front of a kernel; both sides of its matmul are re-arranged."""
    rng = np.random.default_rng(seed)
    features, kernel = _moves(rng, (8,)), _moves(rng, (8, 4))
    behind_kernel = seed % 2

    def apply(params, x):
        y = x @ params["up"] if behind_kernel else x * params["scale"][None]
        return jax.vmap(features)(y) @ kernel(params["w"])

    sizes = {"scale": (8,), "up": (8, 8), "w": (8, 4)}
    return apply, {name: jnp.asarray(rng.uniform(0.5, 2, size=shape), jnp.float32) for name, shape in sizes.items()}


def test_a_fold_of_a_re_arranged_kernel_keeps_the_function():
    models = {f"model{seed}": _model(seed) for seed in range(80)}
    params = {name: params for name, (_, params) in models.items()}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)) * np.arange(1.0, 9), jnp.float32)

    def apply(params, x):
        return {name: model(params[name], x) for name, (model, _) in models.items()}

    found = folds(apply, params, x)
    statistics = input_statistics(apply, params, [(x,)], statistics=("absolute_max",))
    smoothed, factors = smooth(params, statistics, found)
    assert len(factors) == len(found) > 20
    wanted, after = (jax.device_get(jax.jit(apply)(tree, x)) for tree in (params, smoothed))
    for fold in found:
        name = fold.consumers[0].path.split("/")[0]
        assert not np.array_equal(smoothed[name]["w"], params[name]["w"])
        np.testing.assert_allclose(after[name], wanted[name], rtol=1e-5, atol=1e-5 * np.abs(wanted[name]).max())
