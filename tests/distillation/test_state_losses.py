import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import batch_similarities, cosine_states, hidden_states

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(3, 2, 5, 4))
TEACHER = RNG.normal(size=(7, 2, 5, 4))
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
PAIRS = ((0, 0), (1, 3), (2, 6))
BATCH = {"attention_mask": jnp.asarray(MASK)}


def _outputs(states, as_tuple=False, dtype=jnp.float32):
    states = jnp.asarray(states, dtype)
    return {"hidden_states": tuple(states) if as_tuple else states}


def _squared(s, t):
    return ((s - t) ** 2).mean(-1)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _expected(distance):
    return sum((distance(STUDENT[i], TEACHER[j]) * MASK).sum() for i, j in PAIRS)


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize(
    ("loss", "distance"),
    [
        (hidden_states(pairs=PAIRS), _squared),
        (hidden_states(pairs=PAIRS, normalize=True), lambda s, t: _squared(_unit(s), _unit(t))),
        (cosine_states(pairs=PAIRS), lambda s, t: 1 - (_unit(s) * _unit(t)).sum(-1)),
    ],
)
def test_against_float64(loss, distance, as_tuple):
    total, count = loss(_outputs(STUDENT, as_tuple), _outputs(TEACHER, as_tuple), BATCH)
    np.testing.assert_allclose(total, _expected(distance), rtol=1e-5)
    assert float(count) == 3 * MASK.sum()


def test_last_layers_by_negative_places():
    total, _ = hidden_states(pairs=[(-1, -1)])(_outputs(STUDENT), _outputs(TEACHER), BATCH)
    np.testing.assert_allclose(total, (_squared(STUDENT[2], TEACHER[6]) * MASK).sum(), rtol=1e-5)


def test_projections_come_from_the_student_and_get_a_gradient():
    narrow, matrices = RNG.normal(size=(3, 2, 5, 2)), RNG.normal(size=(3, 2, 4))

    def objective(matrices):
        student = _outputs(narrow) | {"to_teacher": matrices}
        return hidden_states(pairs=PAIRS, projections="to_teacher")(student, _outputs(TEACHER), BATCH)[0]

    value, grad = jax.value_and_grad(objective)(jnp.asarray(matrices, jnp.float32))
    errors = [narrow[i] @ matrices[i] - TEACHER[j] for i, j in PAIRS]
    np.testing.assert_allclose(value, sum(((e**2).mean(-1) * MASK).sum() for e in errors), rtol=1e-5)
    expected = [np.einsum("bsi,bso,bs->io", narrow[i], 2 / 4 * errors[i], MASK) for i in range(3)]
    np.testing.assert_allclose(grad, np.stack(expected), rtol=1e-4)
    with pytest.raises(ValueError, match="3 pairs need as many projections, got 2"):
        objective(jnp.asarray(matrices[:2]))


def test_a_pooled_vector_needs_no_pairs_and_no_mask():
    s, t = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))
    total, count = hidden_states(pairs=None, output="pooled")(
        {"pooled": jnp.asarray(s)}, {"pooled": jnp.asarray(t)}, {}
    )
    np.testing.assert_allclose([total, count], [_squared(s, t).sum(), 6.0], rtol=1e-5)


@pytest.mark.parametrize(
    "loss", [hidden_states(pairs=PAIRS), hidden_states(pairs=PAIRS, normalize=True), cosine_states(pairs=PAIRS)]
)
def test_padding_may_hold_anything_and_zero_vectors_have_a_finite_gradient(loss):
    states = np.where(MASK[..., None], STUDENT, np.nan)
    states[:, 0, 0] = 0.0
    grad = jax.grad(lambda x: loss({"hidden_states": x}, _outputs(TEACHER), BATCH)[0])(jnp.asarray(states, jnp.float32))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[:, MASK == 0], 0.0)


def test_half_precision_states_are_compared_in_float32():
    s, t = _outputs(STUDENT, dtype=jnp.bfloat16), _outputs(TEACHER, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (s, t))
    loss = hidden_states(pairs=PAIRS)
    np.testing.assert_array_equal(loss(s, t, BATCH)[0], loss(*wide, BATCH)[0])


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="`pairs` needs at least one"):
        hidden_states(pairs=())
    # An array would silently give its last layer.
    with pytest.raises(ValueError, match=r"The teacher's 'hidden_states' has 7 entries; there is none at \[7\]"):
        hidden_states(pairs=[(0, 7)])(_outputs(STUDENT), _outputs(TEACHER), BATCH)
    with pytest.raises(ValueError, match=r"The student has no 'hidden_states'; it has: 'logits'"):
        hidden_states(pairs=PAIRS)({"logits": 0}, _outputs(TEACHER), BATCH)
    with pytest.raises(ValueError, match=r"'hidden_states' has shape \(2, 5, 3\) in the student"):
        hidden_states(pairs=PAIRS)(_outputs(STUDENT[..., :3]), _outputs(TEACHER), BATCH)


def _similarities(student, teacher, temperature):
    cosines = [_unit(x) @ _unit(x).T for x in (student, teacher)]
    others = ~np.eye(len(student), dtype=bool)
    if temperature is None:
        return ((cosines[0] - cosines[1]) ** 2)[others].sum()
    weights = [np.where(others, np.exp(c / temperature), 0) for c in cosines]
    q, p = (w / w.sum(-1, keepdims=True) for w in weights)
    return (p[others] * np.log(p[others] / q[others])).sum()


@pytest.mark.parametrize("temperature", [None, 0.05, 1.0])
def test_similarities_within_the_batch_against_float64(temperature):
    student, teacher, mask = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 7)), np.array([1, 0, 1, 1, 0])
    loss = batch_similarities(output="v", mask="real", temperature=temperature)

    def objective(vectors):
        return loss({"v": vectors}, {"v": jnp.asarray(teacher)}, {"real": jnp.asarray(mask)})

    hidden = np.where(mask[:, None], student, np.nan)
    (total, count), grad = jax.value_and_grad(objective, has_aux=True)(jnp.asarray(hidden, jnp.float32))
    np.testing.assert_allclose(total, _similarities(student[mask == 1], teacher[mask == 1], temperature), rtol=2e-5)
    assert float(count) == (6.0 if temperature is None else 3.0)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[mask == 0], 0.0)
    # One example has nothing to be compared with.
    total, count = loss({"v": student}, {"v": teacher}, {"real": np.eye(5)[2]})
    assert (float(total), float(count)) == (0.0, 0.0)


def test_similarities_need_vectors():
    with pytest.raises(ValueError, match=r"'v' must hold one vector for each example.*\(5, 2, 3\) from the student"):
        batch_similarities(output="v")({"v": jnp.zeros((5, 2, 3))}, {"v": jnp.zeros((5, 7))}, {})
    with pytest.raises(ValueError, match=r"The mask 'm' has shape \(4,\), the examples have \(5,\)"):
        batch_similarities(output="v", mask="m")({"v": jnp.zeros((5, 3))}, {"v": jnp.zeros((5, 7))}, {"m": jnp.ones(4)})
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        batch_similarities(temperature=0.0)
