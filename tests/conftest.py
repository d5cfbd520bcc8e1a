"""Session-wide settings: the CPU with 8 forced devices, strict ranks, array-level shapes checked as they run."""

import functools
import gc
import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all the time goes into compilation, and nothing here is timed: without optimization it takes less than half.
# What must hold of optimized programs takes the options of `optimized.py`.
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_force_host_platform_device_count=8",
        os.environ.get("XLA_FLAGS", ""),
    )
)

import host_constants
import jax
import jaxtyping
from jax._src.interpreters import mlir


def _modules_with_shapes() -> list[str]:
    package = Path(__file__).parents[1] / "jaxcompress"
    files = [path for path in package.rglob("*.py") if "from jaxtyping import" in path.read_text()]
    return [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in files]


# By its defaults the garbage collector walks the modules and JAX's caches again and again: a seventh of the time.
gc.set_threshold(50_000, 20, 20)
jax.config.update("jax_enable_compilation_cache", False)  # without a folder, its keys are hashed for nothing
jax.config.update("jax_numpy_rank_promotion", "raise")
# JAX lowers every program in an MLIR context of its own, and loading the dialects into one takes three times as long as
# lowering a small program. No public switch shares them; should JAX rename this function, the line raises.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)
host_constants.install()
# Every jaxtyping annotation of the package is checked at run time: one that nothing runs would rot. Modules without any
# are left to pyright: the check takes longer than most functions.
jaxtyping.install_import_hook(_modules_with_shapes(), "beartype.beartype")

pytest_plugins = ["small_bert"]


def pytest_collection_finish():
    """What was imported stays: no collection need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """A process may hold 65,530 mappings of memory, compiled programs take several each, and XLA dies of one more."""
    yield
    mlir.make_ir_context.cache_clear()  # a context never lets go of the constants of its programs
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 40_000:
        jax.clear_caches()
