"""Texts and batches: every row once, in shapes that are known beforehand."""

import hashlib

import numpy as np
import pytest

from jaxcompress import recipe
from jaxcompress._src.recipe.text import read_texts, rotten_tomatoes
from jaxcompress._src.recipe.tokens import evaluation_batches, example_batches, training_batches


def _tokens(lengths):
    ids = tuple(tuple(range(1, n + 1)) for n in lengths)
    return recipe.Tokens(ids=ids, labels=np.arange(len(lengths), dtype=np.int32), pad_id=0)


def test_a_pass_holds_every_row_at_most_once_and_loses_less_than_a_batch():
    rng = np.random.default_rng(0)
    tokens = _tokens(rng.integers(1, 40, size=103))
    batches = list(training_batches(tokens, batch_size=8, widths=(10, 20, 30), rng=np.random.default_rng(1)))
    rows = np.concatenate([batch["row"] for batch in batches])
    assert len(rows) == len(set(rows.tolist())) == 103 // 8 * 8
    for batch in batches:
        assert batch["input_ids"].shape in {(8, 10), (8, 20), (8, 30)}
        for row, ids, mask in zip(batch["row"], batch["input_ids"], batch["attention_mask"], strict=True):
            kept = min(len(tokens.ids[row]), ids.shape[0])
            assert mask.sum() == kept
            assert ids[:kept].tolist() == list(tokens.ids[row][:kept])
            assert (ids[kept:] == 0).all()


def test_passes_are_shuffled_and_reproducible():
    tokens = _tokens([5] * 40)

    def rows(seed):
        batches = training_batches(tokens, batch_size=8, widths=(8,), rng=np.random.default_rng(seed))
        return np.concatenate([batch["row"] for batch in batches]).tolist()

    assert rows(0) == rows(0) != rows(1)


def test_evaluation_sees_every_row_once():
    tokens = _tokens([3, 50, 9, 9, 1, 30, 12])
    batches = list(evaluation_batches(tokens, batch_size=4, widths=(10, 20)))
    rows = np.concatenate([batch["row"] for batch in batches])
    assert sorted(rows[rows >= 0].tolist()) == list(range(7))
    assert {batch["input_ids"].shape for batch in batches} == {(4, 10), (4, 20)}


def test_examples_are_all_rows_once_and_only_the_last_batch_is_small():
    tokens = _tokens(np.random.default_rng(0).integers(1, 40, size=103))
    batches = list(example_batches(tokens, batch_size=8, widths=(10, 20, 40)))
    assert sorted(np.concatenate([batch["row"] for batch in batches]).tolist()) == list(range(103))
    assert [len(batch["row"]) for batch in batches] == [8] * 12 + [7]
    assert batches[-1]["input_ids"].shape == (7, 40)
    assert all(
        batch["attention_mask"].sum(1).tolist() == [len(tokens.ids[i]) for i in batch["row"]] for batch in batches
    )
    assert not list(example_batches(_tokens([]), batch_size=8, widths=(10,)))


def test_the_split_is_by_hash_and_leaves_other_sources_out(tmp_path):
    path = tmp_path / "reviews.csv"
    lines = [f'"row {i}",{i % 2},rotten_tomatoes' for i in range(1600)] + ['"other",1,imdb']
    path.write_text("\n".join(["text,label,source", *lines]))
    split = rotten_tomatoes(path)
    assert [len(part) for part in (split.test, split.validation, split.train)] == [1000, 500, 100]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in (*split.test.texts, *split.train.texts)]
    assert hashes == sorted(hashes)
    assert split.train.labels[0] == int(split.train.texts[0].split()[1]) % 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence,label\na,1", "needs a column `text`, its columns are sentence, label"),
        ("", "its columns are none"),
        ("text,label", "has no rows"),
        ("text,label\na,1\nb,good", "line 3: the label must be an integer, found 'good'"),
    ],
)
def test_mistakes_in_data_are_named(tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_texts(path)
    assert "rows.csv" in str(caught.value)


def test_labels_are_optional(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\nfirst\nsecond")
    assert read_texts(path).labels.tolist() == [-100, -100]
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_texts(tmp_path / "absent.csv")


def test_tokenizing_adds_the_special_tokens_and_cuts(bert_directory):
    texts = recipe.Texts(texts=("the good film", "bad " * 50), labels=np.zeros(2, np.int32))
    tokens = recipe.tokenize(bert_directory, texts, max_length=16)
    assert tokens.ids[0] == (2, 9, 5, 7, 3)
    assert len(tokens.ids[1]) == 16
    assert tokens.pad_id == 0
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.txt"):
        recipe.tokenize(bert_directory / "absent", texts)
