"""Entry point: user errors become one line and exit code 2."""

import os
import sys
import warnings
from typing import Any


def main() -> None:
    """Runs the command line; the only place that turns exceptions into exit codes."""
    # Models and tokenizers come from files: transformers must neither look for a hub nor advise on frameworks.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # LiteRT's converter would say that it could use another library for what it does not do here.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from jaxcompress._src.cli.app import app
    except ModuleNotFoundError as err:
        if err.name not in ("typer", "rich"):
            raise
        _fail(f"the command line needs {err.name}: pip install 'jaxcompress[demo]'")
    from jaxcompress._src.cli.memory import is_out_of_memory
    from jaxcompress._src.recipe.assets import AssetError

    shown = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="jaxcompress", standalone_mode=False)
    except ModuleNotFoundError as err:
        # A package of an extra says so; any other that is missing is a fault.
        if "jaxcompress[" not in str(err) or os.environ.get("JAXCOMPRESS_TRACEBACK"):
            raise
        _fail(_one_line(err))
    except (ValueError, OSError, AssetError) as err:
        if os.environ.get("JAXCOMPRESS_TRACEBACK"):
            raise
        _fail(_one_line(err))
    except Exception as err:
        if is_out_of_memory(err):
            _fail(f"there is not enough memory here: {_one_line(err)} Fewer rows or tokens at a time take less.")
        # What typer finds wrong with the arguments; some versions of it carry their own copy of click's exceptions.
        if not hasattr(err, "format_message"):
            raise
        command = getattr(getattr(err, "ctx", None), "command_path", "jaxcompress")
        _fail(f"{_one_line(err)} See '{command} --help'.")
    finally:
        warnings.showwarning = shown
    raise SystemExit(code or 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Where in the library a warning was raised says nothing to a user of the command line."""
    print(f"jaxcompress: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(err: BaseException) -> str:
    text = getattr(err, "format_message", err.__str__)()
    parts = [text, *getattr(err, "__notes__", ())]
    # JAX appends advice about its own traceback filtering, which is none to a user of the command line.
    lines = [part for part in parts if "JAX_TRACEBACK_FILTERING" not in part]
    line = " ".join(" ".join(lines).split())
    return line if len(line) <= 1000 else f"{line[:1000]} ..."


def _fail(message: str) -> None:
    print(f"jaxcompress: error: {message}", file=sys.stderr)
    raise SystemExit(2)
