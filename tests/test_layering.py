"""Imports point down only: the table of architecture, as a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxcompress"

# Lower rows may be imported by higher ones; within a row nothing imports anything else. Layer 2 is ordered.
LAYERS = [
    {"types", "meshes", "__version__"},
    {"tree", "arrays", "schedules"},
    {"units"},
    {"transforms"},
    {"trace"},
    {"execution"},
    {"calibration"},
    {"solvers"},
    {"pruning", "quantization", "clustering", "lowrank", "gates", "structured", "distillation"},
    {"models"},
    {"report", "checkpoint", "export"},
    {"recipe"},
    {"search"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAY_IMPORT_FEW = {"models": {"types", "units"}, "solvers": set()}
ONLY_HERE = {"orbax": "checkpoint", "typer": "cli", "rich": "cli", "matplotlib": "cli", "transformers": "recipe"}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem not in ("__init__", "__main__"))


def _package(path):
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = _package(path)
    assert here in LEVEL, f"{here} has no layer"
    for name in _imports(path):
        top, *rest = name.split(".")
        if top == "jaxcompress":
            there = rest[0]
            assert there == here or LEVEL[there] < LEVEL[here], f"{here} (above or beside) imports {there}"
            assert there == here or there in MAY_IMPORT_FEW.get(here, LEVEL), f"{here} may not import {there}"
            if there != here and len(rest) > 1:
                assert not rest[1].startswith("_"), f"{here} imports the private {name}"
        assert ONLY_HERE.get(top, here) == here, f"only {ONLY_HERE.get(top)} imports {top}"


def test_importing_the_library_imports_no_extra_and_no_orbax():
    names = ("orbax", "transformers", "typer", "rich", "matplotlib")
    code = f"import sys, jaxcompress; print([n for n in {names} if n in sys.modules and n not in before])"
    code = f"import sys, jax, flax, optax; before = set(sys.modules); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
