"""The formats of `export`: what writes each, and how what was written is read or run."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.input_quantized import InputQuantizedArray
from jaxcompress._src.cli.stored_weights import (
    compressed_tensors_weight,
    gptq_weight,
    quantization_settings,
    stored_tensors,
)
from jaxcompress._src.execution.kernels.processor import processor_count
from jaxcompress._src.export.gguf import save_gguf
from jaxcompress._src.export.huggingface import save_huggingface
from jaxcompress._src.export.info import ExportInfo
from jaxcompress._src.export.litert import save_litert
from jaxcompress._src.export.onnx.save import save_onnx
from jaxcompress._src.export.stablehlo import load_stablehlo, save_stablehlo
from jaxcompress._src.models.families import config_of, family_of, head_of, max_tokens
from jaxcompress._src.models.hf.companions import sentence_pooling
from jaxcompress._src.models.hf.read import from_pretrained
from jaxcompress._src.models.leaves import flatten_params
from jaxcompress._src.recipe.directories import LoadedModel
from jaxcompress._src.recipe.heads import SENTENCE_VECTOR, with_sentence_vector
from jaxcompress._src.recipe.tokens import has_tokenizer
from jaxcompress._src.types import is_compressed, plain

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # of StableHLO

Runner = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
"""`(input_ids, attention_mask) -> outputs by name`, of a written model."""


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
        weights: `(request) -> weights by path`, read back and oriented as the model's; None: they are not compared.
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
    weights: Callable[[Request], Mapping[str, np.ndarray]] | None = None
    error: Callable[[Request], float] = lambda request: 1e-3
    options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    extra: str = ""
    own_runtime: bool = True
    any_size: bool = True
    left_out: str = ""


def model_apply(loaded: LoadedModel) -> Callable[..., dict[str, Any]]:
    """What is written of a model: `(params, input_ids, attention_mask) -> outputs by name`.

    Of a plain encoder or decoder its hidden states, the vector by which sentences are compared, and what its pooler
    gives; of others their logits.
    """
    module = loaded.module
    answer = head_of(module).answer
    pooling = sentence_pooling(loaded.directory) if answer == "vector" else "mean"
    names = ("last_hidden_state", SENTENCE_VECTOR, "pooler_output") if answer == "vector" else ("logits",)

    def apply(params: Any, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        outputs: Any = module.apply({"params": params}, input_ids, attention_mask)
        outputs = with_sentence_vector(module, outputs, attention_mask, pooling)
        return {name: outputs[name] for name in names if name in outputs}

    return apply


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


def _run_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = processor_count(), 1
    options.log_severity_level = 3
    # Threads that wait for work by spinning would take the time of what runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(input_ids: np.ndarray, attention_mask: np.ndarray) -> Mapping[str, Any]:
        outputs = session.run(names, {"input_ids": input_ids, "attention_mask": attention_mask})
        return dict(zip(names, outputs, strict=True))

    return run


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


def _run_litert(path: Path) -> Runner:
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    signature = interpreter.Interpreter(model_path=str(path), num_threads=processor_count()).get_signature_runner()
    names = set(signature.get_input_details())

    def run(input_ids: np.ndarray, attention_mask: np.ndarray) -> Mapping[str, Any]:
        given = {"input_0": input_ids, "input_1": attention_mask}
        return signature(**{name: array for name, array in given.items() if name in names})

    return run


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


def _run_stablehlo(path: Path) -> Runner:
    return load_stablehlo(path)


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


def _run_by_reader(path: Path) -> Runner:
    module, params = from_pretrained(path)
    loaded = LoadedModel(module=module, params=params, directory=path, weights=path, compressed=False)
    apply = jax.jit(model_apply(loaded))
    return lambda input_ids, attention_mask: apply(params, input_ids, attention_mask)


def _read_weights(request: Request) -> dict[str, np.ndarray]:
    _, params = from_pretrained(request.out)
    return {path: np.asarray(leaf) for path, leaf in flatten_params(params).items()}


def _decoded_weights(
    decode: Callable[[Mapping[str, np.ndarray], str, Mapping[str, Any]], Any],
) -> Callable[[Request], dict[str, np.ndarray]]:
    def read(request: Request) -> dict[str, np.ndarray]:
        tensors, settings = stored_tensors(request.out), quantization_settings(request.out)
        module = request.loaded.module
        weights: dict[str, np.ndarray] = {}
        for path, parameter in family_of(module).parameters(config_of(module)).items():
            layer = parameter.tensor.removesuffix(".weight")
            matrix = decode(tensors, layer, settings)
            # Quantized matrices are (outputs, inputs) there, whatever the layer's class; our kernels never are.
            turned = parameter.transposed or matrix is not None
            matrix = tensors[parameter.tensor] if matrix is None else matrix
            weights[path] = matrix.T if turned else matrix
        return weights

    return read


def largest_difference(request: Request, written: Written, weights: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of a weight that was read back, and the first leaf that differs by more than it may.

    Args:
        request: what was to be written.
        written: what the writer said.
        weights: by path, as they were read back.

    Returns:
        The difference, and the leaf's path or an empty text.
    """
    largest, wrong = 0.0, ""
    for path, leaf in flatten_params(request.loaded.params).items():
        ours = np.asarray(plain(leaf))
        wanted = ours.astype(np.float32)
        found = weights[path].astype(np.float32)
        difference = float(np.abs(found - wanted).max(initial=0)) if found.shape == wanted.shape else np.inf
        # Files hold float32 products of codes and scales, which a leaf of another dtype rounds; and sums of float32.
        step = float(jnp.finfo(ours.dtype).eps) * float(np.abs(wanted).max(initial=0)) if is_compressed(leaf) else 0.0
        if not difference <= written.rounding.get(path, 0.0) + step:
            wrong = wrong or path
        largest = difference if np.isnan(difference) else max(largest, difference)
    return largest, wrong


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
        run=_run_onnx,
        error=_onnx_error,
        options=("input_ranges", "weight_bits", "accuracy_level"),
        modules=("onnx", "onnxruntime"),
        extra="onnx",
    ),
    "litert": ExportFormat(
        ending=".tflite",
        runtime="LiteRT",
        write=_write_litert,
        run=_run_litert,
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
        run=_run_stablehlo,
        error=_exact_error,
        options=("platforms",),
        modules=("flatbuffers",),
        extra="stablehlo",
    ),
    "huggingface": ExportFormat(
        ending=None,
        runtime="from_pretrained",
        write=_huggingface_writer("dense"),
        run=_run_by_reader,
        weights=_read_weights,
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
        weights=_decoded_weights(compressed_tensors_weight),
        options=("unsupported", "tokenizer"),
        left_out="not run: transformers 5 with PyTorch and vLLM, which load it, are no dependencies",
    ),
    "gptq": ExportFormat(
        ending=None,
        runtime="NumPy",
        write=_huggingface_writer("gptq"),
        weights=_decoded_weights(gptq_weight),
        options=("unsupported", "tokenizer"),
        left_out="not run: transformers 5 with PyTorch and vLLM, which load it, are no dependencies",
    ),
    "gguf": ExportFormat(
        ending=".gguf",
        runtime="from_pretrained",
        write=_write_gguf,
        run=_run_by_reader,
        weights=_read_weights,
        error=lambda request: 0.1 if request.options.get("dense") == "bfloat16" else 2e-2,
        options=("unsupported", "dense", "tokenizer"),
        modules=("gguf",),
        extra="gguf",
        own_runtime=False,
        left_out="no times: read back, it is a dense model in JAX",
    ),
}
"""By the name that `--format` takes."""
