"""Top classes and the rest, on disk and in the loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress._src.distillation.top_logits import top_logits
from jaxcompress.distillation import (
    deferred_logits,
    forward_kl,
    hidden_states,
    jensen_shannon,
    make_train_step,
    read_teacher_outputs,
    reverse_kl,
    soft_targets,
    tap,
    top_k_targets,
    write_teacher_outputs,
)

RNG = np.random.default_rng(0)
CLASSES, WIDTH = 37, 6
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
BATCH = {"attention_mask": jnp.asarray(MASK)}
S, T = (3 * RNG.normal(size=(2, 4, CLASSES)) for _ in range(2))


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _reference(s, t, k, temperature, rest):
    """(p, q) over k + 1 or k classes."""
    p, q = _softmax(t / temperature), _softmax(s / temperature)
    top = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    parts = [np.take_along_axis(x, top, -1) for x in (p, q)]
    if rest == "renormalize":
        return [x / x.sum(-1, keepdims=True) for x in parts]
    return [np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in parts]


FORWARD = (forward_kl, lambda p, q: p * np.log(p / q))
REVERSE = (reverse_kl, lambda p, q: q * np.log(q / p))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(
    ("k", "temperature", "rest", "kind"),
    [(5, 1.0, "bucket", FORWARD), (5, 2.0, "renormalize", REVERSE), (1, 3.0, "bucket", REVERSE)],
)
def test_the_loss_against_float64(k, temperature, rest, kind, deferred):
    """With anything at masked positions."""
    divergence, reference = kind
    loss = top_k_targets(temperature=temperature, rest=rest, divergence=divergence)

    def expected(s):
        p, q = _reference(s, T, k, temperature, rest)
        return temperature**2 * reference(p, q).sum(-1)[MASK == 1].sum()

    def objective(s, t):
        # Logits out of an identity: hidden states are the logits.
        logits = deferred_logits(s, jnp.eye(CLASSES, dtype=s.dtype), block_size=8) if deferred else s
        return loss({"logits": logits}, {"logits": top_logits(t, k, temperature=temperature)}, BATCH)

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    hidden = np.where(MASK[..., None], S, np.nan), np.where(MASK[..., None], T, np.nan)
    (total, count), grad = run(*(jnp.asarray(x, jnp.float32) for x in hidden))
    np.testing.assert_allclose(total / count, expected(S) / count, rtol=2e-6, atol=1e-6)
    assert float(count) == MASK.sum()
    np.testing.assert_array_equal(np.asarray(grad)[MASK == 0], 0.0)
    with jax.enable_x64(True):
        (total, _), grad = run(jnp.asarray(S), jnp.asarray(T))
        np.testing.assert_allclose(total, expected(S), rtol=1e-8)
        direction = RNG.normal(size=S.shape)
        slope = (expected(S + 1e-6 * direction) - expected(S - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-5)


@pytest.mark.parametrize("deferred", [False, True])
def test_all_classes_are_the_loss_on_logits_in_full(deferred):
    def objective(s, t, loss, full):
        logits = deferred_logits(s, jnp.eye(CLASSES), block_size=8) if deferred else s
        return loss({"logits": logits}, {"logits": t if full else top_logits(t, CLASSES)}, BATCH)[0]

    s, t = jnp.asarray(S, jnp.float32), jnp.asarray(T, jnp.float32)
    run = jax.jit(jax.value_and_grad(objective), static_argnums=(2, 3))
    top = run(s, t, top_k_targets(divergence=jensen_shannon()), False)
    full = run(s, t, soft_targets(divergence=jensen_shannon()), True)
    np.testing.assert_allclose(top[0], full[0], rtol=1e-5)
    np.testing.assert_allclose(top[1], full[1], rtol=1e-4, atol=1e-6)


def test_fewer_classes_give_a_lower_bound_that_grows():
    def total(s, t, k):
        return top_k_targets()({"logits": s}, {"logits": top_logits(t, k)}, BATCH)[0]

    totals = [float(jax.jit(total, static_argnums=2)(jnp.asarray(S), jnp.asarray(T), k)) for k in (1, 8, CLASSES)]
    assert totals == sorted(totals)


def test_a_rest_that_a_difference_from_one_would_lose():
    logits = jnp.asarray([[0.0, -40.0, -41.0]])
    top = jax.jit(lambda logits: top_logits(logits, 1))(logits)
    np.testing.assert_allclose(top.log_rest, [np.log(np.exp(-40) + np.exp(-41))], rtol=1e-6)
    deferred = jax.jit(lambda logits: top_logits(deferred_logits(logits, jnp.eye(3), block_size=2), 1))(logits)
    np.testing.assert_allclose(deferred.log_rest, top.log_rest, rtol=1e-6)


@pytest.mark.parametrize("block_size", [5, 37])
def test_the_top_of_deferred_logits(block_size):
    ties = np.round(2 * T) / 2

    @jax.jit
    def both(logits):
        deferred = deferred_logits(logits, jnp.eye(CLASSES), block_size=block_size)
        return top_logits(deferred, 11), top_logits(logits, 11)

    one, other = both(jnp.asarray(ties, jnp.float32))
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, rtol=1e-5)
    np.testing.assert_allclose(one.log_rest, other.log_rest, rtol=1e-5)


def _params(seed):
    rng = np.random.default_rng(seed)
    return {
        "up": jnp.asarray(rng.normal(size=(5, WIDTH)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(WIDTH, CLASSES)), jnp.float32),
    }


def _apply(params, batch, *, key, train):
    hidden = jax.ad_checkpoint.checkpoint_name(jnp.tanh(batch["x"] @ params["up"]), "hidden")
    return {"logits": hidden @ params["head"]}


APPLY = tap(_apply, {"hidden_states": "hidden"})


def _batches(count=7, seed=0):
    """Of two widths."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        length = 4 + 2 * (number % 2)
        yield {
            "x": jnp.asarray(rng.normal(size=(2, length, 5)), jnp.float32),
            "attention_mask": np.arange(length)[None] < rng.integers(2, length + 1, (2, 1)),
        }


def _write(directory, batches, *, apply=APPLY, params=None, **options):
    options = {"top_k": 6, "outputs": ("hidden_states",), "batches_per_file": 3} | options
    return write_teacher_outputs(directory, apply, _params(0) if params is None else params, batches, **options)


def test_what_is_read_is_what_the_teacher_says(tmp_path):
    assert _write(tmp_path, _batches(), dtype=jnp.bfloat16, temperature=2.0) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"outputs-00000{number}.safetensors" for number in range(3)),
    ]
    batches = list(read_teacher_outputs(tmp_path, _batches(), params=_params(0)))
    assert len(batches) == 7

    @jax.jit
    def said(batch):
        return top_logits(_apply(_params(0), batch, key=None, train=False)["logits"], 6, temperature=2.0)

    for batch, original in zip(batches, _batches(), strict=True):
        top = said(original)
        kept = batch["teacher"]["logits"]
        assert (kept.classes, kept.temperature, kept.indices.dtype) == (CLASSES, 2.0, np.uint16)
        np.testing.assert_array_equal(kept.indices, top.indices)
        np.testing.assert_allclose(kept.log_probabilities, top.log_probabilities, rtol=1e-5)
        np.testing.assert_allclose(kept.log_rest, top.log_rest, rtol=1e-5)
        (state,) = batch["teacher"]["hidden_states"]
        assert state.dtype == jnp.bfloat16
        np.testing.assert_allclose(state.astype(np.float32), jnp.tanh(original["x"] @ _params(0)["up"]), atol=4e-3)
        np.testing.assert_array_equal(batch["x"], original["x"])
    second = read_teacher_outputs(tmp_path, list(_batches())[4:], start=4)
    np.testing.assert_array_equal(next(second)["teacher"]["logits"].indices, batches[4]["teacher"]["logits"].indices)


def test_training_on_the_cache_is_training_beside_the_teacher(tmp_path):
    _write(tmp_path, _batches(4), top_k=CLASSES)
    hidden = (0.5, hidden_states(pairs=[(0, 0)]))
    results = []
    for cached in (False, True):
        soft = top_k_targets() if cached else soft_targets()
        init_state, step = make_train_step(
            APPLY, None if cached else APPLY, optax.sgd(0.1), losses={"soft": soft, "hidden": hidden}, micro_batches=2
        )
        state = init_state(_params(1), key=jax.random.key(0))
        for batch in read_teacher_outputs(tmp_path, _batches(4)) if cached else _batches(4):
            state, metrics = step(state, _params(0), batch)
        results.append((state.params, metrics))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def test_a_run_that_was_killed_goes_on_where_its_files_end(tmp_path):
    runs = []

    def apply(params, batch, *, key, train):
        jax.debug.callback(lambda: runs.append(1))
        return _apply(params, batch, key=key, train=train)

    def interrupted():
        yield from list(_batches())[:5]
        raise KeyboardInterrupt

    options = {"apply": apply, "outputs": ()}
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, interrupted(), **options)
    jax.effects_barrier()
    assert len(runs) == 3
    with pytest.raises(ValueError, match="are not finished: the same `write_teacher_outputs` continues"):
        read_teacher_outputs(tmp_path, _batches())
    (tmp_path / "outputs-000001.safetensors.1.tmp").write_bytes(b"half of it")
    assert _write(tmp_path, _batches(), **options) == 7
    jax.effects_barrier()
    assert len(runs) == 7
    assert not list(tmp_path.glob("*.tmp"))
    assert len(list(read_teacher_outputs(tmp_path, _batches()))) == 7
    # More data: only the file that ended with the data is written again.
    assert _write(tmp_path, _batches(8), **options) == 8
    jax.effects_barrier()
    assert len(runs) == 9
    # Less data changes nothing.
    assert _write(tmp_path, _batches(5), **options) == 8
    assert len(list(read_teacher_outputs(tmp_path, _batches(8)))) == 8


def test_other_data_and_other_teachers_are_refused(tmp_path):
    _write(tmp_path, _batches())
    with pytest.raises(ValueError, match="another teacher: its parameters differ"):
        read_teacher_outputs(tmp_path, _batches(), params=_params(1))
    with pytest.raises(ValueError, match="another teacher: its parameters differ"):
        _write(tmp_path, _batches(), params=_params(1))
    with pytest.raises(ValueError, match="were written with top_k = 6, not 7"):
        _write(tmp_path, _batches(), top_k=7)
    swapped = list(_batches())
    swapped[2], swapped[4] = swapped[4], swapped[2]
    with pytest.raises(
        ValueError, match=r"Batch 2 is not the one whose teacher outputs are in .*: other data, or another"
    ):
        list(read_teacher_outputs(tmp_path, swapped))
    with pytest.raises(ValueError, match=r"outputs-000000.* was written from other data: batch 2 of this file differs"):
        _write(tmp_path, swapped)
    with pytest.raises(ValueError, match="has the teacher outputs of 7 batches, no more"):
        list(read_teacher_outputs(tmp_path, _batches(8)))


def test_only_the_entries_that_count_are_compared(tmp_path):
    _write(tmp_path, _batches(2), compared=("x",))
    batches = [batch | {"attention_mask": ~batch["attention_mask"]} for batch in _batches(2)]
    assert len(list(read_teacher_outputs(tmp_path, batches))) == 2
    with pytest.raises(ValueError, match="The batch has no 'x'; it has: 'attention_mask'"):
        list(read_teacher_outputs(tmp_path, [{"attention_mask": MASK}]))


def test_damage_and_what_is_no_cache(tmp_path):
    with pytest.raises(ValueError, match="There are no teacher outputs in"):
        read_teacher_outputs(tmp_path / "absent", _batches())
    with pytest.raises(ValueError, match="`batches` is empty"):
        _write(tmp_path / "empty", [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty, and has no manifest of teacher outputs"):
        _write(tmp_path / "full", _batches())
    cache = tmp_path / "cache"
    _write(cache, _batches())
    path = cache / "outputs-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"outputs-000001.safetensors' is damaged or no file of teacher outputs"):
        list(read_teacher_outputs(cache, _batches()))
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ValueError, match="has version 99; this version of the library reads 1"):
        read_teacher_outputs(cache, _batches())
    (cache / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json' is damaged or no manifest of teacher outputs"):
        read_teacher_outputs(cache, _batches())


def test_errors_of_options(tmp_path):
    with pytest.raises(ValueError, match="`top_k` is None and `outputs` is empty"):
        _write(tmp_path, _batches(), top_k=None, outputs=())
    with pytest.raises(ValueError, match="`top_k` is 38, and there are only 37 classes"):
        _write(tmp_path / "k", _batches(), top_k=38)
    with pytest.raises(ValueError, match="The teacher has no 'states'; it has"):
        _write(tmp_path / "states", _batches(), outputs=("states",))
    with pytest.raises(ValueError, match="`batches_per_file` must be at least 1, got 0"):
        _write(tmp_path, _batches(), batches_per_file=0)
    student, top = {"logits": jnp.asarray(S)}, top_logits(jnp.asarray(T), 3)
    with pytest.raises(ValueError, match=r"`temperature` is 2.0, and the teacher's outputs were kept at 1.0"):
        top_k_targets(temperature=2.0)(student, {"logits": top}, BATCH)
    with pytest.raises(ValueError, match=r"has shape \(2, 4, 36\) in the student and \(2, 4, 37\) in the teacher"):
        top_k_targets()({"logits": jnp.asarray(S[..., :36])}, {"logits": top}, BATCH)
    with pytest.raises(ValueError, match="must be its most likely classes, as `write_teacher_outputs` keeps them"):
        top_k_targets()(student, {"logits": jnp.asarray(T)}, BATCH)
    with pytest.raises(
        TypeError, match="Only the most likely classes of these logits are known: `top_k_targets` takes"
    ):
        soft_targets()(student, {"logits": top}, BATCH)
    with pytest.raises(ValueError, match="`rest` must be 'bucket' or 'renormalize'"):
        top_k_targets(rest="drop")
