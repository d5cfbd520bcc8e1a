"""The tokenizer of a model as fields of a GGUF file: copied from one, or made of a `tokenizer.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcompress._src.export.gguf_fields import Field
from jaxcompress._src.models.hf.gguf import gguf_reader, is_gguf
from jaxcompress._src.models.hf.gguf_tokenizer import CONTROL, SPECIAL, SPLITS, USER_DEFINED

_NORMAL, _UNUSED = 1, 5


def tokenizer_fields(source: Path | None, *, vocab_size: int) -> dict[str, Field]:
    """The fields of a tokenizer.

    Args:
        source: a GGUF file, whose fields are copied; a directory with the `tokenizer.json` of a byte-level BPE; None:
            fields that say that there is no tokenizer.
        vocab_size: rows of the embedding. Tokens that the tokenizer lacks become unused ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tokenizer of another kind, or one with more tokens than the embedding has rows.
    """
    if source is None:
        return {"tokenizer.ggml.model": Field("none")}
    if is_gguf(source):
        read = gguf_reader(source).fields
        fields = {
            name: Field(field.contents(), tuple(field.types))
            for name, field in read.items()
            if "tokenizer." in name[:10]
        }
        if "tokenizer.ggml.tokens" not in fields:
            raise ValueError(f"{str(source)!r} has no tokenizer.")
        count, made = len(fields["tokenizer.ggml.tokens"].value), f"{str(source)!r}"
    else:
        path = source / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no tokenizer.json in {str(source)!r}. Without `source=` the file holds no tokenizer."
            )
        try:
            fields = _byte_level_bpe(_json(path), source, vocab_size)
        except ValueError as err:
            raise ValueError(
                f"{str(path)!r} cannot be written as GGUF: {err} Without `source=` the file holds no tokenizer."
            ) from err
        count, made = len(fields["tokenizer.ggml.tokens"].value), f"{str(path)!r}"
    if count != vocab_size:
        raise ValueError(f"{made} has {count} tokens, and the embedding {vocab_size} rows.")
    return fields


def _byte_level_bpe(tokenizer: Mapping[str, Any], directory: Path, vocab_size: int) -> dict[str, Field]:
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"its model is {model.get('type')!r}; supported: 'BPE', on bytes.")
    kind, prefix = _split(tokenizer)
    if bool(model.get("ignore_merges", False)) != (kind == "llama-bpe"):
        raise ValueError(f"`ignore_merges` is {model.get('ignore_merges', False)} of a tokenizer of the kind {kind!r}.")
    normalizer = tokenizer.get("normalizer")
    if (normalizer or {}).get("type") != ("NFC" if kind == "qwen2" else None):
        raise ValueError(f"its normalizer is {normalizer!r:.80}, which none of the kind {kind!r} has.")
    added = {int(token["id"]): token for token in tokenizer.get("added_tokens") or ()}
    by_id = {int(index): token for token, index in model["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    if by_id and max(by_id) >= vocab_size:
        raise ValueError(f"it has a token of id {max(by_id)}, and the embedding {vocab_size} rows.")
    types = [_NORMAL if index in by_id else _UNUSED for index in range(vocab_size)]
    for index, token in added.items():
        types[index] = CONTROL if token.get("special") else USER_DEFINED
    values: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": kind,
        "ggml.tokens": [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        "ggml.token_type": types,
        "ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        **_special(directory, by_id, tokenizer),
    }
    if prefix:
        values["ggml.add_space_prefix"] = True
    if template := _chat_template(directory):
        values["chat_template"] = template
    return {f"tokenizer.{name}": Field(value) for name, value in values.items()}


def _split(tokenizer: Mapping[str, Any]) -> tuple[str, bool]:
    """How texts are split before merging, by the names of llama.cpp, and whether a space comes first."""
    outer = tokenizer.get("pre_tokenizer") or {}
    *pieces, last = outer.get("pretokenizers", [outer]) or [{}]
    if last.get("type") != "ByteLevel":
        raise ValueError(f"its pre-tokenizer ends with {last.get('type')!r}; supported: 'ByteLevel'.")
    prefix, regex = bool(last.get("add_prefix_space")), last.get("use_regex", True)
    if regex and not pieces:
        return "gpt-2", prefix
    if regex and [(each.get("type"), each.get("individual_digits")) for each in pieces] == [("Digits", True)]:
        return "smollm", prefix
    if not regex and len(pieces) == 1 and pieces[0].get("type") == "Split" and not prefix:
        pattern = (pieces[0].get("pattern") or {}).get("Regex")
        for kind, expression in SPLITS.items():
            if (pattern, pieces[0].get("behavior"), pieces[0].get("invert", False)) == (expression, "Isolated", False):
                return kind, False
    raise ValueError(f"its pre-tokenizer is none of 'gpt-2', 'smollm', {', '.join(map(repr, SPLITS))}: {outer!r:.200}.")


def _special(directory: Path, by_id: Mapping[int, str], tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens, and whether texts begin with one."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            settings |= {key: value for key, value in _json(directory / name).items() if value is not None}
    ids, fields = {token: index for index, token in by_id.items()}, {}
    for key, name in SPECIAL.items():
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            fields[f"ggml.{key}_token_id"] = ids[token]
    first = _first_token(tokenizer.get("post_processor"))
    if first is not None and ids.get(first) != fields.get("ggml.bos_token_id", -1):
        raise ValueError(f"texts begin with {first!r}, which is not `bos_token`.")
    return fields | {"ggml.add_bos_token": first is not None}


def _first_token(processor: Mapping[str, Any] | None) -> str | None:
    """The token that texts begin with."""
    first = None
    for each in (processor or {}).get("processors", [processor]):
        kind = (each or {}).get("type", "ByteLevel")
        if kind == "ByteLevel":
            continue
        single = (each or {}).get("single") or []
        tokens = [part["SpecialToken"]["id"] for part in single[:-1] if "SpecialToken" in part]
        if kind != "TemplateProcessing" or len(tokens) != 1 or len(single) != 2 or "Sequence" not in single[-1]:
            raise ValueError(f"its post-processor is {kind!r}, which adds other tokens than one at the beginning.")
        first = tokens[0]
    return first


def _chat_template(directory: Path) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = directory / "tokenizer_config.json"
    template = _json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{str(path)!r} is not JSON: {err}.") from err
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object.")
    return content
