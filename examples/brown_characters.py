"""The Brown corpus as characters, and a language model of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from workbench import BROWN, brown, fetch, note

from jaxcompress.report import perplexity

DIRECTORY = Path(__file__).parent / "gpt2_brown"
WINDOW = 128


class Characters(NamedTuple):
    """Texts as numbers of characters.

    Attributes:
        vocabulary: every character, in order; the first stands for those that training texts do not have.
        train: all files of the training part, one after another.
        held_out: of each file that is held out, its first 2,000 characters.
    """

    vocabulary: str
    train: np.ndarray
    held_out: list[np.ndarray]

    def bigram_perplexity(self) -> float:
        """Of counts of pairs in the training texts, one added to each."""
        size = len(self.vocabulary)
        counts = np.ones((size, size))
        np.add.at(counts, (self.train[:-1], self.train[1:]), 1)
        logs = np.log(counts / counts.sum(1, keepdims=True))
        return float(np.exp(-np.concatenate([logs[ids[:-1], ids[1:]] for ids in self.held_out]).mean()))


def characters() -> Characters:
    """Fetches the corpus; it stays in the cache."""
    corpus = brown(next(fetch(BROWN, note=note).glob("*.tgz")))
    train = "\n".join(corpus.train.values())
    vocabulary = "\0" + "".join(sorted(set(train)))
    numbers = {character: number for number, character in enumerate(vocabulary)}

    def ids(text: str) -> np.ndarray:
        return np.array([numbers.get(character, 0) for character in text], np.int32)

    return Characters(vocabulary, ids(train), [ids(text[:2000]) for text in corpus.held_out.values()])


def held_out_perplexity(module: Any, params: Any, text: Characters) -> float:
    """Of a character, given at least 64 before it."""

    def apply(params: Any, ids: Any, mask: Any) -> Any:
        return module.apply({"params": params}, ids, mask)["logits"]

    return perplexity(apply, params, text.held_out, window=WINDOW, batch_size=32).perplexity


def write_tokenizer(directory: Path, vocabulary: str) -> None:
    """Files of a tokenizer whose tokens are characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    numbers = {character: number for number, character in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="\0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "\0", "model_max_length": 256}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
