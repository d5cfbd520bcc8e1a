"""Imports point down only, facades hold names only, and the names are those of the snapshot."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import jaxcompress as jc

ROOT = Path(__file__).parent.parent / "jaxcompress"
SOURCE = ROOT / "_src"

# Lower rows may be imported by higher ones; within a row nothing imports anything else.
LAYERS = [
    {"types", "meshes", "coding", "lazy"},
    {"tree", "arrays", "schedules"},
    {"transforms"},
    {"trace"},
    {"execution"},
    {"calibration"},
    {"weights"},
    {"solvers"},
    {"pruning", "quantization", "clustering", "lowrank", "units", "distillation"},
    {"models"},
    {"report", "checkpoint"},
    {"export"},
    {"training"},
    {"recipe"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MAY_IMPORT_FEW = {
    "models": {"types", "tree", "execution", "units"},
    "solvers": set(),
    "checkpoint": {"types", "meshes", "coding", "tree", "arrays"},
    "export": {"types", "meshes", "tree", "arrays", "trace", "execution", "models"},
    "report": {"types", "meshes", "tree", "arrays", "execution"},
}
ONLY_HERE = {"orbax": "checkpoint", "typer": "cli", "rich": "cli", "matplotlib": "cli", "transformers": "recipe"}
ONLY_HERE |= {"onnx": "export"}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem != "__init__")
FACADES = sorted(path for path in ROOT.glob("*.py") if path.stem != "__main__")


def _package(path):
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    here = _package(path)
    assert here in LEVEL, f"{here} has no layer"
    for name in _imports(path):
        top, *rest = name.split(".")
        if top == "jaxcompress" and rest != ["__version__"]:
            assert rest[0] == "_src", f"{here} imports the facade {name}"
            there = rest[1]
            assert there == here or LEVEL[there] < LEVEL[here], f"{here} (above or beside) imports {there}"
            assert there == here or there in MAY_IMPORT_FEW.get(here, LEVEL), f"{here} may not import {there}"
        assert ONLY_HERE.get(top, here) == here, f"only {ONLY_HERE.get(top)} imports {top}"


# Kernels are written for single kinds.
BY_PROTOCOL = [p for p in FILES if _package(p) in ("execution", "checkpoint", "report") and "kernels" not in p.parts]


@pytest.mark.parametrize("path", BY_PROTOCOL, ids=str)
def test_kinds_of_arrays_are_known_by_their_protocol_alone(path):
    modules = {name.split(".")[3] for name in _imports(path) if name.startswith("jaxcompress._src.arrays.")}
    assert modules <= {"protocol", "sharding"}


@pytest.mark.parametrize("path", FACADES, ids=lambda path: path.stem)
def test_facades_hold_names_only(path):
    docstring, *body = ast.parse(path.read_text("utf-8")).body
    assert isinstance(docstring, ast.Expr)
    if path.stem == "__init__":
        # Modules are imported on first use: a type checker reads their names, and `imported_on_use` has them.
        *body, version, lazy = body
        assert (ast.unparse(version.targets[0]), ast.unparse(lazy.value)) == (
            "__version__",
            "imported_on_use(__name__)",
        )
        # Array kinds are known from the start: `jax.export` and checkpoints look them up by name.
        modules = [path.stem for path in FACADES if path.stem not in ("__init__", "arrays")]
        (typed,) = [node for node in body if isinstance(node, ast.If)]
        assert [alias.name for node in typed.body for alias in node.names] == modules
        body = [node for node in body if isinstance(node, ast.ImportFrom) and node.names[0].asname]
    for node in body:
        assert isinstance(node, ast.ImportFrom)
        assert all(alias.asname == alias.name for alias in node.names)


def _public():
    """(facade, name, object) of every public name."""
    for path in FACADES:
        facade = "jaxcompress" if path.stem == "__init__" else f"jaxcompress.{path.stem}"
        module = importlib.import_module(facade)
        for node in ast.parse(path.read_text("utf-8")).body:
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if alias.asname is None:
                    continue  # what makes the facade
                found = getattr(module, alias.name)
                if not inspect.ismodule(found):
                    yield facade, alias.name, found


def test_the_public_names_are_those_of_the_snapshot():
    """A name is added, moved or taken away on purpose: `public_names.txt` and the changelog change with it."""
    snapshot = Path(__file__).with_name("public_names.txt").read_text("utf-8").split()
    public = sorted(f"{facade}.{name}" for facade, name, _ in _public())
    assert public == snapshot, (
        "`tests/public_names.txt`, which is sorted, and the changelog do not say that these names are public: "
        f"{sorted(set(public) - set(snapshot))}; and that these no longer are: {sorted(set(snapshot) - set(public))}."
    )


def test_nothing_is_exported_twice_and_everything_is_documented():
    seen = {}
    for facade, name, found in _public():
        if callable(found):
            assert inspect.getdoc(found), f"{facade}.{name} has no docstring"
            assert seen.setdefault(id(found), f"{facade}.{name}") == f"{facade}.{name}"


def test_modules_are_imported_on_first_use():
    code = "import sys, jaxcompress as jc; a = 'jaxcompress.lowrank' in sys.modules; jc.lowrank.svd; print(a, dir(jc))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, _, rest = done.stdout.partition(" ")
    assert first == "False"
    assert {path.stem for path in FACADES} - {"__init__"} <= set(ast.literal_eval(rest))


def test_a_checkpoint_of_rounded_inputs_is_restored_by_a_process_that_has_not_used_quantization(tmp_path):
    params = {"kernel": jnp.ones((4, 4))}
    marked, _ = jc.quantization.quantize_inputs(params, jc.quantization.QuantSpec(bits=8))
    jc.checkpoint.save(tmp_path / "marked", marked)
    restored = f"jc.checkpoint.restore({str(tmp_path / 'marked')!r})[0]['kernel']"
    code = f"import jaxcompress as jc; print(type({restored}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "InputQuantizedArray"


def test_importing_the_library_imports_no_extra_and_no_orbax():
    names = ("orbax", "transformers", "typer", "rich", "matplotlib", "onnx")
    code = f"print([n for n in {names} if n in sys.modules and n not in before])"
    code = f"import sys, jaxcompress.recipe, jaxcompress.export; {code}"
    code = f"import sys, jax, flax, optax; before = set(sys.modules); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
