"""The formats of `export`, in one table: what writes each, how it is read or run, and what it is known to lose."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.cli.export_runners import (
    Runner,
    model_apply,
    read_compressed_tensors,
    read_gptq,
    read_weights,
    run_by_reader,
    run_litert,
    run_onnx,
    run_stablehlo,
)
from jaxcompress._src.export.gguf import save_gguf
from jaxcompress._src.export.huggingface import save_huggingface
from jaxcompress._src.export.info import ExportInfo
from jaxcompress._src.export.litert import save_litert
from jaxcompress._src.export.onnx.save import save_onnx
from jaxcompress._src.export.stablehlo import save_stablehlo
from jaxcompress._src.models.families import max_tokens
from jaxcompress._src.recipe.directories import LoadedModel
from jaxcompress._src.recipe.tokens import has_tokenizer

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # of StableHLO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be written.

    Attributes:
        loaded: the model.
        out: where to.
        shape: rows and tokens of each, of formats whose shapes are fixed.
        options: keyword arguments of the writer that were asked for.
        tokenizer: whether the tokenizer comes along, in formats that have a place for it.
        overwrite: whether an older one is replaced.
    """

    loaded: LoadedModel
    out: Path
    shape: tuple[int, int]
    options: Mapping[str, Any]
    tokenizer: bool
    overwrite: bool


class Written(NamedTuple):
    """What a writer says.

    Attributes:
        forms: of the leaves, by path.
        rounding: by path, how far a weight in the file may be from the model's.
    """

    forms: Mapping[str, str]
    rounding: Mapping[str, float]


class _Write(Protocol):
    def __call__(self, request: Request) -> Written: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One format.

    Attributes:
        ending: of the file's name; None: a directory.
        runtime: what runs it here, or what reads it.
        write: writes it, whole or not at all.
        run: `directory or file -> Runner`; None: what runs it is no dependency.
        weights: `(directory or file, module) -> weights by path`, read back and oriented as the model's; None: they are
            not compared.
        error: `(request) -> relative error` of the outputs that the format is known to have at most.
        options: keyword arguments of the writer that the command line offers; `tokenizer` is the request's.
        modules: that are imported before the work, and the extra that brings them.
        own_runtime: whether it runs elsewhere than in JAX on plain arrays, so that its time means something.
        any_size: whether batch and length are free.
        left_out: what is not shown, and why.
    """

    ending: str | None
    runtime: str
    write: _Write
    run: Callable[[Path], Runner] | None = None
    weights: Callable[[Path, nn.Module], Mapping[str, np.ndarray]] | None = None
    error: Callable[[Request], float] = lambda request: 1e-3
    options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    extra: str = ""
    own_runtime: bool = True
    any_size: bool = True
    left_out: str = ""


def _any_tokens(loaded: LoadedModel) -> list[jax.ShapeDtypeStruct]:
    """Inputs of any batch, and of any length that the model reads."""
    limit = max_tokens(loaded.module)
    batch, length = jax.export.symbolic_shape("batch, length", constraints=[f"length <= {limit}"])
    return 2 * [jax.ShapeDtypeStruct((batch, length), jnp.int32)]


def _write_onnx(request: Request) -> Written:
    loaded = request.loaded
    try:
        info = save_onnx(
            request.out,
            model_apply(loaded),
            loaded.params,
            *_any_tokens(loaded),
            overwrite=request.overwrite,
            **request.options,
        )
    except NotImplementedError as err:
        raise ValueError(" ".join([str(err), *getattr(err, "__notes__", ())])) from err
    forms: dict[str, list[str]] = {}
    for leaf in info.leaves:
        forms.setdefault(leaf.path, []).append(leaf.form)
    # A tied table is used twice.
    return Written({path: "; ".join(dict.fromkeys(each)) for path, each in forms.items()}, {})


def _onnx_error(request: Request) -> float:
    rounded = request.options.get("accuracy_level", 0) == 4 or request.options.get("weight_bits") == 7
    return 0.1 if rounded or _rounds_inputs(request.loaded) else 1e-3


def _write_litert(request: Request) -> Written:
    loaded = request.loaded
    inputs = 2 * [jax.ShapeDtypeStruct(request.shape, jnp.int32)]
    info = save_litert(
        request.out, model_apply(loaded), loaded.params, *inputs, overwrite=request.overwrite, **request.options
    )
    return Written(info.leaves, {})


def _litert_error(request: Request) -> float:
    # Without rounded inputs, scales of groups are rounded to bfloat16 all the same.
    return 0.15 if request.options.get("round_inputs", True) or _rounds_inputs(request.loaded) else 2e-2


def _write_stablehlo(request: Request) -> Written:
    loaded, platforms = request.loaded, request.options.get("platforms")
    if platforms is not None:
        if unknown := [name for name in platforms if name not in _PLATFORMS]:
            raise ValueError(
                f"--platforms is some of {', '.join(_PLATFORMS)}, with commas between; got {unknown[0]!r}."
            )
        if (here := {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())) not in platforms:
            raise ValueError(f"--platforms must have {here}, on which the file is run here.")
    inputs = _any_tokens(loaded)
    info = save_stablehlo(
        request.out, model_apply(loaded), loaded.params, *inputs, overwrite=request.overwrite, **request.options
    )
    return Written(info.leaves, {})


def _exact_error(request: Request) -> float:
    # Sums in another order move a few inputs across a rounding step.
    return 5e-2 if _rounds_inputs(request.loaded) else 1e-3


def _huggingface_writer(format: Any) -> _Write:
    def write(request: Request) -> Written:
        loaded = request.loaded
        source = loaded.directory if request.tokenizer else None
        info = save_huggingface(
            request.out,
            loaded.module,
            loaded.params,
            format=format,
            source=source,
            overwrite=request.overwrite,
            **request.options,
        )
        return _of_info(info)

    return write


def _write_gguf(request: Request) -> Written:
    loaded = request.loaded
    source = loaded.directory if request.tokenizer and has_tokenizer(loaded.directory) else None
    try:
        info = save_gguf(
            request.out, loaded.module, loaded.params, source=source, overwrite=request.overwrite, **request.options
        )
    except (FileNotFoundError, ValueError) as err:
        without = "Without `source=` the file holds no tokenizer."
        if without not in str(err):
            raise
        raise ValueError(str(err).replace(without, "Give --no-tokenizer to write a file without one.")) from err
    return _of_info(info)


def _of_info(info: ExportInfo) -> Written:
    return Written(
        {path: leaf.form for path, leaf in info.leaves.items()},
        {path: leaf.rounding for path, leaf in info.leaves.items()},
    )


def _rounds_inputs(loaded: LoadedModel) -> bool:
    """Whether a leaf, or a part of one, rounds its inputs: small differences then grow to whole steps."""

    def is_rounding(node: Any) -> bool:
        return isinstance(node, InputQuantizedArray)

    return any(is_rounding(node) for node in jax.tree.leaves(loaded.params, is_leaf=is_rounding))


FORMATS: Mapping[str, ExportFormat] = {
    "onnx": ExportFormat(
        ending=".onnx",
        runtime="ONNX Runtime",
        write=_write_onnx,
        run=run_onnx,
        error=_onnx_error,
        options=("input_ranges", "weight_bits", "accuracy_level"),
        modules=("onnx", "onnxruntime"),
        extra="onnx",
    ),
    "litert": ExportFormat(
        ending=".tflite",
        runtime="LiteRT",
        write=_write_litert,
        run=run_litert,
        error=_litert_error,
        options=("round_inputs",),
        modules=("litert_converter", "ai_edge_litert.interpreter"),
        extra="litert",
        any_size=False,
    ),
    "stablehlo": ExportFormat(
        ending=None,
        runtime="jax.export",
        write=_write_stablehlo,
        run=run_stablehlo,
        error=_exact_error,
        options=("platforms",),
        modules=("flatbuffers",),
        extra="stablehlo",
    ),
    "huggingface": ExportFormat(
        ending=None,
        runtime="from_pretrained",
        write=_huggingface_writer("dense"),
        run=run_by_reader,
        weights=read_weights,
        # Plain arrays round no inputs.
        error=lambda request: 0.1 if _rounds_inputs(request.loaded) else 1e-3,
        options=("tokenizer",),
        own_runtime=False,
        left_out="no times: read back, it is a dense model in JAX",
    ),
    "compressed-tensors": ExportFormat(
        ending=None,
        runtime="NumPy",
        write=_huggingface_writer("compressed-tensors"),
        weights=read_compressed_tensors,
        options=("unsupported", "tokenizer"),
        left_out="not run: transformers 5 with PyTorch and vLLM, which load it, are no dependencies",
    ),
    "gptq": ExportFormat(
        ending=None,
        runtime="NumPy",
        write=_huggingface_writer("gptq"),
        weights=read_gptq,
        options=("unsupported", "tokenizer"),
        left_out="not run: transformers 5 with PyTorch and vLLM, which load it, are no dependencies",
    ),
    "gguf": ExportFormat(
        ending=".gguf",
        runtime="from_pretrained",
        write=_write_gguf,
        run=run_by_reader,
        weights=read_weights,
        error=lambda request: 0.1 if request.options.get("dense") == "bfloat16" else 2e-2,
        options=("unsupported", "dense", "tokenizer"),
        modules=("gguf",),
        extra="gguf",
        own_runtime=False,
        left_out="no times: read back, it is a dense model in JAX",
    ),
}
"""By the name that `--format` takes."""
