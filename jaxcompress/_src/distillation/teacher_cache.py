"""A teacher's outputs on disk: written once, batch by batch, and read in the same order at every later epoch or run.

A directory holds `manifest.json` (who wrote what) and files of some batches each, which appear whole or not at all.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxcompress._src.distillation.deferred_logits import logits_of
from jaxcompress._src.distillation.objective import Apply
from jaxcompress._src.distillation.outputs import named
from jaxcompress._src.distillation.top_logits import TopLogits, top_logits
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import Params

Batch = Mapping[str, Any]

_VERSION = 1
_MANIFEST = "manifest.json"


def write_teacher_outputs(
    directory: str | os.PathLike[str],
    apply: Apply,
    params: Params,
    batches: Iterable[Batch],
    *,
    top_k: int | None = 64,
    temperature: float = 1.0,
    logits: str = "logits",
    outputs: Sequence[str] = (),
    dtype: DTypeLike | None = None,
    compared: Sequence[str] | None = None,
    batches_per_file: int = 64,
) -> int:
    """Runs a teacher over batches once and keeps its most likely classes, and other outputs whole.

    Of the logits, for each position k log probabilities (float32) and classes (16 bits up to 65,536 classes), and the
    logarithm of the rest's mass: 388 bytes a token for k = 64, where 50,257 float32 logits have 201,028.

    Written files stay: after a kill, the same call goes over them (it compares the batches, and does not run the
    teacher) and continues where they end. One process writes a directory.

    Args:
        directory: new, empty, or one that the same call has begun.
        apply: the teacher, `(params, batch, *, key, train) -> outputs by name`, called with `key=None, train=False`.
        params: its parameters; may have compressed leaves.
        batches: arrays by name, in the order of the training; at the end of the data they must end.
        top_k: how many classes to keep of the logits; None: no logits.
        temperature: of the softmax whose probabilities are kept; `top_k_targets` must have the same.
        logits: name of the logits among the outputs; they may be `deferred_logits`.
        outputs: names of outputs that are kept whole, such as `("hidden_states",)` of a model with a `tap`: arrays or
            sequences of arrays.
        dtype: floats of these are stored as this, such as `jnp.bfloat16`; None: as they are.
        compared: entries of a batch that tell whether it is the same when it is read; None: all.
        batches_per_file: how many batches share a file: what a kill may cost.

    Returns:
        The number of batches in the directory.

    Raises:
        ValueError: the directory was written by another teacher, with other options or from other batches; no batches;
            nothing to keep; a missing output, or one that is no array.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, optax
        >>> from jaxcompress.distillation import make_train_step, top_k_targets
        >>> def apply(params, batch, *, key, train):
        ...     return {"logits": batch["x"] @ params["kernel"]}
        >>> batches = [{"x": jax.random.normal(jax.random.key(i), (4, 3))} for i in range(5)]
        >>> teacher = {"kernel": jax.random.normal(jax.random.key(9), (3, 20))}
        >>> directory = tempfile.mkdtemp()
        >>> write_teacher_outputs(directory, apply, teacher, batches, top_k=4)
        5
        >>> init_state, step = make_train_step(apply, None, optax.adam(0.1), losses={"soft": top_k_targets()})
        >>> state = init_state({"kernel": jnp.zeros((3, 20))}, key=jax.random.key(0))
        >>> for epoch in range(2):
        ...     for batch in read_teacher_outputs(directory, batches, params=teacher):
        ...         state, metrics = step(state, None, batch)
        >>> int(state.step)
        10
    """
    if top_k is None and not outputs:
        raise ValueError("`top_k` is None and `outputs` is empty: there is nothing to keep.")
    for name, value in (("top_k", top_k), ("batches_per_file", batches_per_file)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    directory = Path(directory)
    settings = {
        "top_k": top_k,
        "temperature": temperature,
        "logits": logits,
        "outputs": list(outputs),
        "dtype": None if dtype is None else jnp.dtype(dtype).name,
        "compared": None if compared is None else sorted(compared),
        "batches_per_file": batches_per_file,
    }
    manifest = _begun(directory, {"version": _VERSION, "teacher": fingerprint(params), "settings": settings})
    run = jax.jit(lambda params, batch: _kept(execute(apply)(params, batch, key=None, train=False), settings))
    total, source = 0, iter(batches)
    for number in itertools.count():
        group = list(itertools.islice(source, batches_per_file))
        if group and not _is_written(
            directory, number, prints := [_fingerprint_of(batch, compared) for batch in group]
        ):
            _write_file(directory, number, prints, [jax.device_get(run(params, dict(batch))) for batch in group])
        total += len(group)
        if len(group) < batches_per_file:
            break
    if not total:
        raise ValueError("`batches` is empty: there is nothing to run the teacher on.")
    total = max(total, manifest.get("batches") or 0)
    _write_manifest(directory, manifest | {"batches": total})
    return total


def read_teacher_outputs(
    directory: str | os.PathLike[str], batches: Iterable[Batch], *, params: Params | None = None, start: int = 0
) -> Iterator[dict[str, Any]]:
    """The batches, each with the teacher's outputs on it under "teacher", as `make_train_step(apply, None, ...)` reads.

    Args:
        directory: of `write_teacher_outputs`.
        batches: those that it was written from, in the same order; for each epoch, call again.
        params: of the teacher that it should be of; None: not compared.
        start: number of the first of these batches among those written, where a training goes on.

    Returns:
        An iterator over dicts: the batch, and "teacher": the most likely classes under the name of the logits, and the
        other outputs, as NumPy arrays.

    Raises:
        ValueError: no such directory, one that is not finished or was written by another teacher; from the iterator: a
            batch that is not the one the teacher saw, or one batch more; a damaged file.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> directory, batches = tempfile.mkdtemp(), [{"x": jnp.arange(3.0)[None]}]
        >>> def apply(params, batch, *, key, train):
        ...     return {"x": 2 * batch["x"]}
        >>> write_teacher_outputs(directory, apply, {}, batches, logits="x", top_k=2)
        1
        >>> (batch,) = read_teacher_outputs(directory, batches)
        >>> batch["teacher"]["x"].indices.tolist()
        [[2, 1]]
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    if manifest is None:
        raise ValueError(f"There are no teacher outputs in {str(directory)!r}: `write_teacher_outputs` makes them.")
    if params is not None:
        _check_same("teacher", manifest["teacher"], fingerprint(params), directory)
    if manifest["batches"] is None:
        raise ValueError(
            f"The teacher outputs in {str(directory)!r} are not finished: the same `write_teacher_outputs` continues."
        )
    return _read_batches(directory, manifest, batches, start)


def fingerprint(tree: Any) -> str:
    """Paths, dtypes, shapes and values of all leaves, as one hash. Integers of any width and bools are alike."""
    digest = hashlib.sha256()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        if array.dtype.kind in "iub":
            array = array.astype(np.int64)
        digest.update(f"{path_string(keys)} {array.dtype.name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _fingerprint_of(batch: Batch, compared: Sequence[str] | None) -> str:
    names = sorted(batch) if compared is None else sorted(compared)
    return fingerprint({name: named(batch, name, "batch") for name in names})


def _kept(outputs: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored of the outputs of a batch."""
    kept: dict[str, Any] = {}
    for name in settings["outputs"]:
        value = named(outputs, name, "teacher")
        arrays = list(value) if isinstance(value, tuple | list) else value
        if not all(isinstance(leaf, jax.Array) for leaf in (arrays if isinstance(arrays, list) else [arrays])):
            raise ValueError(f"The teacher's {name!r} must be an array or a sequence of arrays, got {type(value)}.")
        kept[name] = jax.tree.map(lambda leaf: _narrowed(leaf, settings["dtype"]), arrays)
    if settings["top_k"] is not None:
        logits = logits_of(outputs, settings["logits"], "teacher")
        if settings["top_k"] > logits.shape[-1]:
            raise ValueError(f"`top_k` is {settings['top_k']}, and there are only {logits.shape[-1]} classes.")
        kept[settings["logits"]] = top_logits(logits, settings["top_k"], temperature=settings["temperature"])
    return kept


def _narrowed(array: jax.Array, dtype: str | None) -> jax.Array:
    return array if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating) else array.astype(dtype)


def _begun(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest that is there, checked, or a new one."""
    directory.mkdir(parents=True, exist_ok=True)
    before = _read_manifest(directory)
    if before is None:
        if any(directory.iterdir()):
            raise ValueError(f"{str(directory)!r} is not empty, and has no manifest of teacher outputs.")
        manifest = manifest | {"batches": None}
        _write_manifest(directory, manifest)
        return manifest
    _check_same("teacher", before["teacher"], manifest["teacher"], directory)
    for name, value in manifest["settings"].items():
        _check_same(name, before["settings"][name], value, directory)
    for leftover in directory.glob("*.tmp"):
        leftover.unlink()
    return before


def _check_same(name: str, before: Any, now: Any, directory: Path) -> None:
    if before == now:
        return
    if name == "teacher":
        raise ValueError(f"The outputs in {str(directory)!r} are those of another teacher: its parameters differ.")
    raise ValueError(f"The outputs in {str(directory)!r} were written with {name} = {before!r}, not {now!r}.")


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    path = directory / _MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{str(path)!r} is damaged or no manifest of teacher outputs: {err!r}.") from err
    if version != _VERSION:
        raise ValueError(f"{str(path)!r} has version {version}; this version of the library reads {_VERSION}.")
    return manifest


def _write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    _write_whole(directory / _MANIFEST, lambda path: path.write_text(json.dumps(manifest, indent=1), "utf-8"))


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that appears with all of its content, or not at all, also when the machine stops."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    for target in (temporary, path.parent):
        if target is not temporary:
            os.replace(temporary, path)
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _file(directory: Path, number: int) -> Path:
    return directory / f"outputs-{number:06d}.safetensors"


def _write_file(directory: Path, number: int, prints: list[str], batches: list[dict[str, Any]]) -> None:
    arrays: dict[str, np.ndarray] = {}
    layout: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for place, outputs in enumerate(batches):
        for name, value in outputs.items():
            parts, layout[name] = _parts(value)
            for part, leaf in parts.items():
                key = f"{place}/{name}/{part}"
                arrays[key], dtypes[key] = _storable(np.asarray(leaf))
    details = {"batches": prints, "layout": layout, "dtypes": dtypes}
    metadata = {"teacher_outputs": json.dumps(details)}
    _write_whole(_file(directory, number), lambda path: save_file(arrays, path, metadata=metadata))


def _parts(value: Any) -> tuple[dict[str, Any], Any]:
    """The arrays of an output by name, and what is needed to put them together again."""
    if isinstance(value, TopLogits):
        narrow = value.classes <= np.iinfo(np.uint16).max + 1
        indices = value.indices.astype(jnp.uint16 if narrow else jnp.int32)
        parts = {"log_probabilities": value.log_probabilities, "indices": indices, "log_rest": value.log_rest}
        return parts, {"classes": value.classes, "temperature": value.temperature}
    if isinstance(value, list):
        return {str(place): leaf for place, leaf in enumerate(value)}, len(value)
    return {"array": value}, None


def _storable(array: np.ndarray) -> tuple[np.ndarray, str]:
    """An array as safetensors takes it, and the name of its dtype: bfloat16 goes as 16 bits."""
    name = array.dtype.name
    return np.ascontiguousarray(array if array.dtype.kind in "fiub" else array.view(f"u{array.itemsize}")), name


def _put_together(parts: Callable[[str], np.ndarray], layout: Any) -> Any:
    if layout is None:
        return parts("array")
    if isinstance(layout, int):
        return tuple(parts(str(place)) for place in range(layout))
    return TopLogits(
        log_probabilities=parts("log_probabilities"), indices=parts("indices"), log_rest=parts("log_rest"), **layout
    )


def _is_written(directory: Path, number: int, prints: list[str]) -> bool:
    """Whether a file has the outputs of these batches.

    Raises:
        ValueError: it has those of others.
    """
    path = _file(directory, number)
    if not path.exists():
        return False
    with _opened(path) as (_, details):
        before = details["batches"]
    for place, (one, other) in enumerate(zip(before, prints, strict=False)):
        if one != other:
            raise ValueError(
                f"{str(path)!r} was written from other data: batch {place} of this file differs from the one given."
            )
    # A file that ended with the data is written again when there is more.
    return len(before) >= len(prints)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open file of outputs, and what it says of itself."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            details = json.loads((file.metadata() or {})["teacher_outputs"])
        except (SafetensorError, KeyError, ValueError, OSError) as err:
            raise ValueError(f"{str(path)!r} is damaged or no file of teacher outputs: {err!r}.") from err
        yield file, details


def _read_batches(
    directory: Path, manifest: Mapping[str, Any], batches: Iterable[Batch], start: int
) -> Iterator[dict[str, Any]]:
    settings, current, file, details = manifest["settings"], None, None, {}
    with contextlib.ExitStack() as stack:
        for position, batch in enumerate(batches, start):
            if position >= manifest["batches"]:
                raise ValueError(
                    f"{str(directory)!r} has the teacher outputs of {manifest['batches']} batches, no more."
                )
            number, place = divmod(position, settings["batches_per_file"])
            if number != current:
                stack.close()
                file, details = stack.enter_context(_opened(_file(directory, number)))
                current = number
            if _fingerprint_of(batch, settings["compared"]) != details["batches"][place]:
                raise ValueError(
                    f"Batch {position} is not the one whose teacher outputs are in {str(directory)!r}: other data, or "
                    "another order."
                )
            yield {**batch, "teacher": _outputs(file, details, place)}


def _outputs(file: Any, details: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The outputs of one batch of a file."""

    def of(name: str) -> Any:
        def part(part: str) -> np.ndarray:
            key = f"{place}/{name}/{part}"
            return file.get_tensor(key).view(jnp.dtype(details["dtypes"][key]))

        return _put_together(part, details["layout"][name])

    return {name: of(name) for name in details["layout"]}
