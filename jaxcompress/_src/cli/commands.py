"""What `compress`, `inspect` and `evaluate` do."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress._src.cli.figures import compare_logits, compare_tokens, compare_vectors
from jaxcompress._src.cli.language_models import language_model_figures
from jaxcompress._src.cli.paths import check_output_directory, check_output_file
from jaxcompress._src.cli.screen import Screen
from jaxcompress._src.models.families import config_of, family_of, head_of, resized
from jaxcompress._src.models.hf.companions import SentencePooling, companion_files, sentence_pooling
from jaxcompress._src.recipe.compress import compress as run_recipe
from jaxcompress._src.recipe.directories import LoadedModel, holds_compressed, load_model, save_compressed
from jaxcompress._src.recipe.predict import predict, token_divergence
from jaxcompress._src.recipe.recipe import read_recipe
from jaxcompress._src.recipe.text import Texts, read_texts
from jaxcompress._src.recipe.tokens import Tokens, has_tokenizer, tokenize
from jaxcompress._src.recipe.train import check_labels
from jaxcompress._src.report.size import SizeReport, size_report
from jaxcompress._src.report.table import format_bytes, leaf_table, total_table
from jaxcompress._src.tree.maps import leaves_with_paths


def run_compress(
    screen: Screen,
    model: Path,
    recipe: str,
    out: Path,
    *,
    data: Path | None,
    max_length: int | None,
    overwrite: bool,
) -> None:
    """Runs a recipe on a model and writes the result."""
    steps = read_recipe(recipe)
    if steps.needs_texts and data is None:
        does = "distils" if steps.distils else "calibrates"
        raise ValueError(f"The recipe {recipe!r} {does}: give --data, a CSV file with a column `text`.")
    check_output_directory(out, model, overwrite=overwrite)
    if holds_compressed(model):
        raise ValueError(f"{str(model)!r} is compressed already; compress the original model.")
    texts = None if data is None else read_texts(data)
    loaded = load_model(model)
    companion_files(model)
    tokens = None
    if texts is not None and not steps.needs_texts:
        screen.note(f"--data is not used: the recipe {recipe!r} needs no texts.")
    elif texts is not None and data is not None:
        if any(training and training.hard_labels for training in (steps.distil, steps.distil_shared)):
            _check_labels(loaded, texts, data)
        tokens = _tokenized(loaded, texts, max_length)
        _say_cut(screen, tokens, data)
    pooling = "mean" if tokens is None else _pooling(loaded)
    compressed = run_recipe(steps, loaded.module, loaded.params, tokens, pooling=pooling, progress=screen)
    module = resized(loaded.module, compressed) if steps.shrink else loaded.module
    path = save_compressed(out, module, compressed, source=model, recipe=steps, overwrite=overwrite)
    sizes = size_report(compressed, group_by=family_of(loaded.module).parts, disk_path=path)
    _show_sizes(screen, f"{model} → {out}", sizes)
    figures = {"checkpoint": str(path.resolve()), **_totals(sizes)}
    lines = [f"Written to {path}"]
    if steps.shrink:
        figures["bytes_original"] = sum(leaf.nbytes for _, leaf in leaves_with_paths(loaded.params))
        lines.insert(0, f"Before units were taken out: {format_bytes(figures['bytes_original'])}")
    screen.result(figures, lines=lines)


def run_inspect(screen: Screen, model: Path, *, leaves: bool) -> None:
    """Shows sizes, and where a compressed model comes from."""
    loaded = load_model(model)
    sizes = size_report(loaded.params, group_by=family_of(loaded.module).parts, disk_path=loaded.weights)
    if leaves:
        table = leaf_table(sizes)
        screen.table("Leaves", table.header, table.rows)
    _show_sizes(screen, str(model), sizes)
    figures: dict[str, Any] = sizes.to_dict()
    if loaded.compressed:
        manifest = read_manifest(loaded.weights)
        figures |= {"versions": dict(manifest.versions), "metadata": dict(manifest.metadata)}
    screen.result(figures)


def run_evaluate(
    screen: Screen,
    model: Path,
    data: Path,
    *,
    against: Path | None,
    outputs: Path | None,
    max_length: int | None,
) -> None:
    """Runs every row and compares with labels and with another model."""
    texts = read_texts(data)
    if outputs is not None:
        check_output_file(outputs, "--outputs", begins=b"PK")
    loaded = load_model(model)
    other = None if against is None else load_model(against)
    labels = _labels(screen, loaded, texts, data)
    if other is not None:
        _check_comparable(loaded, other, texts, data)
    if head_of(loaded.module).causal:
        if outputs is not None:
            raise ValueError(f"--outputs is not for {head_of(loaded.module).description}: it has none for a row.")
        figures = language_model_figures(screen, loaded, other, texts, window=max_length)
        screen.table(str(model), ("figure", "value"), [(name, _written(value)) for name, value in figures.items()])
        screen.result(figures)
        return
    if outputs is None and labels is None:
        screen.note("There is nothing to measure: give --against, or a classifier and a column `label`.")
    tokens, others = _token_pair(screen, loaded, other, texts, max_length, data)
    figures: dict[str, Any] = {"rows": len(tokens), "rows_cut": tokens.cut, "max_length": tokens.max_length}
    predictions = {}
    if labels is not None or outputs is not None or other is None or head_of(loaded.module).answer != "tokens":
        predictions = _predicted(screen, loaded, tokens)
    if outputs is not None:
        with outputs.open("wb") as file:
            np.savez(file, allow_pickle=False, **predictions)
    if labels is not None:
        known = labels >= 0
        figures["accuracy"] = float((predictions["logits"].argmax(-1) == labels)[known].mean())
        figures |= {} if known.all() else {"rows_with_label": int(known.sum())}
    if other is not None:
        figures |= _compared(screen, loaded, predictions, tokens, other, others, labels)
    screen.table(str(model), ("figure", "value"), [(name, _written(value)) for name, value in figures.items()])
    screen.result(figures)


def _predicted(screen: Screen, loaded: LoadedModel, tokens: Tokens) -> dict[str, np.ndarray]:
    pooling = _pooling(loaded)
    name = f"Running {loaded.directory}"
    return predict(loaded.module, loaded.params, tokens, pooling=pooling, progress=screen, name=name)


def _pooling(loaded: LoadedModel) -> SentencePooling:
    return sentence_pooling(loaded.directory) if head_of(loaded.module).answer == "vector" else "mean"


def _compared(
    screen: Screen,
    loaded: LoadedModel,
    predictions: dict[str, np.ndarray],
    tokens: Tokens,
    other: LoadedModel,
    others: Tokens,
    labels: np.ndarray | None,
) -> dict[str, Any]:
    """Classifiers are compared by their logits, encoders by sentence vectors, masked LMs by their distributions."""
    answer = head_of(loaded.module).answer
    if answer == "tokens":
        name = f"Comparing {loaded.directory} and {other.directory}"
        both = (loaded.module, loaded.params, other.module, other.params)
        return compare_tokens(*token_divergence(*both, tokens, progress=screen, name=name))
    wanted = _predicted(screen, other, others)
    if answer == "vector":
        return compare_vectors(wanted["sentence_vector"], predictions["sentence_vector"])
    return compare_logits(wanted["logits"], predictions["logits"], labels)


def _labels(screen: Screen, loaded: LoadedModel, texts: Texts, data: Path) -> np.ndarray | None:
    """The labels, if there are any that the model can have."""
    if not (texts.labels >= 0).any():
        return None
    head = head_of(loaded.module)
    if head.answer != "classes":
        screen.note(f"The column `label` is not used: {head.description} has no classes.")
        return None
    _check_labels(loaded, texts, data)
    if missing := int((texts.labels < 0).sum()):
        screen.note(f"{missing} of {len(texts)} rows have no label and do not count for the accuracy.")
    return texts.labels


def _token_pair(
    screen: Screen,
    loaded: LoadedModel,
    other: LoadedModel | None,
    texts: Texts,
    max_length: int | None,
    data: Path,
) -> tuple[Tokens, Tokens]:
    """The rows as each model reads them, cut at the same length."""
    tokens = others = _tokenized(loaded, texts, max_length)
    if other is not None:
        directory = other.directory
        if not has_tokenizer(directory):
            screen.note(f"{directory} has no tokenizer: it reads the rows by that of {loaded.directory}.")
            directory = loaded.directory
        others = _tokenized(other, texts, max_length, directory)
        limit = min(tokens.max_length, others.max_length)
        if tokens.max_length > limit:
            tokens = _tokenized(loaded, texts, limit)
        if others.max_length > limit:
            others = _tokenized(other, texts, limit, directory)
        if head_of(loaded.module).answer == "tokens" and tokens.ids != others.ids:
            raise ValueError(
                f"{str(loaded.directory)!r} and {str(other.directory)!r} split texts into different tokens: "
                "their distributions cannot be compared."
            )
    _say_cut(screen, tokens, data)
    return tokens, others


def _tokenized(loaded: LoadedModel, texts: Texts, max_length: int | None, directory: Path | None = None) -> Tokens:
    return tokenize(directory or loaded.directory, texts, max_length=max_length, config=config_of(loaded.module))


def _say_cut(screen: Screen, tokens: Tokens, data: Path) -> None:
    if tokens.cut:
        screen.note(f"{tokens.cut} of {len(tokens)} rows of {data} are cut to {tokens.max_length} tokens.")


def _check_comparable(loaded: LoadedModel, other: LoadedModel, texts: Texts, data: Path) -> None:
    """Raises a `ValueError` when two models have nothing in common that could be compared."""
    names = f"{str(loaded.directory)!r} and {str(other.directory)!r} cannot be compared:"
    heads = [head_of(each.module) for each in (loaded, other)]
    if heads[0].answer != heads[1].answer:
        raise ValueError(f"{names} {heads[0].description} and {heads[1].description}.")
    ours, theirs = (config_of(each.module) for each in (loaded, other))
    compared = {"vector": "hidden_size", "tokens": "vocab_size", "classes": "num_labels"}[heads[0].answer]
    if getattr(ours, compared) != getattr(theirs, compared):
        raise ValueError(f"{names} `{compared}` is {getattr(ours, compared)} and {getattr(theirs, compared)}.")
    if ours.id2label and theirs.id2label and ours.id2label != theirs.id2label:
        raise ValueError(f"{names} their classes are {ours.id2label} and {theirs.id2label}.")
    if len(texts) < 2:
        raise ValueError(f"{str(data)!r} has one row; --against needs two or more, for the intervals.")


def _check_labels(loaded: LoadedModel, texts: Texts, data: Path) -> None:
    if head_of(loaded.module).answer == "classes":
        try:
            check_labels(loaded.module, texts.labels)
        except ValueError as err:
            raise ValueError(f"{str(data)!r}: {err}") from err


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _show_sizes(screen: Screen, title: str, sizes: SizeReport) -> None:
    table = total_table(sizes)
    screen.table(title, table.header, table.rows)


def _totals(sizes: SizeReport) -> dict[str, Any]:
    return {
        "bytes_dense": sizes.total.dense_bytes,
        "bytes_stored": sizes.total.stored_bytes,
        "bytes_disk": sizes.disk_bytes,
    }
