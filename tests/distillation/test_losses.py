import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress._src.distillation.losses import binary_labels
from jaxcompress._src.distillation.outputs import mean
from jaxcompress.distillation import (
    argmax_agreement,
    binary_targets,
    hard_labels,
    jensen_shannon,
    next_token_labels,
    reverse_kl,
    soft_targets,
)


def _logits(*shape, seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _outputs(logits, dtype=jnp.float32):
    return {"logits": jnp.asarray(logits, dtype)}


def _numpy_soft(student, teacher, temperature):
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)


def _numpy_binary(student, teacher, temperature):
    p, q = _sigmoid(teacher / temperature), _sigmoid(student / temperature)
    return temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 99), temperature=st.sampled_from([0.5, 1.0, 2.0, 8.0]), classes=st.sampled_from([1, 5]))
def test_soft_targets_against_float64(seed, temperature, classes):
    s, t = _logits(5, classes, seed=seed), _logits(5, classes, seed=seed + 100)
    total, count = soft_targets(temperature=temperature)(_outputs(s), _outputs(t), {})
    np.testing.assert_allclose(total, _numpy_soft(s, t, temperature).sum(), rtol=2e-5, atol=1e-5)
    assert float(count) == 5.0
    assert total.dtype == count.dtype == jnp.float32


def test_soft_targets_gradient_is_temperature_times_the_difference_of_probabilities():
    s, t, temperature = _logits(4, 3), _logits(4, 3, seed=1), 3.0
    found = jax.grad(lambda x: soft_targets(temperature=temperature)({"logits": x}, _outputs(t), {})[0])(jnp.asarray(s))
    expected = temperature * (_softmax(s / temperature) - _softmax(t / temperature))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
@pytest.mark.parametrize(("loss", "reference"), [(soft_targets, _numpy_soft), (binary_targets, _numpy_binary)])
def test_masked_positions_count_for_nothing(loss, reference, dtype):
    s, t = _logits(2, 3, 4), _logits(2, 3, 4, seed=1)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    terms = reference(s, t, 2.0)
    s[mask == 0] = np.nan
    t[0, 2] = np.inf
    total, count = loss(temperature=2.0)(_outputs(s), _outputs(t), {"attention_mask": mask.astype(dtype)})
    np.testing.assert_allclose(total, terms[mask == 1].sum(), rtol=1e-5)
    assert float(count) == terms[mask == 1].size
    grad = jax.grad(
        lambda x: loss(temperature=2.0)({"logits": x}, _outputs(t), {"attention_mask": jnp.asarray(mask)})[0]
    )(jnp.asarray(s, jnp.float32))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[mask == 0], 0.0)


def test_the_mask_is_for_positions_only():
    batch = {"attention_mask": jnp.zeros((2, 7), bool)}
    assert float(soft_targets()(_outputs(_logits(2, 4)), _outputs(_logits(2, 4)), batch)[1]) == 2.0
    assert float(soft_targets(mask=None)(_outputs(_logits(2, 7, 4)), _outputs(_logits(2, 7, 4)), {})[1]) == 14.0
    with pytest.raises(ValueError, match=r"no mask 'attention_mask', only \['ids'\]"):
        soft_targets()(_outputs(_logits(2, 7, 4)), _outputs(_logits(2, 7, 4)), {"ids": 0})
    with pytest.raises(ValueError, match=r"'attention_mask' has shape \(2, 7\), the positions have \(2, 6\)"):
        soft_targets()(_outputs(_logits(2, 6, 4)), _outputs(_logits(2, 6, 4)), batch)


@pytest.mark.parametrize("loss", [soft_targets(), binary_targets(), hard_labels(), binary_labels(ignore=-100)])
def test_nothing_counted_gives_zero_and_a_finite_gradient(loss):
    shape = (2, 3) if loss.__qualname__.startswith("hard_labels") else (2, 3, 4)
    batch = {"attention_mask": jnp.zeros((2, 3)), "labels": jnp.full(shape, -100)}

    def objective(x):
        return mean(*loss({"logits": x}, _outputs(_logits(2, 3, 4)), batch))

    value, grad = jax.jit(jax.value_and_grad(objective))(jnp.full((2, 3, 4), jnp.nan))
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, np.zeros((2, 3, 4)))


@pytest.mark.parametrize("loss", [soft_targets(temperature=2.0), binary_targets(), hard_labels()])
def test_half_precision_logits_are_computed_in_float32(loss):
    s, t = jnp.asarray(_logits(64, 5), jnp.bfloat16), jnp.asarray(_logits(64, 5, seed=1), jnp.bfloat16)
    batch = {"labels": jnp.arange(64) % 5}
    total, _ = loss({"logits": s}, {"logits": t}, batch)
    wide, _ = loss({"logits": s.astype(jnp.float32)}, {"logits": t.astype(jnp.float32)}, batch)
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, wide)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_classes_that_the_teacher_rules_out(temperature):
    s, t = _logits(2, 4), _logits(2, 4, seed=1)
    expected = _numpy_soft(s[:, :3], t[:, :3], temperature).sum()
    s[:, 3] = t[:, 3] = -np.inf

    def objective(x):
        return soft_targets(temperature=temperature)({"logits": x}, _outputs(t), {})[0]

    value, grad = jax.value_and_grad(objective)(jnp.asarray(s, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(grad).all()


def _numpy_jensen_shannon(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)


DIVERGENCES = {
    "reverse": (reverse_kl, lambda p, q: (q * np.log(q / p)).sum(-1)),
    "jensen_shannon": (jensen_shannon(), lambda p, q: _numpy_jensen_shannon(p, q, 0.5)),
    "near_forward": (jensen_shannon(beta=0.1), lambda p, q: _numpy_jensen_shannon(p, q, 0.1)),
}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("divergence", "reference"), DIVERGENCES.values(), ids=DIVERGENCES)
def test_other_divergences_against_float64(divergence, reference, temperature):
    s, t = _logits(2, 3, 5), _logits(2, 3, 5, seed=1)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    loss = soft_targets(temperature=temperature, divergence=divergence)

    def expected(s):
        return (temperature**2 * reference(_softmax(t / temperature), _softmax(s / temperature)))[mask == 1].sum()

    def objective(s, t):
        return loss({"logits": s}, {"logits": t}, {"attention_mask": jnp.asarray(mask)})

    value_and_grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
    hidden = [np.where(mask[..., None], x, bad) for x, bad in ((s, np.nan), (t, np.inf))]
    (total, count), grad = value_and_grad(*(jnp.asarray(x, jnp.float32) for x in hidden))
    np.testing.assert_allclose(total / count, expected(s) / count, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(grad)[mask == 0], 0.0)
    with jax.enable_x64(True):
        (total, _), grad = value_and_grad(jnp.asarray(s), jnp.asarray(t))
        np.testing.assert_allclose(total, expected(s), rtol=1e-12)
        direction = _logits(2, 3, 5, seed=2)
        slope = (expected(s + 1e-6 * direction) - expected(s - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-6)
    # Classes that both rule out.
    ruled_out = [np.where(np.arange(5) == 3, -np.inf, x) for x in (s, t)]
    (total, _), grad = value_and_grad(*(jnp.asarray(x, jnp.float32) for x in ruled_out))
    s, t = np.delete(s, 3, -1), np.delete(t, 3, -1)
    np.testing.assert_allclose(total, expected(s), rtol=1e-5)
    assert np.isfinite(grad).all()


def test_ends_of_jensen_shannon_and_what_only_one_model_rules_out():
    s, t = jnp.array([[0.0, -jnp.inf, 1.0]]), jnp.array([[-jnp.inf, 1.0, 0.0]])
    for divergence, bound in ((jensen_shannon(), np.log(2)), (jensen_shannon(beta=0.9), np.log(2))):
        value, grad = jax.value_and_grad(
            lambda s, divergence=divergence: soft_targets(divergence=divergence)({"logits": s}, {"logits": t}, {})[0]
        )(s)
        assert 0.0 < float(value) < bound
        assert np.isfinite(grad).all()
    assert np.isinf(soft_targets(divergence=reverse_kl)({"logits": s}, {"logits": t}, {})[0])
    with pytest.raises(ValueError, match=r"`beta` must be in \(0, 1\), got 1.0; its ends are `forward_kl`"):
        jensen_shannon(beta=1.0)


def test_nan_is_not_hidden():
    logits = _logits(2, 4)
    logits[1, 0] = np.nan
    assert np.isnan(mean(*soft_targets()(_outputs(logits), _outputs(_logits(2, 4)), {})))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_hard_labels_against_float64(smoothing, shape):
    logits = _logits(*shape, 5)
    labels = np.random.default_rng(2).integers(0, 5, shape)
    labels.flat[1] = -100
    target = (1 - smoothing) * np.eye(5)[labels % 5] + smoothing / 5
    terms = -(target * np.log(_softmax(logits))).sum(-1)[labels >= 0]
    total, count = hard_labels(smoothing=smoothing)(_outputs(logits), {}, {"labels": jnp.asarray(labels)})
    np.testing.assert_allclose(total, terms.sum(), rtol=1e-5)
    assert float(count) == 5.0


def test_hard_labels_other_names_and_errors():
    batch = {"y": jnp.array([0, 7])}
    total, count = hard_labels(output="scores", labels="y", ignore=7)({"scores": jnp.zeros((2, 3))}, {}, batch)
    np.testing.assert_allclose([total, count], [np.log(3), 1.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"The batch has no 'labels'; it has: 'y'"):
        hard_labels()(_outputs(_logits(2, 3)), {}, batch)
    with pytest.raises(ValueError, match=r"The student has no 'logits'; it has: 'scores', 'hidden'"):
        hard_labels()({"scores": 0, "hidden": 0}, {}, batch)
    with pytest.raises(ValueError, match=r"'y' must have shape \(2, 4\) to fit the logits, got \(2,\)"):
        hard_labels(labels="y")(_outputs(_logits(2, 4, 3)), {}, batch)
    with pytest.raises(ValueError, match="'y' must be classes, integers, got float32"):
        hard_labels(labels="y")(_outputs(_logits(2, 3)), {}, {"y": jnp.array([0.0, 1.0])})
    with pytest.raises(ValueError, match="`smoothing` must be in"):
        hard_labels(smoothing=1.5)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_classes_gives_nan(label):
    total, _ = hard_labels()(_outputs(_logits(2, 3)), {}, {"labels": jnp.array([0, label])})
    assert np.isnan(total)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_next_tokens_against_float64(smoothing):
    """Padding on both sides, and a prompt that does not count."""
    logits, tokens = _logits(3, 5, 7), np.random.default_rng(3).integers(0, 7, (3, 5))
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    tokens[2, :3] = -100
    counted = [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 2), (2, 3)]
    target = (1 - smoothing) * np.eye(7)[tokens % 7] + smoothing / 7
    expected = -sum((target[b, t + 1] * np.log(_softmax(logits))[b, t]).sum() for b, t in counted)
    hidden = logits.copy()
    hidden[tuple(np.array([p for p in np.ndindex(3, 5) if p not in counted]).T)] = np.nan
    batch = {"input_ids": jnp.asarray(tokens), "attention_mask": jnp.asarray(mask)}
    loss = next_token_labels(smoothing=smoothing)
    (total, count), grad = jax.value_and_grad(lambda x: loss({"logits": x}, {}, batch), has_aux=True)(
        jnp.asarray(hidden, jnp.float32)
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert float(count) == len(counted)
    np.testing.assert_array_equal(np.asarray(grad)[np.isnan(hidden)], 0.0)
    _, count = next_token_labels(mask=None)(_outputs(logits), {}, {"input_ids": jnp.asarray(np.maximum(tokens, 0))})
    assert float(count) == 12.0
    with pytest.raises(ValueError, match=r"'input_ids' must have shape \(batch, positions\), got \(4,\)"):
        loss(_outputs(logits), {}, {"input_ids": jnp.zeros(4, int), "attention_mask": mask})
    with pytest.raises(ValueError, match=r"'attention_mask' has shape \(3, 5\), the positions have \(2, 5\)"):
        loss(_outputs(logits), {}, batch | {"input_ids": batch["input_ids"][:2]})


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_binary_targets_against_float64(temperature):
    s, t = _logits(5, 3), _logits(5, 3, seed=1)
    total, count = binary_targets(temperature=temperature)(_outputs(s), _outputs(t), {})
    np.testing.assert_allclose(total, _numpy_binary(s, t, temperature).sum(), rtol=1e-5)
    assert float(count) == 15.0
    same, _ = binary_targets(temperature=temperature)(_outputs(t), _outputs(t), {})
    np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_binary_targets_of_a_certain_teacher_stay_finite():
    total, _ = binary_targets()(_outputs([[200.0, -200.0]]), _outputs([[300.0, -300.0]]), {})
    assert float(total) == 0.0


def test_binary_labels_against_float64():
    logits, labels = _logits(4, 3), np.random.default_rng(1).integers(0, 2, (4, 3)).astype(float)
    labels[0, 0] = 0.25
    q = _sigmoid(logits)
    terms = -labels * np.log(q) - (1 - labels) * np.log(1 - q)
    labels[2, 1] = -100
    total, count = binary_labels()(_outputs(logits), {}, {"labels": jnp.asarray(labels)})
    np.testing.assert_allclose(total, terms.sum() - terms[2, 1], rtol=1e-5)
    assert float(count) == 11.0
    with pytest.raises(ValueError, match="must have shape"):
        binary_labels()(_outputs(logits), {}, {"labels": jnp.zeros(4)})


def test_agreement_counts_equal_first_choices():
    s, t = _logits(2, 4, 6), _logits(2, 4, 6, seed=5)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    total, count = argmax_agreement()(_outputs(s), _outputs(t), {"attention_mask": mask})
    assert float(total) == ((s.argmax(-1) == t.argmax(-1)) & (mask == 1)).sum()
    assert float(count) == 5.0


def test_teacher_and_student_must_fit():
    with pytest.raises(ValueError, match=r"'logits' has shape \(2, 4\) in the student and \(2, 5\) in the teacher"):
        soft_targets()(_outputs(_logits(2, 4)), _outputs(_logits(2, 5)), {})
    with pytest.raises(ValueError, match=r"The teacher has no 'logits'; it has: nothing"):
        soft_targets()(_outputs(_logits(2, 4)), {}, {})


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("loss", [soft_targets, binary_targets])
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        loss(temperature=temperature)
