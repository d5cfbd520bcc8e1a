"""Compares jaxcompress's BERT with Hugging Face's Flax BERT on the same weights.

Needs transformers 4.57, the last line with Flax classes. The last line printed is JSON: the largest absolute
difference of logits and (with `--model`) cosines between the mean-pooled vectors of sentences, ours and theirs.

    python examples/parity/hf_flax_bert.py --quick
    python examples/parity/hf_flax_bert.py --model DIRECTORY      # config.json, model.safetensors, tokenizer.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from jaxcompress.models import from_pretrained

SENTENCES = {
    "guitar": "A man plays a guitar.",
    "instrument": "A person is playing an instrument.",
    "stock": "The stock market fell.",
    "shares": "Shares dropped sharply on Monday.",
}
PAIRS = (("guitar", "instrument"), ("stock", "shares"), ("guitar", "stock"), ("instrument", "shares"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--quick", action="store_true", help="a tiny random model")
    choice.add_argument("--model", type=Path, help="directory of a Hugging Face BERT")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as directory:
            make_tiny(Path(directory))
            figures = {"logits_max_abs_diff": logits_difference(Path(directory), random_inputs(vocab_size=60))}
    else:
        inputs = tokenized(arguments.model)
        figures = {
            "logits_max_abs_diff": logits_difference(arguments.model, inputs),
            "cosines": cosines(arguments.model, inputs),
        }
    print(json.dumps({"model": "tiny" if arguments.quick else arguments.model.name, **figures}))


def make_tiny(directory: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,  # so that every part matters to the logits
    )
    transformers.FlaxBertForSequenceClassification(config, seed=0).save_pretrained(directory)


def random_inputs(*, vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = (np.arange(12) < np.array([[12], [5], [1]])).astype(np.int32)
    ids = rng.integers(1, vocab_size, mask.shape, dtype=np.int32) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * (np.arange(12) > 3)}


def tokenized(directory: Path) -> dict[str, np.ndarray]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return dict(tokenizer(list(SENTENCES.values()), padding=True, return_tensors="np"))


def logits_difference(directory: Path, inputs: dict[str, np.ndarray]) -> float:
    """The same random classifier is put on both."""
    theirs = transformers.FlaxBertForSequenceClassification.from_pretrained(directory, num_labels=2)
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((theirs.config.hidden_size, 2)).astype(np.float32)
    classifier = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray([0.5, -0.5])}
    head = "sequence_classification"
    module, params = from_pretrained(directory, head=head, num_labels=2, key=jax.random.key(0))
    ours = module.apply({"params": {**params, "classifier": classifier}}, **inputs)["logits"]
    logits = theirs(**inputs, params={**theirs.params, "classifier": classifier}).logits
    return float(jnp.abs(ours - logits).max())


def cosines(directory: Path, inputs: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Of every pair: ours, theirs."""
    module, params = from_pretrained(directory, head="encoder", pooling="mean")
    ours = module.apply({"params": params}, **inputs)["pooler_output"]
    states = transformers.FlaxBertModel.from_pretrained(directory)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    theirs = (states * mask).sum(1) / mask.sum(1)
    rows = [
        dict(zip(SENTENCES, vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True), strict=True))
        for vectors in (ours, theirs)
    ]
    return {f"{a}/{b}": [round(float(row[a] @ row[b]), 4) for row in rows] for a, b in PAIRS}


if __name__ == "__main__":
    main()
