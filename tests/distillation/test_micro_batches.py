"""A batch in parts is the batch as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress._src.transforms import chain, identity
from jaxcompress.distillation import hidden_states, make_train_step, soft_targets
from jaxcompress.pruning import rigl

RNG = np.random.default_rng(0)
LENGTHS = np.array([1, 6, 2, 5, 1, 6, 1, 4])
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(8, 6, 5)), jnp.float32),
    "attention_mask": jnp.asarray(np.arange(6)[None] < LENGTHS[:, None]),
    "scale": jnp.float32(1.5),
}
SIZES = {"first": (5, 8), "head": (8, 4)}
LOSSES = {"soft": soft_targets(temperature=2.0), "hidden": (0.5, hidden_states(pairs=[(0, 0)]))}


def _params(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=size), dtype) for name, size in SIZES.items()}


def _apply(params, batch, *, key, train):
    hidden = jnp.tanh(batch["scale"] * batch["x"].astype(params["first"].dtype) @ params["first"])
    return {"logits": hidden @ params["head"], "hidden_states": [hidden]}


def _bound(bound):
    """A penalty that looks at the loss and at the parameters."""
    return identity()._replace(
        penalty=lambda state, params, *, loss: bound * jnp.square(loss) + 0.1 * jnp.square(params["head"]).sum()
    )


def _step(count, dtype=jnp.float32, place=lambda tree: tree, place_batch=lambda tree: tree):
    transform = chain(rigl(sparsity=0.25, until=10, every=1), _bound(0.3))
    init_state, step = make_train_step(
        _apply, _apply, optax.sgd(0.5), losses=LOSSES, transform=transform, micro_batches=count
    )
    state = init_state(place(_params(0, dtype)), key=jax.random.key(0))
    return step(state, place(_params(1, dtype)), place_batch(BATCH))


def test_tokens_weigh_alike_however_a_batch_is_split():
    (whole, figures), (parts, sums) = _step(1), _step(4)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(*(state.transform_state.fixed[0].masks["head"] for state in (whole, parts)))
    assert sorted(sums) == sorted(figures)
    for name, figure in figures.items():
        np.testing.assert_allclose(sums[name], figure, rtol=1e-5)
    assert float(sums["soft"][1]) == LENGTHS.sum()


def test_a_mean_of_means_would_be_wrong():
    """The update of one linear layer, in float64: what optax.MultiSteps would average is another one."""

    def apply(params, batch, *, key, train):
        return {"y": batch["x"] @ params["w"]}

    def squared(student, teacher, batch):
        keep = batch["attention_mask"]
        return jnp.where(keep, jnp.square(student["y"][..., 0] - 1.0), 0.0).sum(), keep.sum()

    init_state, step = make_train_step(apply, None, optax.sgd(1.0), losses={"y": squared}, micro_batches=4)
    state = init_state({"w": jnp.zeros((5, 1))}, key=jax.random.key(0))
    state, _ = step(state, None, {name: BATCH[name] for name in ("x", "attention_mask")})
    x, keep = np.asarray(BATCH["x"], np.float64), np.asarray(BATCH["attention_mask"])
    update = 2 * (x * keep[..., None]).sum((0, 1)) / keep.sum()
    np.testing.assert_allclose(state.params["w"][:, 0], update, rtol=1e-5, atol=1e-6)
    means = [2 * (x[i::4] * keep[i::4][..., None]).sum((0, 1)) / keep[i::4].sum() for i in range(4)]
    assert np.abs(np.mean(means, axis=0) - update).max() > 0.1


def test_sums_of_narrow_floats_are_float32():
    """64 equal gradients in bfloat16 would stop growing at 2^8 of the first."""

    def apply(params, batch, *, key, train):
        return {"y": batch["x"] * params["w"]}

    def total(student, teacher, batch):
        return student["y"].sum(), jnp.float32(1.0)

    init_state, step = make_train_step(apply, None, optax.sgd(1.0), losses={"y": total}, micro_batches=512)
    state = init_state({"w": jnp.zeros((), jnp.bfloat16)}, key=jax.random.key(0))
    state, _ = step(state, None, {"x": jnp.ones(512, jnp.bfloat16)})
    # Of 512 counts of 1 the losses are 1/512 each.
    assert float(state.params["w"]) == -1.0


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_rows_stay_on_their_devices(axis_type):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])
    alone, _ = _step(4)

    def place_batch(batch):
        rows = {name: jax.device_put(batch[name], NamedSharding(mesh, P("data"))) for name in ("x", "attention_mask")}
        return rows | {"scale": jax.device_put(batch["scale"], NamedSharding(mesh, P()))}

    spread, _ = _step(4, place=lambda tree: jax.device_put(tree, NamedSharding(mesh, P())), place_batch=place_batch)
    for one, other in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="`micro_batches` must be at least 1, got 0"):
        make_train_step(_apply, _apply, optax.sgd(0.5), losses=LOSSES, micro_batches=0)
    with pytest.raises(ValueError, match="`micro_batches` is 3, which does not divide the 8 rows"):
        _step(3)
