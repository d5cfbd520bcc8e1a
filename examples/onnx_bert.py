"""A fine-tuned MiniLM as ONNX files of 8 bits: how far they are from the model, and ONNX Runtime's `quantize_dynamic`.

Weights and inputs of the encoder are of 8 bits, inputs in a range for each token, and so are the tables of the
embeddings; `quantize_dynamic` makes the same of the float file. All files run in ONNX Runtime on held-out rows, in
batches of 32 of similar length. The table has, against JAX in float32: the mean relative error of the sentence vectors,
KL(float || file) in nats, agreement, accuracy, and bytes; below it, differences of the error to `quantize_dynamic`,
paired over rows.

    python examples/onnx_bert.py [--quick] [--model FILE] [--validation]

FILE is a safetensors file with Hugging Face names of the encoder and `classifier`; without it, the fine-tuned model
that `jaxcompress demo --full` leaves in the cache is used. The last line is JSON.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from minilm import first, load_task
from onnxruntime.quantization import QuantType, quantize_dynamic
from workbench import Table, evaluation_batches, format_table, note, sample_mean

import jaxcompress as jc
from jaxcompress import report
from jaxcompress.export import save_onnx
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs
from jaxcompress.recipe import Tokens

KERNELS = jc.tree.by_path(r".*encoder/.*kernel")
TABLES = jc.tree.by_path(r".*embeddings/.*embedding")
EIGHT_BITS = QuantSpec(bits=8)
WIDTHS = (32, 64)
THEIRS = "quantize_dynamic"

Outputs = dict[str, np.ndarray]
Run = Callable[[Any, Any], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 rows")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--validation", action="store_true", help="report on the validation rows")
    arguments = parser.parse_args()
    task = load_task(arguments.model)
    rows = task.validation if arguments.validation else task.test
    rows = first(rows, 100) if arguments.quick else rows

    def apply(params: Any, ids: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
        outputs = task.module.apply({"params": params}, ids, mask)
        return outputs["logits"], outputs["pooler_output"]

    with tempfile.TemporaryDirectory() as directory:
        files = export(Path(directory), apply, task.params)
        runs: dict[str, Run] = {"JAX": functools.partial(jax.jit(apply), task.params)}
        runs |= {name: in_onnxruntime(file) for name, file in files.items()}
        outputs = {}
        for name, run in runs.items():
            outputs[name] = over_rows(run, rows)
            note(name)
        sizes = {name: file.stat().st_size for name, file in files.items()}
    figures = compare(outputs, rows.labels, sizes)
    pairs = {name: paired(outputs, name) for name in files if name.startswith("int8")}
    print(table(figures))
    for name, (mean, low, high) in pairs.items():
        print(f"error of {name} less that of {THEIRS}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    print(json.dumps({"figures": figures, "pairs": pairs}))


def export(directory: Path, apply: Callable[..., Any], params: Any) -> dict[str, Path]:
    """The files by name."""
    rounded = quantize(params, EIGHT_BITS, select=KERNELS)[0]
    rounded = quantize(quantize_inputs(rounded, EIGHT_BITS, select=KERNELS)[0], EIGHT_BITS, select=TABLES)[0]
    batch, length = jax.export.symbolic_shape("batch, length", constraints=["length <= 512"])
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    files = {}
    for name, leaves, options in (
        ("float", params, {}),
        ("int8", rounded, {}),
        ("int8, ranges by tensor", rounded, {"input_ranges": "tensor"}),
        ("int8, weights of 7 bits", rounded, {"weight_bits": 7}),
    ):
        files[name] = directory / f"{name}.onnx"
        save_onnx(files[name], apply, leaves, tokens, tokens, **options)
    for name, per_channel in ((THEIRS, True), (f"{THEIRS}, by tensor", False)):
        files[name] = directory / f"{name}.onnx"
        quantize_dynamic(files["float"], files[name], weight_type=QuantType.QInt8, per_channel=per_channel)
    return files


def in_onnxruntime(file: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})


def over_rows(run: Run, rows: Tokens) -> Outputs:
    """Logits and sentence vectors of all rows, in their order."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for batch in evaluation_batches(rows, batch_size=32, widths=WIDTHS):
        logits, vectors = map(np.asarray, run(batch["input_ids"], batch["attention_mask"]))
        found |= {row: pair for row, *pair in zip(batch["row"].tolist(), logits, vectors, strict=True) if row >= 0}
    return {name: np.stack([found[row][i] for row in sorted(found)]) for i, name in enumerate(("logits", "vectors"))}


def errors(outputs: dict[str, Outputs], name: str) -> np.ndarray:
    """Relative errors of the sentence vectors, one for each row."""
    exact = outputs["JAX"]["vectors"]
    return np.linalg.norm(outputs[name]["vectors"] - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


def paired(outputs: dict[str, Outputs], name: str) -> tuple[float, float, float]:
    found = sample_mean(errors(outputs, name) - errors(outputs, THEIRS))
    return found.mean, found.low, found.high


def compare(outputs: dict[str, Outputs], labels: np.ndarray, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    exact = outputs["JAX"]["logits"]
    figures = {}
    for name in sizes:
        logits = outputs[name]["logits"]
        divergence = report.kl_divergence(exact, logits)
        figures[name] = {
            "bytes": sizes[name],
            "error": float(errors(outputs, name).mean()),
            "kl": [divergence.mean, divergence.low, divergence.high],
            "agreement": report.agreement(exact.argmax(-1), logits.argmax(-1)).rate,
            "accuracy": float((logits.argmax(-1) == labels).mean()),
        }
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    header = ("", "file", "error of vectors", "KL, nats", "agreement", "accuracy")
    rows, whole = [], figures["float"]["bytes"]
    for name, of in figures.items():
        divergence = "{:.5f} [{:.5f}, {:.5f}]".format(*of["kl"])
        shares = (f"{100 * of[key]:.1f}" for key in ("agreement", "accuracy"))
        rows.append((name, f"{of['bytes'] / whole:.1%}", f"{of['error']:.5f}", divergence, *shares))
    return format_table(Table(header, tuple(rows)))


if __name__ == "__main__":
    main()
