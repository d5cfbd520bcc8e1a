"""What was exported, run or read back: by the runtime of its format, or weight by weight."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.cli.stored_weights import (
    compressed_tensors_weight,
    gptq_weight,
    quantization_settings,
    stored_tensors,
)
from jaxcompress._src.execution.kernels.processor import processor_count
from jaxcompress._src.export.info import largest_difference
from jaxcompress._src.export.stablehlo import load_stablehlo
from jaxcompress._src.models.families import config_of, family_of, head_of
from jaxcompress._src.models.hf.companions import sentence_pooling
from jaxcompress._src.models.hf.read import from_pretrained
from jaxcompress._src.models.leaves import flatten_params
from jaxcompress._src.recipe.directories import LoadedModel
from jaxcompress._src.recipe.heads import SENTENCE_VECTOR, with_sentence_vector
from jaxcompress._src.types import Params, is_compressed, plain

Runner = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]
"""`(input_ids, attention_mask) -> outputs by name`, of a written model."""


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


def run_onnx(path: Path) -> Runner:
    """A file in ONNX Runtime, on the processors that JAX has."""
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


def run_litert(path: Path) -> Runner:
    """A file in LiteRT, on the processors that JAX has."""
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    signature = interpreter.Interpreter(model_path=str(path), num_threads=processor_count()).get_signature_runner()
    names = set(signature.get_input_details())

    def run(input_ids: np.ndarray, attention_mask: np.ndarray) -> Mapping[str, Any]:
        given = {"input_0": input_ids, "input_1": attention_mask}
        return signature(**{name: array for name, array in given.items() if name in names})

    return run


def run_stablehlo(path: Path) -> Runner:
    """A directory in JAX."""
    return load_stablehlo(path)


def run_by_reader(path: Path) -> Runner:
    """What `from_pretrained` reads, as a dense model in JAX."""
    module, params = from_pretrained(path)
    loaded = LoadedModel(module=module, params=params, directory=path, weights=path, compressed=False)
    apply = jax.jit(model_apply(loaded))
    return lambda input_ids, attention_mask: apply(params, input_ids, attention_mask)


def read_weights(out: Path, module: nn.Module) -> dict[str, np.ndarray]:
    """The weights, by path, that `from_pretrained` reads."""
    _, params = from_pretrained(out)
    return {path: np.asarray(leaf) for path, leaf in flatten_params(params).items()}


def read_compressed_tensors(out: Path, module: nn.Module) -> dict[str, np.ndarray]:
    """The weights, by path and oriented as the module's, of the format `pack-quantized`."""
    return _decoded(out, module, compressed_tensors_weight)


def read_gptq(out: Path, module: nn.Module) -> dict[str, np.ndarray]:
    """The weights, by path and oriented as the module's, in GPTQ's layout."""
    return _decoded(out, module, gptq_weight)


def compare_weights(
    params: Params, rounding: Mapping[str, float], weights: Mapping[str, np.ndarray]
) -> tuple[float, str]:
    """The largest difference of a weight that was read back, and the first leaf that differs by more than it may.

    Args:
        params: of the model.
        rounding: by path, how far a weight may be from the model's.
        weights: by path, as they were read back.

    Returns:
        The difference, and the leaf's path or an empty text.
    """
    largest, wrong = 0.0, ""
    for path, leaf in flatten_params(params).items():
        ours = np.asarray(plain(leaf))
        wanted = ours.astype(np.float32)
        found = weights[path].astype(np.float32)
        difference = largest_difference(found, wanted) if found.shape == wanted.shape else np.inf
        # Files hold float32 products of codes and scales, which a leaf of another dtype rounds; and sums of float32.
        size = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
        step = float(jnp.finfo(ours.dtype).eps) * size if is_compressed(leaf) else 0.0
        if not difference <= rounding.get(path, 0.0) + step:
            wrong = wrong or path
        largest = difference if np.isnan(difference) else max(largest, difference)
    return largest, wrong


def _decoded(
    out: Path, module: nn.Module, decode: Callable[[Mapping[str, np.ndarray], str, Mapping[str, Any]], Any]
) -> dict[str, np.ndarray]:
    tensors, settings = stored_tensors(out), quantization_settings(out)
    weights: dict[str, np.ndarray] = {}
    for path, parameter in family_of(module).parameters(config_of(module)).items():
        matrix = decode(tensors, parameter.tensor.removesuffix(".weight"), settings)
        # Quantized matrices are (outputs, inputs) there, whatever the layer's class; our kernels never are.
        turned = parameter.transposed or matrix is not None
        matrix = tensors[parameter.tensor] if matrix is None else matrix
        weights[path] = matrix.T if turned else matrix
    return weights
