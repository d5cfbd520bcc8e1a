"""What can be written where, found before the work: no result is lost, and nothing of the user's is overwritten."""

import os
from pathlib import Path

from jaxcompress._src.checkpoint.errors import CheckpointError
from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress._src.export.files import check_writable
from jaxcompress._src.models.hf.companions import companion_files

_TAKEN = ("config.json", "model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")


def check_output_directory(out: Path, model: Path | None, *, overwrite: bool) -> None:
    """Checks that a compressed model can be written into `out`.

    Args:
        out: the directory.
        model: directory of the original model, if it is a user's.
        overwrite: whether an older compressed model may be replaced.

    Raises:
        OSError: it cannot be written, holds another model, or shares a folder with the original; the message says what
            to do.
    """
    if model is not None:
        _check_apart(out, model)
    path = out / "checkpoint"
    if path.exists() or path.is_symlink():
        if not _is_ours(path):
            raise FileExistsError(f"{str(path)!r} was not written by `jaxcompress compress`; give another --out.")
        if not overwrite:
            raise FileExistsError(f"{str(out)!r} already holds a compressed model; give --overwrite to replace it.")
    elif out.is_dir():
        foreign = [name for name in _TAKEN if (out / name).exists()] + [str(name) for name in companion_files(out)]
        if foreign:
            raise FileExistsError(f"{str(out)!r} holds {foreign[0]!r} of another model; give another --out.")
    check_writable(out)


def check_export_target(out: Path, model: Path, *, ending: str | None, overwrite: bool) -> None:
    """Checks that a file or a directory of another format can be written to `out`.

    Args:
        out: the file, or the directory.
        model: the model that is read.
        ending: of the file's name; None: a directory.
        overwrite: whether an older export may be replaced.

    Raises:
        OSError: it cannot be written, there is something already, or the model lies there; the message says what to do.
        ValueError: the file's name ends otherwise.
    """
    if ending is not None and out.suffix != ending:
        raise ValueError(f"--out {str(out)!r} must end in {ending!r} for this format.")
    if ending is None or _real(out) == _real(model):
        _check_apart(out, model)
    elif not out.parent.is_dir():
        raise FileNotFoundError(f"--out {str(out)!r} cannot be written: there is no directory {str(out.parent)!r}.")
    there = out.exists() or out.is_symlink()
    if there and (out.is_dir() != (ending is None)):
        raise FileExistsError(f"--out {str(out)!r} exists and is {'no file' if ending else 'no directory'}.")
    if there and not overwrite and (ending is not None or any(out.iterdir())):
        raise FileExistsError(f"--out {str(out)!r} exists already; give --overwrite to replace it.")
    check_writable(out.parent if ending is not None else out)


def check_output_file(path: Path, option: str, *, begins: bytes) -> None:
    """Checks that a file can be written.

    Args:
        path: of the file.
        option: of the command line, for messages.
        begins: how files of this kind begin: others are not overwritten.

    Raises:
        OSError: its folder does not exist or cannot be written, or it is a directory or another kind of file.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{option} {str(path)!r} cannot be written: there is no directory {str(path.parent)!r}."
        )
    if path.exists():
        if not path.is_file():
            raise FileExistsError(f"{option} {str(path)!r} is not a file.")
        with path.open("rb") as file:
            if file.read(len(begins)) not in (begins, b""):
                raise FileExistsError(f"{option} {str(path)!r} is a file of another kind; it is not overwritten.")
    check_writable(path.parent)


def _real(path: Path) -> Path:
    """Without links; not by `Path.resolve`, which raises a `RuntimeError` for one that leads to itself."""
    return Path(os.path.realpath(path))


def _check_apart(out: Path, model: Path) -> None:
    here, there = _real(out), _real(model)
    if here == there:
        raise FileExistsError(f"--out {str(out)!r} is the model's own folder; give another one.")
    if here in there.parents or there in here.parents:
        raise FileExistsError(
            f"--out {str(out)!r} and the model {str(model)!r} lie one inside the other; give another."
        )


def _is_ours(path: Path) -> bool:
    try:
        return "recipe" in read_manifest(path).metadata
    except (CheckpointError, OSError):
        return False
