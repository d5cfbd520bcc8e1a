"""Against public implementations: see the scripts beside the golden files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import pruning
from jaxcompress._src.pruning.allocation import erdos_renyi_kernel
from jaxcompress._src.pruning.masks import magnitude_masks
from jaxcompress.schedules import cubic
from jaxcompress.trace import LeafLayout

HERE = Path(__file__).parent / "golden"
OUT_IN = LeafLayout(kind="matmul", input_axes=(1,), output_axes=(0,))


@pytest.fixture(scope="module")
def golden():
    return np.load(HERE / "torch.npz")


@pytest.fixture(scope="module")
def tfmot():
    return np.load(HERE / "cubic.npz")


def test_the_cubic_schedule_of_tfmot(tfmot):
    for place, (initial, final, begin, end) in enumerate(tfmot["cases"]):
        schedule = cubic(float(initial), float(final), begin=int(begin), end=int(end))
        prunes = tfmot[f"prunes/{place}"]
        assert prunes.any()
        found = np.array([schedule(int(step)) for step in tfmot["steps"]])
        np.testing.assert_allclose(found[prunes], tfmot[f"sparsity/{place}"][prunes], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["normal", "ties"])
def test_the_masks_of_tfmot(tfmot, name):
    weights = {"w": jnp.asarray(tfmot[f"weights/{name}"])}
    scores = pruning.magnitude_scores(weights)
    for key in tfmot.files:
        if key.startswith(f"mask/{name}/"):
            share = float(key.rsplit("/", 1)[1])
            masks = pruning.masks_from_scores(scores, sparsity=share, counting="tfmot")
            np.testing.assert_array_equal(masks["w"], tfmot[key], err_msg=key)


def test_l1_unstructured_of_torch(golden):
    scores = {"w": jnp.abs(jnp.asarray(golden["l1/weights"]))}
    for amount in (0.0, 0.25, 0.5, 0.777, 1.0):
        masks = pruning.masks_from_scores(scores, sparsity=amount)
        np.testing.assert_array_equal(masks["w"], golden[f"l1/mask/{amount}"])


def test_two_of_four_of_torch(golden):
    weights = {"w": jnp.asarray(golden["two_of_four/weights"])}
    masks = magnitude_masks(weights, sparsity=0.5, pattern=pruning.n_of_m(2, 4), layouts={"w": OUT_IN})
    np.testing.assert_array_equal(masks["w"], golden["two_of_four/mask"])
    state = pruning.sr_ste(2, 4, layouts={"w": OUT_IN}).init(weights, key=jax.random.key(0))
    np.testing.assert_array_equal(state.fixed.masks["w"], golden["two_of_four/mask"])


@pytest.mark.parametrize(("kind", "allocate"), [("kernel", erdos_renyi_kernel), ("plain", pruning.erdos_renyi)])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_erdos_renyi_of_fastsparse(golden, kind, allocate, sparsity):
    shapes = [tuple(n for n in shape if n) for shape in golden["erdos_renyi/shapes"].tolist()]
    # (out, in, height, width) there, (height, width, in, out) here.
    params = {
        f"{place}": jax.ShapeDtypeStruct((*shape[2:], shape[1], shape[0]), "float32")
        for place, shape in enumerate(shapes)
    }
    found = allocate(params, sparsity=sparsity)
    expected = golden[f"erdos_renyi/{kind}/{sparsity}"]
    assert (expected == 0).any() or sparsity != 0.5
    # Theirs rounds the pruned weights of every layer down before it adds them up.
    np.testing.assert_allclose(list(found.values()), expected, atol=2e-3)
    sizes = [int(np.prod(shape)) for shape in shapes]
    pruned = sum(round(share * size) for share, size in zip(found.values(), sizes, strict=True))
    assert pruned == round(sparsity * sum(sizes))


def test_snip_by_autograd(golden):
    """Kernels (in, out) here."""
    params = {f"{i}": jnp.asarray(golden[f"snip/weight/{i}"].T) for i in (0, 1)}

    def loss(params):
        logits = jax.nn.relu(golden["snip/x"] @ params["0"]) @ params["1"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, golden["snip/labels"]).mean()

    scores = pruning.snip_scores(params, jax.grad(loss)(params))
    for i in (0, 1):
        np.testing.assert_allclose(scores[f"{i}"], golden[f"snip/score/{i}"].T, rtol=1e-4, atol=1e-7)


def test_rigl_of_rigl_torch(golden):
    """Masks, regrown weights and moments after each of its updates."""
    sparsity, alpha, end = (float(golden[f"rigl/{name}"]) for name in ("sparsity", "alpha", "T_end"))
    every = int(golden["rigl/delta"])
    transform = pruning.rigl(sparsity=sparsity, until=int(end), every=every, fraction=alpha)
    update = jax.jit(
        lambda grads, state, params: transform.update(grads, state, params, key=jax.random.key(0), loss=0.0)
    )
    moved = 0
    for change in range(int(golden["rigl/changes"])):
        own = {name: jnp.asarray(golden[f"rigl/{change}/{name}"]) for name in ("weight", "mask", "gradient")}
        params, step = {"w": own["weight"]}, int(golden[f"rigl/{change}/step"])
        state = transform.init(params, key=jax.random.key(0))
        state = state._replace(fixed=state.fixed._replace(masks={"w": own["mask"]}, step=jnp.int32(step - 1)))
        state, fresh = update({"w": own["gradient"]}, state, params)
        np.testing.assert_array_equal(state.fixed.masks["w"], golden[f"rigl/{change}/new_mask"])
        projected, _ = transform.project(params, state)
        np.testing.assert_array_equal(projected["w"], golden[f"rigl/{change}/new_weight"])
        # Whatever they blanked among the kept weights is fresh here.
        grown = golden[f"rigl/{change}/new_mask"] & ~golden[f"rigl/{change}/mask"]
        assert (golden[f"rigl/{change}/new_moment"][grown] == 0).all()
        assert bool(fresh["w"][grown].all())
        moved += int(grown.sum())
    assert moved > 10
