"""Compiles the kernels when the package is installed, if there is a C++ compiler.

An installation without one, or where compiling fails, succeeds all the same and records why there is no library, which
`library.why_missing` tells. The header of XLA's foreign function interface is that of jaxlib, which the build
depends on only where there is a compiler.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # pyright: ignore[reportMissingImports]
except ImportError:  # the functions below are for tests and sanitizers too
    BuildHookInterface = object

FOLDER = Path(__file__).parent

LIBRARY = "libjaxcompress" + {"darwin": ".dylib"}.get(sys.platform, ".so")
REASON = "why_missing.txt"

UNITS: Mapping[str, Sequence[str]] = {
    # -O3 only where it was measured to help: it takes twice as long. The vectorizer makes intrinsics slower.
    "kernels_avx2.cc": ("-O3", "-mavx2", "-mfma"),
    "kernels_portable.cc": ("-O2",),
    "kernels_avx512.cc": (
        *("-O2", "-fno-tree-vectorize", "-mavx2", "-mfma"),
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")),
    ),
    "expand_avx2.cc": ("-O2", "-mavx2", "-mfma", "-mpopcnt"),
    "expand_avx512.cc": ("-O2", *(f"-m{part}" for part in ("avx512f", "avx512bw", "avx512dq", "avx512vl", "popcnt"))),
    "expand_portable.cc": ("-O2",),
    "run.cc": ("-O2",),
    "run_expand.cc": ("-O2",),
    "handlers.cc": ("-O2",),
}
"""Sources and what each is compiled with; the slowest first."""

HEADERS = "jaxlib>=0.10.2,<0.11"
"""What has the header: the range of jax in pyproject.toml, whose interface the library must fit."""

_HEADER = "xla/ffi/api/c_api.h"
_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread")
_X86 = ("x86_64", "amd64")


class BuildError(Exception):
    """Why there is no library, in one clause."""


class NativeBuildHook(BuildHookInterface):  # pyright: ignore[reportGeneralTypeIssues]
    """The library beside its sources for editable installs, in the wheel otherwise."""

    def dependencies(self) -> list[str]:
        """What the build needs besides hatchling; asked for by hatchling before it makes the environment."""
        return [] if why_not_compiled() else [HEADERS]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles; called by hatchling before each build of a wheel."""
        is_editable = version == "editable"
        folder = FOLDER if is_editable else Path(tempfile.mkdtemp(prefix="jaxcompress-"))
        for name in (LIBRARY, REASON):
            (folder / name).unlink(missing_ok=True)
        try:
            name = compile_library(folder / LIBRARY).name
        except BuildError as err:
            name = REASON
            (folder / name).write_text(f"{err}\n", "utf-8")
            self.app.display_warning(f"jaxcompress is installed without its compiled CPU kernels: {err}")
        if not is_editable:
            place = FOLDER.relative_to(self.root) / name
            build_data["force_include"][str(folder / name)] = place.as_posix()
            if name == LIBRARY:
                platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{platform}"


def compiler() -> list[str] | None:
    """The command of a C++ compiler: that of `CXX`, or the first one on the path; None without one.

    Example:
        >>> command = compiler()
        >>> command is None or len(command) > 0
        True
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def why_not_compiled() -> str | None:
    """Why nothing is compiled here, in one clause, or None if there is a compiler to try.

    Example:
        >>> (why_not_compiled() is None) <= (compiler() is not None)
        True
    """
    if sys.platform == "win32":
        return "the kernels are not built on Windows"
    return None if compiler() else "no C++ compiler was found (`CXX`, c++, g++ or clang++)"


def header_folder() -> Path | None:
    """Where jaxlib has XLA's headers; None without them. jaxlib is not imported.

    Example:
        >>> folder = header_folder()
        >>> folder is None or (folder / "xla/ffi/api/c_api.h").is_file()
        True
    """
    package = importlib.util.find_spec("jaxlib")
    places = (package and package.submodule_search_locations) or ()
    return next((folder for place in places if ((folder := Path(place) / "include") / _HEADER).is_file()), None)


def compile_library(
    library: Path, *, flags: Sequence[str] = (), sources: Sequence[Path] = (), link: Sequence[str] = ("-shared",)
) -> Path:
    """Compiles all units, several at a time, and links them.

    Args:
        library: the file to make.
        flags: for compiling and linking, after those of each unit.
        sources: further sources, which are linked in.
        link: for linking alone.

    Returns:
        `library`.

    Raises:
        BuildError: there is no compiler or no header, or compiling fails.
    """
    command, headers, reason = compiler(), header_folder(), why_not_compiled()
    if command is None or reason is not None:
        raise BuildError(reason)
    if headers is None:
        raise BuildError(f"no jaxlib with {_HEADER} was found")
    is_x86 = any(name in sysconfig.get_platform() for name in _X86)
    units = {FOLDER / name: own for name, own in UNITS.items()} | dict.fromkeys(sources, ("-O1",))
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch) / f"{i}.o" for i in range(len(units))]

        def compile_unit(source: Path, own: Sequence[str], target: Path) -> None:
            kept = own if is_x86 else [flag for flag in own if not flag.startswith("-m")]
            include = (f"-I{FOLDER}", "-isystem", str(headers))
            _run([*command, *_FLAGS, *kept, *flags, *include, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_unit, units.keys(), units.values(), objects))
        _run([*command, "-pthread", *link, *flags, *map(str, objects), "-o", str(library)])
    return library


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as err:
        raise BuildError(f"{command[0]} does not run ({err})") from err
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed ({lines[0] if lines else f'status {done.returncode}'})")


if __name__ == "__main__":
    print(compile_library(FOLDER / LIBRARY))
