"""One-shot compression of SmolLM2-135M: rounding and pruning of its 210 kernels on Brown text.

32 windows of 128 tokens of training files calibrate; the lines show KL(dense || compressed) in nats a token, with its
standard error, and the perplexity, on 8 windows of 256 tokens of files that are held out. The weights were rounded to 4
bits in blocks of 32 before they were published, so nothing is rounded to 4 bits here.

    python examples/compress_smollm2.py [--quick] [--seeds 0] [--methods ...] [--formats 3g64 2g32] [--tokens 128]
        [--plot FILE]

Seconds are those of the method with compilation, and with the statistics for the first one that needs them;
"peak_gb" is the most memory of the process so far.

"gptq" is as published, in activation order; "gptq-refined" with our searched ranges and refinement. All rounding is
asymmetric. `--quick` takes 8 windows of 64 tokens and the cheap methods. The last line is JSON.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from smollm2 import KERNELS, Distance, Task, calibration, load_task, windows
from workbench import note

import jaxcompress as jc
from jaxcompress import pruning, quantization
from jaxcompress.quantization import QuantSpec

PATTERNS = {"50": (0.5, pruning.unstructured()), "2:4": (0.5, pruning.n_of_m(2, 4))}


class Calibrated:
    """The model with what the methods need of it, each computed when it is first asked for."""

    def __init__(self, task: Task, ids: np.ndarray) -> None:
        self.task, self.params = task, task.params
        self.batches = [(ids[start : start + 8],) for start in range(0, len(ids), 8)]
        self.layouts = jc.trace.layouts(task.apply, task.params, self.batches[0][0])
        self._statistics: Any = None

    @property
    def statistics(self) -> Any:
        if self._statistics is None:
            self._statistics = jc.calibration.input_statistics(
                self.task.apply, self.params, self.batches, select=KERNELS, statistics=("gram", "squared_sum")
            )
        return self._statistics


Method = Callable[[Calibrated, Any], Any]


def main() -> None:
    arguments = _arguments()
    task = load_task()
    rows, length = (4, 128) if arguments.quick else (8, 256)
    distance = Distance(task, windows(task.held_out, rows=rows, length=length))
    results = [{"method": "dense", "format": "", "seed": 0, **distance(task.params)}]
    note(json.dumps(results[0]))
    for seed in arguments.seeds:
        rows, length = (8, 64) if arguments.quick else (32, arguments.tokens)
        model = Calibrated(task, calibration(task, seed, rows=rows, length=length))
        for name in arguments.methods:
            table, options = (PRUNING, PATTERNS) if name in PRUNING else (ROUNDING, _specs(arguments.formats))
            for option, setting in options.items():
                start = time.process_time(), time.monotonic()
                params = table[name](model, setting)
                jax.block_until_ready(jax.tree.leaves(params))
                cpu, seconds = time.process_time() - start[0], time.monotonic() - start[1]
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                results.append({"method": name, "format": option, "seed": seed, **distance(params)})
                results[-1] |= {"cpu_s": round(cpu, 1), "seconds": round(seconds, 1), "peak_gb": round(peak, 2)}
                note(json.dumps(results[-1]))
                del params
    if arguments.plot:
        _plot(results, arguments.plot)
    print(json.dumps({"quick": arguments.quick, "results": results}))


def _specs(formats: list[str]) -> dict[str, QuantSpec]:
    sizes = {each: map(int, each.split("g")) for each in formats}
    return {each: QuantSpec(bits=bits, group_size=group, symmetric=False) for each, (bits, group) in sizes.items()}


def _rtn(model: Calibrated, spec: QuantSpec) -> Any:
    return quantization.quantize(model.params, spec, select=KERNELS, layouts=model.layouts)[0]


def _gptq(model: Calibrated, spec: QuantSpec) -> Any:
    options = {"order": "activation", "range_search": None, "refine": 0}
    return quantization.gptq(model.params, model.statistics, spec, select=KERNELS, layouts=model.layouts, **options)[0]


def _gptq_refined(model: Calibrated, spec: QuantSpec) -> Any:
    return quantization.gptq(model.params, model.statistics, spec, select=KERNELS, layouts=model.layouts)[0]


def _reconstruct(model: Calibrated, spec: QuantSpec) -> Any:
    return quantization.reconstruct(model.task.apply, model.params, model.batches, spec, select=KERNELS)[0]


def _magnitude(model: Calibrated, setting: Any) -> Any:
    sparsity, pattern = setting
    scores = pruning.magnitude_scores(model.params, select=KERNELS)
    options = {"sparsity": sparsity, "pattern": pattern, "layouts": model.layouts}
    return pruning.apply_masks(model.params, pruning.masks_from_scores(scores, **options))


def _pruned(method: Callable[..., Any]) -> Method:
    def run(model: Calibrated, setting: Any) -> Any:
        sparsity, pattern = setting
        options = {"sparsity": sparsity, "pattern": pattern, "select": KERNELS, "layouts": model.layouts}
        return method(model.params, model.statistics, **options)[0]

    return run


ROUNDING: dict[str, Method] = {
    "rtn": _rtn,
    "gptq": _gptq,
    "gptq-refined": _gptq_refined,
    "reconstruct": _reconstruct,
}
PRUNING: dict[str, Method] = {
    "magnitude": _magnitude,
    "wanda": _pruned(pruning.wanda),
    "sparsegpt": _pruned(pruning.sparsegpt),
}


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    shown = results[1:]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    labels = [f"{each['method']} {each['format']}" for each in shown]
    axes.barh(labels, [each["kl"] for each in shown], xerr=[each["kl_error"] for each in shown])
    axes.set_xlabel("KL(dense || compressed), nats a token")
    axes.set_xscale("log")
    figure.savefig(path, dpi=120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--formats", nargs="+", default=["3g64", "2g32"])
    parser.add_argument("--methods", nargs="+", choices=[*ROUNDING, *PRUNING], default=[*ROUNDING, *PRUNING])
    parser.add_argument("--tokens", type=int, default=128, help="of each of the 32 windows that calibrate")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.quick and arguments.methods == [*ROUNDING, *PRUNING]:
        arguments.methods = ["rtn", "magnitude", "wanda"]
    return arguments


if __name__ == "__main__":
    main()
