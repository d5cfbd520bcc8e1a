"""Recipes that let weights share values, on a tiny BERT: what is kept, what is trained, what the file holds."""

import dataclasses

import jax
import numpy as np
import pytest
from small_bert import small_classifier

from jaxcompress import checkpoint, recipe, tree
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.recipe import compress as _compress
from jaxcompress._src.recipe.compress import without_distillation
from jaxcompress._src.recipe.recipe import Recipe, Saving
from jaxcompress._src.recipe.steps import read_step
from jaxcompress._src.recipe.text import read_texts
from jaxcompress._src.report.disk import disk_bytes
from jaxcompress.arrays import CodebookArray, QuantizedArray
from jaxcompress.models import from_pretrained
from jaxcompress.recipe import Training

ENCODER, EMBEDDINGS = "bert/encoder/.*/kernel", "bert/embeddings/.*/embedding"
FEED_FORWARD, ATTENTION = "bert/encoder/.*(intermediate|output)/dense/kernel", "bert/encoder/.*self/.*/kernel"
PRUNE = read_step("prune", {"select": ENCODER, "sparsity": 0.5, "every": 1})
SHARE = read_step("cluster", {"select": FEED_FORWARD, "values": 4})
FROZEN = read_step("cluster", {"select": EMBEDDINGS, "values": 8, "rate": 0.01, "frozen": True})
INT4 = read_step("quantize", {"select": ATTENTION, "bits": 4})
DISTIL = Training(epochs=1, learning_rate=3e-3, soft_targets=1.0, widths=(16,))
SLOWLY = Training(epochs=1, learning_rate=1e-3, soft_targets=1.0, widths=(16,), weight_decay=0.1)
CLOSER = Training(epochs=10, learning_rate=1e-3, pooled=1.0, widths=(16,))
WHOLE = Recipe(
    prune=(PRUNE,), quantize=(INT4,), cluster=(SHARE, FROZEN), distil=DISTIL, distil_shared=SLOWLY,
    save=Saving(storage="entropy"),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(bert_directory):
    return from_pretrained(bert_directory)


@pytest.fixture(scope="module")
def tokens(bert_directory, data_file):
    return recipe.tokenize(bert_directory, read_texts(data_file))


@pytest.fixture(scope="module")
def compressed(model, tokens):
    return recipe.compress(WHOLE, *model, tokens)


def _leaves(params, pattern):
    marks = jax.tree.leaves(tree.by_path(pattern)(params))
    return [leaf for (_, leaf), mark in zip(tree.leaves_with_paths(params), marks, strict=True) if mark]


def _zeros(leaf):
    return float((np.asarray(leaf.materialize()) == 0).mean())


def test_every_step_acts_on_its_leaves(compressed):
    shared, frozen, rounded = (_leaves(compressed, select) for select in (FEED_FORWARD, EMBEDDINGS, ATTENTION))
    assert (len(shared), len(frozen), len(rounded)) == (6, 3, 6)
    assert all(isinstance(leaf, CodebookArray) and leaf.table.shape[-1] == 3 for leaf in shared)
    assert all(isinstance(leaf, CodebookArray) and leaf.table.shape[-1] == 7 for leaf in frozen)
    assert all(isinstance(leaf, QuantizedArray) for leaf in rounded)
    assert all(0.5 <= _zeros(leaf) < 0.6 for leaf in [*shared, *rounded])
    assert all(str(leaf.table.dtype) == "bfloat16" for leaf in shared)


def test_the_second_part_trains_values_and_leaves_finished_leaves_alone(model, tokens, compressed):
    """Frozen leaves are those of the start; what the first part rounded has its bits in the second."""
    module, params = model
    once = recipe.compress(without_distillation(WHOLE), module, params)
    for kept, wanted in zip(_leaves(compressed, EMBEDDINGS), _leaves(once, EMBEDDINGS), strict=True):
        np.testing.assert_array_equal(kept.materialize(), wanted.materialize())
    first = recipe.compress(Recipe(prune=(PRUNE,), quantize=(INT4,), cluster=(FROZEN,), distil=DISTIL), *model, tokens)
    for kept, wanted in zip(_leaves(compressed, ATTENTION), _leaves(first, ATTENTION), strict=True):
        np.testing.assert_array_equal(kept.materialize(), wanted.materialize())
    for kept, pruned in zip(_leaves(compressed, FEED_FORWARD), _leaves(first, FEED_FORWARD), strict=True):
        assert isinstance(pruned, SparseArray)
        np.testing.assert_array_equal(kept.codes() == 0, pruned.materialize() == 0)
    biases = [_leaves(params, ".*/bias") for params in (compressed, first)]
    assert all(np.abs(x - y).max() > 0 for x, y in zip(*biases, strict=True))


def test_without_pruning_or_quantization_there_is_one_part_and_it_brings_the_outputs_closer(model, tokens):
    module, params = model
    moving = read_step(
        "cluster", {"select": ENCODER, "values": 4, "until": 0.5, "every": 1, "store": "sparse", "rate": 0.05}
    )
    found = recipe.compress(Recipe(cluster=(moving,), distil=CLOSER), module, params, tokens)
    still = recipe.compress(Recipe(cluster=(moving,)), module, params)
    pairs = list(zip(_leaves(found, ENCODER), _leaves(still, ENCODER), strict=True))
    assert all(isinstance(leaf.data, SparseArray) for leaf, _ in pairs)
    assert any((leaf.codes() != start.codes()).any() for leaf, start in pairs)
    wanted, far, near = (recipe.predict(module, p, tokens)["pooler_output"] for p in (params, still, found))
    assert np.abs(near - wanted).mean() < 0.7 * np.abs(far - wanted).mean()


def test_pruning_survives_weights_that_move_between_values(model, tokens):
    prune = read_step("prune", {"select": ENCODER, "sparsity": 0.9, "every": 1})
    moving = read_step("cluster", {"select": ENCODER, "values": 4, "until": 0.5, "every": 1})
    pruned = recipe.compress(Recipe(prune=(prune,), distil=DISTIL), *model, tokens)
    found = recipe.compress(Recipe(prune=(prune,), cluster=(moving,), distil=DISTIL), *model, tokens)
    for leaf, before in zip(_leaves(found, ENCODER), _leaves(pruned, ENCODER), strict=True):
        assert _zeros(before) > 0.89
        np.testing.assert_array_equal(leaf.materialize() == 0, before.materialize() == 0)


def test_the_teacher_reads_rows_as_each_part_cuts_them(tokens, monkeypatch):
    """The model has 16 positions, and would stop at rows that are padded to 24; parts that cut alike ask once."""
    small = small_classifier(hidden_size=16, num_attention_heads=2, intermediate_size=32)
    params = jax.jit(small.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    narrow, wide = (dataclasses.replace(DISTIL, widths=widths) for widths in ((8,), (8, 12)))
    asked = []

    def spy(*arguments, widths=None, **options):
        asked.append(widths)
        return recipe.predict(*arguments, widths=widths, **options)

    def untrained(_module, student, *_, transform, **__):
        # Which rows the teacher reads is settled before the first step.
        return student, transform.init(student, key=jax.random.key(0))

    monkeypatch.setattr(_compress, "predict", spy)
    monkeypatch.setattr(_compress, "train", untrained)
    for first, second, expected in ((narrow, None, [(8,)]), (narrow, wide, [(8,), (8, 12)])):
        asked.clear()
        parts = Recipe(quantize=(INT4,), cluster=(SHARE,), distil=first, distil_shared=second)
        recipe.compress(parts, small, params, tokens)
        assert asked == expected


def test_without_distil_pruning_and_rounding_are_done_before_the_training_of_shared_values(model, tokens, monkeypatch):
    def untrained(_module, student, *_, transform, **__):
        return student, transform.init(student, key=jax.random.key(0))

    monkeypatch.setattr(_compress, "train", untrained)
    parts = Recipe(prune=(PRUNE,), quantize=(INT4,), cluster=(SHARE,), distil_shared=CLOSER)
    assert [name for name, _ in parts.at_once] == ["[[prune]] 1", "[[quantize]] 1"]
    found = recipe.compress(parts, *model, tokens)
    shared, rounded = _leaves(found, FEED_FORWARD), _leaves(found, ATTENTION)
    assert all(isinstance(leaf, CodebookArray) for leaf in shared)
    assert all(isinstance(leaf, QuantizedArray) for leaf in rounded)
    assert all(0.5 <= _zeros(leaf) < 0.6 for leaf in [*shared, *rounded])


def test_leaves_that_are_pruned_a_little_before_a_training_are_not_filled_by_it(model, tokens, monkeypatch):
    """A bit mask costs more than it saves here, and still: a plain leaf would train."""
    seen = []

    def spy(_module, student, *_, transform, trainable, **__):
        marks = dict(tree.leaves_with_paths(trainable(student)))
        seen.extend(
            mark for path, mark in marks.items() if path.startswith("bert/encoder/") and path.endswith("kernel")
        )
        return student, transform.init(student, key=jax.random.key(0))

    monkeypatch.setattr(_compress, "train", spy)
    little = read_step("prune", {"method": "magnitude", "select": ENCODER, "sparsity": 0.01})
    found = recipe.compress(Recipe(prune=(little,), distil=CLOSER), *model, tokens)
    assert seen == [False] * 12
    assert all(0 < _zeros(leaf) < 0.02 for leaf in _leaves(found, ENCODER))


def test_the_file_is_smaller_and_comes_back_bit_for_bit(compressed, tmp_path):
    for storage in ("orbax", WHOLE.save.storage):
        checkpoint.save(tmp_path / storage, compressed, storage=storage)
    assert disk_bytes(tmp_path / "entropy") < 0.9 * disk_bytes(tmp_path / "orbax")
    restored, _ = checkpoint.restore(tmp_path / "entropy")
    assert jax.tree.structure(restored) == jax.tree.structure(compressed)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(compressed), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            {"quantize": (INT4,), "cluster": (read_step("cluster", {"select": ENCODER, "values": 4}),)},
            r"\[\[quantize\]\] 1 and in",
        ),
        ({"cluster": (SHARE, SHARE)}, r"output/dense/kernel' is in \[\[cluster\]\] 1 and in \[\[cluster\]\] 2"),
        (
            {
                "prune": (PRUNE,),
                "cluster": (read_step("cluster", {"select": ENCODER, "values": 4, "frozen": True}),),
                "distil": DISTIL,
            },
            "frozen by",
        ),
        (
            {"prune": (PRUNE,), "cluster": (read_step("cluster", {"select": ENCODER, "values": 4, "zero": False}),)},
            "`zero` must be true",
        ),
        (
            {"cluster": (SHARE, read_step("cluster", {"select": "none", "values": 4}))},
            r"\[\[cluster\]\] 2: .* matches no leaf",
        ),
        ({"cluster": (SHARE,), "distil_shared": DISTIL}, "it needs texts"),
    ],
)
def test_contradictions_are_found_before_anything_runs(model, steps, message):
    with pytest.raises(ValueError, match=message):
        recipe.compress(Recipe(**steps), *model)
