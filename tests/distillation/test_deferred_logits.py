"""Losses that compute the logits block by block are those of the logits in full."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optimized import OPTIONS

from jaxcompress.distillation import (
    argmax_agreement,
    binary_targets,
    deferred_logits,
    hard_labels,
    jensen_shannon,
    make_train_step,
    next_token_labels,
    reverse_kl,
    soft_targets,
)
from jaxcompress.quantization import QuantSpec, quantize

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
TOKENS = RNG.integers(0, 37, (2, 4))
BATCH = {
    "attention_mask": jnp.asarray(MASK),
    "input_ids": jnp.asarray(TOKENS),
    "labels": jnp.asarray(np.where(RNG.uniform(size=(2, 4)) < 0.5, TOKENS, -100)),
}
LOSSES = {
    "forward": soft_targets(temperature=2.0),
    "reverse": soft_targets(divergence=reverse_kl),
    "jensen_shannon": soft_targets(divergence=jensen_shannon(beta=0.2), temperature=0.7),
    "labels": hard_labels(),
    "smooth": hard_labels(smoothing=0.1),
    "next": next_token_labels(smoothing=0.2),
}
ALL = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def _heads(*, tied=False, bias=True, dtype=jnp.float32, classes=37, batch=2, positions=4):
    """(hidden, kernel, bias) of student and teacher, of different widths."""

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * RNG.normal(size=shape), dtype)

    return [
        (
            draw(batch, positions, width, scale=2.0),
            draw(*((classes, width) if tied else (width, classes))),
            draw(classes) if bias else None,
        )
        for width in (6, 9)
    ]


def _in_full(hidden, kernel, bias, tied=False):
    logits = hidden @ (kernel.T if tied else kernel)
    return logits if bias is None else logits + bias[None, None]


def _compare(loss, heads, *, tied=False, block_size=8, batch=BATCH, **tolerance):
    def value_and_grad(make):
        def objective(student, teacher):
            return loss({"logits": make(*student)}, {"logits": make(*teacher)}, batch)

        return jax.jit(jax.value_and_grad(objective, has_aux=True))(*heads)

    full = value_and_grad(lambda *head: _in_full(*head, tied=tied))
    blocks = value_and_grad(lambda *head: deferred_logits(*head, tied=tied, block_size=block_size))
    for one, other in zip(jax.tree.leaves(full), jax.tree.leaves(blocks), strict=True):
        assert one.dtype == other.dtype
        assert np.isfinite(other).all()
        np.testing.assert_allclose(other, one, **tolerance)


FORMS = [(name, False, True, 8) for name in LOSSES]
FORMS += [(name, *form) for name in ("forward", "smooth") for form in ((True, False, 5), (False, False, 37))]


@pytest.mark.parametrize(("name", "tied", "bias", "block_size"), FORMS)
def test_values_and_gradients_of_hidden_states_and_head(name, tied, bias, block_size):
    loss = LOSSES[name]
    with jax.enable_x64(True):
        heads = _heads(tied=tied, bias=bias, dtype=jnp.float64)
        _compare(loss, heads, tied=tied, block_size=block_size, rtol=1e-10, atol=1e-12)
    if block_size == 8:
        heads = jax.tree.map(lambda x: x.astype(jnp.float32), heads)
        _compare(loss, heads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["forward", "smooth"])
def test_half_precision_sums_in_float32(name):
    """Nearer to the exact result than logits in full, which are rounded to bfloat16."""
    heads = _heads(dtype=jnp.bfloat16)

    def total(make, heads):
        student, teacher = heads
        return LOSSES[name]({"logits": make(*student)}, {"logits": make(*teacher)}, BATCH)[0]

    def blocks(heads):
        return total(lambda *head: deferred_logits(*head, block_size=8), heads)

    value, (grads, _) = jax.jit(jax.value_and_grad(blocks))(heads)
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), heads)
    exact, (exact_grads, _) = jax.jit(jax.value_and_grad(lambda heads: total(_in_full, heads)))(wide)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * np.abs(other).max())


@ALL
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_positions_give_exactly_nothing(loss, bad):
    student, teacher = _heads()
    counted = MASK if loss in list(LOSSES.values())[:3] else np.asarray(BATCH["labels"] >= 0)
    if loss is LOSSES["next"]:
        counted = np.pad(MASK[:, :-1] * MASK[:, 1:], ((0, 0), (0, 1)))

    def objective(hidden, kernel):
        logits = deferred_logits(hidden, kernel, student[2], block_size=8)
        return loss({"logits": logits}, {"logits": deferred_logits(*teacher)}, BATCH)[0]

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))
    clean = run(*student[:2])
    hidden = run(jnp.where(counted[..., None], student[0], bad), student[1])
    np.testing.assert_array_equal(np.asarray(clean[1][0])[counted == 0], 0.0)
    for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(hidden), strict=True):
        np.testing.assert_array_equal(one, other)


def test_agreement_and_mixtures_with_logits_in_full():
    student, teacher = _heads()
    full = {"logits": _in_full(*student)}, {"logits": _in_full(*teacher)}
    deferred = tuple({"logits": deferred_logits(*head, block_size=8)} for head in (student, teacher))

    @jax.jit
    def figures(full, deferred):
        mixtures = (full, (deferred[0], full[1]), (full[0], deferred[1]))
        totals = [soft_targets(temperature=2.0)(*each, BATCH)[0] for each in mixtures]
        agreements = [argmax_agreement()(*each, BATCH)[0] for each in (full, deferred, (deferred[0], full[0]))]
        return totals, agreements

    totals, agreements = figures(full, deferred)
    np.testing.assert_allclose(totals[1:], [totals[0]] * 2, rtol=1e-5)
    assert agreements[0] == agreements[1]
    assert float(agreements[2]) == MASK.sum()


def test_classes_that_a_bias_rules_out():
    (hidden, kernel, bias), teacher = _heads()
    bias, other = (each.at[jnp.array([0, 36])].set(-jnp.inf) for each in (bias, teacher[2]))
    for name in ("forward", "jensen_shannon"):
        _compare(LOSSES[name], [(hidden, kernel, bias), (*teacher[:2], other)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", [37, -1])
def test_a_label_outside_the_classes_gives_nan(label):
    total, _ = hard_labels()(
        {"logits": deferred_logits(*_heads()[0], block_size=8)}, {}, {"labels": jnp.full((2, 4), label)}
    )
    assert np.isnan(total)


def test_a_compressed_head_is_its_plain_array():
    hidden, kernel, _ = _heads(classes=32)[1]
    quantized, _ = quantize({"head": kernel}, QuantSpec(bits=4))
    teacher = {"logits": deferred_logits(*_heads(classes=32)[0])}

    @jax.jit
    def total(head):
        return soft_targets()({"logits": deferred_logits(hidden, head)}, teacher, BATCH)[0]

    np.testing.assert_allclose(total(quantized["head"]), total(quantized["head"].materialize()), rtol=1e-6)


def test_memory_is_a_small_part_of_the_logits():
    classes = 6000
    heads = _heads(classes=classes, batch=2, positions=64, bias=False)
    batch = {"attention_mask": jnp.ones((2, 64)), "labels": jnp.zeros((2, 64), int)}
    logits_bytes = 2 * 64 * classes * 4
    for loss in (LOSSES["jensen_shannon"], LOSSES["smooth"]):

        def objective(student, teacher, loss=loss):
            outputs = [{"logits": deferred_logits(*head, block_size=100)} for head in (student, teacher)]
            return loss(*outputs, batch)[0]

        compiled = jax.jit(jax.grad(objective)).lower(*heads).compile(compiler_options=OPTIONS)
        assert compiled.memory_analysis().temp_size_in_bytes <= logits_bytes / 8


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["forward", "smooth"])
def test_eight_devices_agree_with_one_and_gather_no_logits(name, axis_type):
    heads = _heads(classes=70, batch=8, positions=3)
    batch = {
        "attention_mask": jnp.asarray(RNG.integers(0, 2, (8, 3))),
        "labels": jnp.asarray(RNG.integers(0, 70, (8, 3))),
    }

    def objective(heads, batch):
        student, teacher = ({"logits": deferred_logits(*head, block_size=32)} for head in heads)
        return LOSSES[name](student, teacher, batch)

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    spread = [(jax.device_put(head[0], rows), *(jax.device_put(part, whole) for part in head[1:])) for head in heads]
    spread_batch = jax.device_put(batch, rows)
    for one, other in zip(jax.tree.leaves(run(heads, batch)), jax.tree.leaves(run(spread, spread_batch)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)
    program = run.lower(spread, spread_batch).compile().as_text()
    gathered = re.findall(r"= \S*?\[([\d,]*)\]\S* all-gather", program)
    assert not [shape for shape in gathered if np.prod([int(size) for size in shape.split(",")]) >= 8 * 3 * 32], (
        gathered
    )


def test_a_train_step_with_deferred_logits_is_that_with_all_of_them():
    sizes = {"table": (37, 8), "up": (8, 8)}
    student, teacher = (
        {name: jnp.asarray(RNG.normal(size=size), jnp.float32) for name, size in sizes.items()} for _ in range(2)
    )
    losses = {"soft": soft_targets(temperature=2.0), "next": (0.5, next_token_labels())}
    states = []
    for deferred in (False, True):

        def apply(params, batch, *, key, train, deferred=deferred):
            hidden = jnp.tanh(params["table"][batch["input_ids"]] @ params["up"])
            if deferred:
                return {"logits": deferred_logits(hidden, params["table"], tied=True, block_size=16)}
            return {"logits": hidden @ params["table"].T}

        init_state, step = make_train_step(apply, apply, optax.sgd(0.1), losses=losses, micro_batches=2)
        state = init_state(student, key=jax.random.key(0))
        for _ in range(2):
            state, metrics = step(state, teacher, BATCH)
        states.append((state.params, metrics))
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_errors_name_what_does_not_fit():
    hidden, kernel, bias = _heads()[0]
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(6, classes\) to fit hidden states \(2, 4, 6\)"):
        deferred_logits(hidden, kernel.T)
    with pytest.raises(ValueError, match=r"must have shape \(classes, 6\).*with `tied=True`, got \(6, 37\)"):
        deferred_logits(hidden, kernel, tied=True)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(37,\), got \(36,\)"):
        deferred_logits(hidden, kernel, bias[:-1])
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        deferred_logits(hidden, kernel, block_size=0)
    outputs = {"logits": deferred_logits(hidden, kernel)}
    with pytest.raises(ValueError, match=r"'logits' has shape \(2, 4, 37\) in the student and \(2, 4, 36\) in the"):
        soft_targets()(outputs, {"logits": deferred_logits(hidden, kernel[:, :-1])}, BATCH)
    with pytest.raises(TypeError, match=r"Deferred logits are no array\. What takes them: `soft_targets`"):
        binary_targets()(outputs, outputs, BATCH)
