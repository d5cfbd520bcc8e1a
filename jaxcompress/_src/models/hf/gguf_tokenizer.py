"""The tokenizer in a GGUF file, as the files of Hugging Face."""

import json
from pathlib import Path
from typing import Any

from jaxcompress._src.models.hf.gguf import read_gguf_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What `write_tokenizer` writes."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
"""How texts are split before merging, by `tokenizer.ggml.pre`; "smollm" and "gpt-2" have pieces of their own."""

CONTROL, USER_DEFINED = 3, 4
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def write_tokenizer(source: Path, directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` of a GGUF file.

    Args:
        source: the file; its tokenizer must be byte-level BPE: `tokenizer.ggml.model` "gpt2", and
            `tokenizer.ggml.pre` one of "smollm", "gpt-2", "llama-bpe", "qwen2".
        directory: to write to; must exist.

    Raises:
        ValueError: it has no tokenizer, or one of another kind.
    """
    fields = read_gguf_tokenizer(source)
    if (model := fields.get("ggml.model")) != "gpt2":
        raise ValueError(f"{str(source)!r} has a tokenizer of the kind {model!r}; supported: 'gpt2', byte-level BPE.")
    tokens = fields["ggml.tokens"]
    tokenizer = _byte_level_bpe(source, fields, tokens)
    special = {
        name: tokens[fields[f"ggml.{key}_token_id"]]
        for key, name in SPECIAL.items()
        if f"ggml.{key}_token_id" in fields
    }
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    if fields["context_length"] is not None:
        settings["model_max_length"] = int(fields["context_length"])
    if "chat_template" in fields:
        settings["chat_template"] = fields["chat_template"]
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _byte_level_bpe(source: Path, fields: dict[str, Any], tokens: list[str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind = fields.get("ggml.pre", "gpt-2")
    if kind not in ("smollm", "gpt-2", "default", *SPLITS):
        known = ", ".join(("smollm", "gpt-2", *SPLITS))
        raise ValueError(f"{str(source)!r} splits texts in the way {kind!r}; supported: {known}.")
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    # Of Llama 3 words that are tokens are not merged, by its own tokenizer.
    options = {"ignore_merges": True} if kind == "llama-bpe" else {}
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    if kind in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
        pieces = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
        prefix = bool(fields.get("ggml.add_space_prefix", False))
        pieces = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    kinds = fields.get("ggml.token_type", [])
    for token, of in zip(tokens, kinds, strict=False):
        if of in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=of == CONTROL, normalized=False)
            (tokenizer.add_special_tokens if of == CONTROL else tokenizer.add_tokens)([added])
    if fields.get("ggml.add_bos_token", False):
        first = tokens[fields["ggml.bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=f"{first} $A",
            pair=f"{first} $A {first} $B",
            special_tokens=[(first, fields["ggml.bos_token_id"])],
        )
    return tokenizer
