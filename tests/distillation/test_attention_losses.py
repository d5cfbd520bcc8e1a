"""Attention and relations, and the laws of all losses with masks of positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress._src.distillation.outputs import mean
from jaxcompress._src.distillation.pairs import ascending_assignment
from jaxcompress.distillation import (
    ClosestLayers,
    attention_probabilities,
    attention_scores,
    cosine_states,
    hidden_states,
    least_squares,
    relations,
)

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]])
BATCH = {"attention_mask": jnp.asarray(MASK)}
PAIRS = ((0, 1), (1, 2))
SCORES = [3 * RNG.normal(size=(layers, 3, 2, 5, 5)) for layers in (2, 3)]
# Widths of student and teacher, both divided by 3 heads.
VECTORS = [RNG.normal(size=(layers, 3, 5, width)) for layers, width in ((2, 6), (3, 12))]
NARROW = [2 * RNG.normal(size=(layers, 3, 5, width)) for layers, width in ((2, 3), (3, 4))]


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum()


def _probabilities(scores):
    """Of a model that hides the padding."""
    return _softmax(np.where(MASK[:, None, None, :], scores, -1e9))


def _rows():
    """(pair, example, its real positions)."""
    return itertools.product(PAIRS, [(b, np.flatnonzero(MASK[b])) for b in range(3)])


def _expected_probabilities(student, teacher):
    return sum(
        _kl(*(x[layer, b, h][np.ix_(real, real)] for x, layer in ((teacher, j), (student, i))))
        for ((i, j), (b, real)), h in itertools.product(_rows(), range(2))
    )


def _expected_scores(student, teacher):
    difference = [
        student[i, b][:, real][:, :, real] - teacher[j, b][:, real][:, :, real] for (i, j), (b, real) in _rows()
    ]
    return sum((d**2).sum() for d in difference)


def _relation(vectors, b, real, head, heads=3):
    width = vectors.shape[-1] // heads
    part = vectors[b, real, head * width : (head + 1) * width]
    return _softmax(part @ part.T / np.sqrt(width))


def _expected_relations(student, teacher):
    return sum(
        _kl(_relation(teacher[j], b, real, h), _relation(student[i], b, real, h))
        for ((i, j), (b, real)), h in itertools.product(_rows(), range(3))
    )


def _expected_least_squares(student, teacher, ridge=0.01):
    total = 0.0
    for i, j in PAIRS:
        s, t = student[i][MASK == 1], teacher[j][MASK == 1]
        gram = s.T @ s
        matrix = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), s.T @ t)
        total += ((s @ matrix - t) ** 2).mean(-1).sum()
    return total


def _closest(student, teacher):
    """By trying all pairings."""
    costs = [[((s - t) ** 2).mean(-1)[MASK == 1].sum() for t in teacher] for s in student]
    return min(costs[0][j] + costs[1][k] for j, k in itertools.combinations(range(3), 2))


REAL = MASK.sum()
CASES = {
    "probabilities": (
        attention_probabilities(pairs=PAIRS, output="x"),
        [_probabilities(scores) for scores in SCORES],
        _expected_probabilities,
        2 * 2 * REAL,
    ),
    "scores": (attention_scores(pairs=PAIRS, output="x"), SCORES, _expected_scores, 2 * 2 * (MASK.sum(1) ** 2).sum()),
    "relations": (relations(pairs=PAIRS, heads=3, output="x"), VECTORS, _expected_relations, 2 * 3 * REAL),
    "least_squares": (
        hidden_states(pairs=PAIRS, output="x", projections=least_squares(ridge=0.01)),
        NARROW,
        _expected_least_squares,
        2 * REAL,
    ),
    "closest": (
        hidden_states(pairs=ClosestLayers(student=(0, 1), teacher=(0, 1, 2)), output="x"),
        [VECTORS[1][:2] + 0.5, VECTORS[1]],
        _closest,
        2 * REAL,
    ),
}
ALL = pytest.mark.parametrize(("loss", "arrays", "expected", "count"), CASES.values(), ids=CASES)


def _value_and_grad(loss, batch=BATCH):
    """Of the sum, by the student's array; and the count."""

    def objective(student, teacher):
        return loss({"x": student}, {"x": teacher}, batch)

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def _hidden(arrays, value):
    """`arrays` with `value` wherever a position is masked."""
    if arrays[0].shape[-1] == arrays[0].shape[-2]:
        masked = (MASK[:, None, :, None] * MASK[:, None, None, :]) == 0
    else:
        masked = MASK[..., None] == 0
    return [np.where(masked, value, x) for x in arrays], np.broadcast_to(masked, arrays[0].shape)


@ALL
def test_against_float64_with_anything_in_the_padding(loss, arrays, expected, count):
    run = _value_and_grad(loss)
    (total, number), grad = run(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert float(number) == count
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total / count, expected(*arrays) / count, rtol=1e-6, atol=1e-6)
    for value in (np.nan, np.inf, -np.inf):
        hidden, masked = _hidden(arrays, value)
        (other, _), other_grad = run(*(jnp.asarray(x, jnp.float32) for x in hidden))
        assert float(other) == float(total)
        np.testing.assert_array_equal(other_grad, grad)
        np.testing.assert_array_equal(np.asarray(other_grad)[masked], 0.0)
        assert np.isfinite(other_grad).all()


@pytest.mark.parametrize("name", sorted(set(CASES) - {"least_squares"}))  # whose map is a constant for the gradient
def test_double_precision_and_gradients_against_differences(name):
    loss, arrays, expected, _ = CASES[name]
    with jax.enable_x64(True):
        direction = RNG.normal(size=arrays[0].shape)
        (total, _), grad = _value_and_grad(loss)(*map(jnp.asarray, arrays))
        np.testing.assert_allclose(total, expected(*arrays), rtol=1e-12)
        if name == "probabilities":
            # Only of what softmax may give: rows that sum to 1.
            direction = arrays[0] * (direction - (arrays[0] * direction).sum(-1, keepdims=True))
        step = 1e-6 * direction
        slope = (expected(arrays[0] + step, arrays[1]) - expected(arrays[0] - step, arrays[1])) / 2e-6
        np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-6)


@ALL
def test_a_batch_without_a_real_position_gives_zero(loss, arrays, expected, count):
    nothing = {"attention_mask": jnp.zeros_like(BATCH["attention_mask"])}
    student, teacher = (jnp.full(x.shape, jnp.nan) for x in arrays)
    value, grad = jax.jit(jax.value_and_grad(lambda x: mean(*loss({"x": x}, {"x": teacher}, nothing))))(student)
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, np.zeros(student.shape))


@ALL
def test_half_precision_is_computed_in_float32(loss, arrays, expected, count):
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    (total, _), grad = _value_and_grad(loss)(*half)
    (wide, _), _ = _value_and_grad(loss)(*(x.astype(jnp.float32) for x in half))
    assert (total.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(total, wide, rtol=1e-6)


def test_keys_that_both_models_hide_themselves_do_not_count():
    """Causal attention: zeros among the probabilities, and scores of -inf or huge numbers."""
    later = np.triu(np.ones((5, 5), bool), 1)
    raw = [np.where(later, -np.inf, x) for x in SCORES]
    probabilities = [_softmax(x) for x in raw]
    loss = attention_probabilities(pairs=PAIRS, mask=None)
    outputs = [{"attentions": jnp.asarray(x, jnp.float32)} for x in probabilities]
    student, teacher = (each["attentions"] for each in outputs)
    total, grad = jax.jit(jax.value_and_grad(lambda x: loss({"attentions": x}, {"attentions": teacher}, {})[0]))(
        student
    )
    expected = sum(
        _kl(probabilities[1][j][..., q, : q + 1], probabilities[0][i][..., q, : q + 1])
        for i, j in PAIRS
        for q in range(5)
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert np.isfinite(grad).all()
    for hidden in (-np.inf, np.finfo(np.float32).min, -1e4):
        s, t = (jnp.asarray(np.where(later, hidden, x), jnp.float32) for x in SCORES)
        total, count = attention_scores(pairs=PAIRS, mask=None)({"attention_scores": s}, {"attention_scores": t}, {})
        terms = [((SCORES[0][i] - SCORES[1][j]) ** 2)[..., ~later] for i, j in PAIRS]
        np.testing.assert_allclose(total, np.sum(terms), rtol=1e-5)
        assert float(count) == np.size(terms)


def test_a_key_that_only_the_student_hides_is_not_silent():
    s, t = jnp.full((1, 1, 2, 2), -jnp.inf), jnp.zeros((1, 1, 2, 2))
    assert np.isinf(attention_scores(pairs=None, mask=None)({"attention_scores": s}, {"attention_scores": t}, {})[0])


def test_relations_of_vectors_that_are_split_into_heads():
    student, teacher = VECTORS[0].reshape(2, 3, 5, 2, 3), VECTORS[1].reshape(3, 3, 5, 4, 3)
    loss = relations(pairs=PAIRS, heads=3, output="x")
    total, _ = loss({"x": jnp.asarray(student)}, {"x": tuple(map(jnp.asarray, teacher))}, BATCH)
    np.testing.assert_allclose(total, _expected_relations(*VECTORS), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (3, 3), (3, 6), (2, 5)])
def test_the_assignment_is_the_best_of_all(shape):
    costs = np.random.default_rng(sum(shape)).uniform(size=shape)
    best = min(
        itertools.combinations(range(shape[1]), shape[0]),
        key=lambda columns: sum(costs[i, j] for i, j in enumerate(columns)),
    )
    np.testing.assert_array_equal(ascending_assignment(jnp.asarray(costs, jnp.float32)), best)


def test_ties_take_the_first_layers():
    np.testing.assert_array_equal(ascending_assignment(jnp.zeros((2, 4))), [0, 1])


def test_more_student_layers_than_teacher_layers():
    """CoFi: each layer of the teacher looks for one of the student; only that gets a gradient."""
    teacher = VECTORS[1][1:]
    loss = hidden_states(pairs=ClosestLayers(student=(-3, -2, -1), teacher=(0, 1)), output="x")
    student = np.stack([teacher[0] + 0.1, teacher[0] + 3.0, teacher[1] - 0.2])
    (total, count), grad = _value_and_grad(loss)(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose([total, count], [0.05 * REAL, 2 * REAL], rtol=1e-4)
    assert [bool(np.any(layer)) for layer in np.asarray(grad)] == [True, False, True]


def test_projections_with_closest_layers_belong_to_the_student_layers():
    teacher = NARROW[1]
    matrices = RNG.normal(size=(2, 3, 4))
    student = np.stack(
        [teacher[layer] @ np.linalg.pinv(matrix) for layer, matrix in zip((0, 2), matrices, strict=True)]
    )
    pairs = ClosestLayers(student=(0, 1), teacher=(0, 1, 2))
    outputs = {"x": jnp.asarray(student), "to": jnp.asarray(matrices)}
    total, _ = cosine_states(pairs=pairs, output="x", projections="to")(outputs, {"x": jnp.asarray(teacher)}, BATCH)
    directions = [[s @ m, teacher[j]] for s, m, j in zip(student, matrices, (0, 2), strict=True)]
    cosines = [(a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1) for a, b in directions]
    np.testing.assert_allclose(total, sum((1 - c)[MASK == 1].sum() for c in cosines), rtol=1e-4)
    with pytest.raises(ValueError, match="2 student layers need as many projections, got 1"):
        cosine_states(pairs=pairs, output="x", projections="to")(
            outputs | {"to": outputs["to"][:1]}, {"x": jnp.asarray(teacher)}, BATCH
        )


def test_errors_name_what_does_not_fit():
    def run(loss, student, teacher, batch=BATCH):
        return loss({"x": jnp.zeros(student)}, {"x": jnp.zeros(teacher)}, batch)

    with pytest.raises(
        ValueError, match=r"'x' has shape \(3, 2, 5, 5\) in the student and \(3, 4, 5, 5\) in the teacher"
    ):
        run(attention_probabilities(pairs=None, output="x"), (3, 2, 5, 5), (3, 4, 5, 5))
    with pytest.raises(ValueError, match=r"must have shape \(batch, heads, queries, keys\), got \(3, 5, 5\)"):
        run(attention_scores(pairs=None, output="x"), (3, 5, 5), (3, 5, 5))
    with pytest.raises(
        ValueError, match="'x' has 5 queries and 4 keys; the mask 'attention_mask' is for equal numbers"
    ):
        run(attention_scores(pairs=None, output="x"), (3, 2, 5, 4), (3, 2, 5, 4))
    with pytest.raises(ValueError, match=r"'attention_mask' has shape \(3, 5\), the positions have \(3, 4\)"):
        run(attention_scores(pairs=None, output="x"), (3, 2, 4, 4), (3, 2, 4, 4))
    with pytest.raises(ValueError, match="The teacher's 'x' has 3 entries; there is none at \\[3\\]"):
        run(attention_scores(pairs=[(0, 3)], output="x"), (2, 3, 2, 5, 5), (3, 3, 2, 5, 5))
    with pytest.raises(ValueError, match="`heads` is 4, which does not divide the width 6 of 'x'"):
        run(relations(pairs=None, heads=4, output="x"), (3, 5, 6), (3, 5, 8))
    with pytest.raises(ValueError, match=r"'x' must have shape \(batch, positions, features...\) in both models"):
        run(relations(pairs=None, heads=2, output="x"), (3, 5, 6), (3, 4, 6))
    with pytest.raises(ValueError, match="which differ in more than features"):
        run(hidden_states(pairs=None, output="x", projections=least_squares()), (3, 5, 6), (3, 4, 8))
    with pytest.raises(ValueError, match="`pairs` needs at least one"):
        attention_probabilities(pairs=())
    with pytest.raises(ValueError, match="`heads` must be at least 1, got 0"):
        relations(pairs=None, heads=0, output="x")
    with pytest.raises(ValueError, match="`ridge` must be positive, got 0"):
        least_squares(ridge=0.0)
    with pytest.raises(ValueError, match=r"`teacher` must be ascending places of layers, at least one, got \(1, 1\)"):
        ClosestLayers(student=[0], teacher=[1, 1])
