"""Exported models in ONNX Runtime against `jax.jit`: an encoder of MiniLM's sizes, and decoding of one token.

The encoder (6 layers, 384 wide, 8 x 64 tokens) runs in float32, with int8 weights and inputs as `save_onnx` writes
them, and as ONNX Runtime's own `quantize_dynamic` makes it from the float file. Its weights are those of `--encoder`, a
safetensors file with Hugging Face names, and random where it has none. Decoding is three layers of 1 x 4096 x 4096.

All variants run in turn, on two threads; quoted are medians, of wall time and of CPU time.

    python examples/benchmarks/onnx_runtime.py [--quick] [--encoder FILE]

The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from safetensors.numpy import load_file, save_file

import jaxcompress as jc
from jaxcompress._src.execution.kernels.processor import instruction_sets
from jaxcompress.export import save_onnx
from jaxcompress.models import BertConfig, from_pretrained, make_module, save_pretrained
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs

KERNELS = jc.tree.by_path(r"encoder.*kernel")
TIMED = ("wall", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, small matrices, few repeats")
    parser.add_argument("--encoder", type=Path, help="safetensors of a BERT of MiniLM's sizes")
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    repeats = 3 if arguments.quick else arguments.repeats
    with tempfile.TemporaryDirectory() as directory:
        results = {
            "processor": instruction_sets(),
            "encoder": encoder(Path(directory), arguments, repeats),
            "decoding": decoding(Path(directory), 512 if arguments.quick else 4096, repeats),
        }
    for name, rows in results.items():
        print(name, json.dumps(rows, indent=1) if isinstance(rows, dict) else rows)
    print(json.dumps(results))


def encoder(directory: Path, arguments: argparse.Namespace, repeats: int) -> dict[str, Any]:
    module, params = load(arguments)
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, min(module.config.vocab_size, 20000), (8, 64)).astype(np.int32)
    mask = (np.arange(64) < rng.integers(30, 65, (8, 1))).astype(np.int32)

    def apply(params: Any, ids: Any, mask: Any) -> Any:
        return module.apply({"params": params}, ids, mask)["last_hidden_state"]

    spec = QuantSpec(bits=8)
    marked, _ = quantize_inputs(quantize(params, spec, select=KERNELS)[0], spec, select=KERNELS)
    tables, _ = quantize(marked, spec, select=jc.tree.by_path(r"embeddings.*embedding"))
    batch, length = jax.export.symbolic_shape("batch, length", constraints=["length <= 512"])
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    files = {}
    for name, leaves, options in (
        ("float", params, {}),
        ("int8", tables, {}),
        ("int8, ranges by tensor", tables, {"input_ranges": "tensor"}),
        ("int8, 7 bits", tables, {"weight_bits": 7}),
    ):
        files[name] = directory / f"{name}.onnx"
        save_onnx(files[name], apply, leaves, tokens, tokens, **options)
    files["quantize_dynamic"] = directory / "theirs.onnx"
    quantize_dynamic(files["float"], files["quantize_dynamic"])
    feeds = {"ids": ids, "mask": mask}
    runs: dict[str, Callable[[], Any]] = {"jax": jitted(apply, params, ids, mask)}
    for name, path in files.items():
        runs[name] = in_onnxruntime(path, feeds)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return measured(runs, repeats, sizes)


def decoding(directory: Path, width: int, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": jnp.asarray(rng.normal(size=(width, width)) / width**0.5, jnp.float32) for i in range(3)}
    x = rng.normal(size=(1, width)).astype(np.float32)

    def apply(params: Any, x: Any) -> Any:
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return x

    int4, _ = quantize(params, QuantSpec(bits=4, group_size=32))
    int8, _ = quantize(params, QuantSpec(bits=8))
    runs: dict[str, Callable[[], Any]] = {}
    sizes = {}
    for name, leaves, options in (
        ("float", params, {}),
        ("int4", int4, {}),
        ("int4, int8 inputs", int4, {"accuracy_level": 4}),
        ("int8", int8, {}),
        ("int8, int8 inputs", int8, {"accuracy_level": 4}),
    ):
        path = directory / f"decoding, {name}.onnx"
        save_onnx(path, apply, leaves, x, **options)
        runs[name], sizes[name] = in_onnxruntime(path, {"x": x}), path.stat().st_size
    return measured(runs, repeats, sizes)


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=1 if arguments.quick else 6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    module = make_module(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    if arguments.encoder is None or arguments.quick:
        return module, params
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(directory, module, params)
        file = Path(directory) / "model.safetensors"
        tensors = load_file(file)
        given = {name: tensor for name, tensor in load_file(arguments.encoder).items() if name in tensors}
        if not given:
            raise SystemExit(f"{arguments.encoder} has none of the names of an encoder, such as {next(iter(tensors))}.")
        save_file(tensors | given, file)
        return from_pretrained(directory)


def quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as theirs

    theirs(source, target, weight_type=QuantType.QInt8, per_channel=True)


def jitted(apply: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    compiled = jax.jit(apply)
    arguments = jax.device_put(arguments)
    return lambda: np.asarray(compiled(*arguments))


def in_onnxruntime(path: Path, feeds: dict[str, np.ndarray]) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)[0]


def measured(runs: dict[str, Callable[[], Any]], repeats: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Times by themselves and as ratios to the first variant, relative errors to its output, and sizes of files."""
    outputs = {name: run() for name, run in runs.items()}
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in TIMED} for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            run()
            before = time.perf_counter(), time.process_time()
            run()
            after = time.perf_counter(), time.process_time()
            for kind, begin, end in zip(TIMED, before, after, strict=True):
                times[name][kind].append(end - begin)
    first = next(iter(runs))
    rows: dict[str, Any] = {}
    for name in runs:
        row = {"error": float(np.linalg.norm(outputs[name] - outputs[first]) / np.linalg.norm(outputs[first]))}
        row["largest difference"] = float(np.abs(outputs[name] - outputs[first]).max())
        row["ms"] = 1e3 * statistics.median(times[name]["wall"])
        for kind in TIMED:
            ratios = [a / b for a, b in zip(times[name][kind], times[first][kind], strict=True)]
            row[f"{kind} ratio"] = statistics.median(ratios)
        if name in sizes:
            row["bytes"], row["file ratio"] = sizes[name], sizes[name] / sizes["float"]
        rows[name] = {
            key: round(value, 7) if key in ("error", "largest difference") else round(value, 4)
            for key, value in row.items()
        }
    return rows


if __name__ == "__main__":
    main()
