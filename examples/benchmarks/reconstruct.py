"""`quantization.reconstruct` of a fine-tuned MiniLM against another checkout of this repository.

Each measurement is a process of its own, ours and the other's in turn, pinned to one core: on several cores its CPU
time would also be what the threads of a busy machine spend on waiting for one another. A process rounds the encoder's
36 kernels as `quantize_bert.py` does (groups of 32, asymmetric, 128 sentences), once for each number of bits, and then
once more, when everything is compiled. Quoted are medians, and the median of the ratios of neighbours.

    python examples/benchmarks/reconstruct.py --other CHECKOUT --model FILE [--quick] [--repeats 3] [--bits 4 3 2]

FILE is a safetensors file as for `quantize_bert.py`. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

OURS = Path(__file__).resolve().parents[2]
FIGURES = ("cpu_s", "again_cpu_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="a checkout to compare with; without it ours is measured alone")
    parser.add_argument("--model", type=Path, help="safetensors of a fine-tuned encoder and classifier")
    parser.add_argument("--quick", action="store_true", help="32 sentences, 3 bits only, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.bits = 1, [3]
    if arguments.child is not None:
        print(json.dumps(_measured(arguments)))
        return
    trees = {"ours": OURS} | ({} if arguments.other is None else {"other": arguments.other.resolve()})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for _ in range(arguments.repeats):
        for name, tree in trees.items():
            runs[name].append(_in_a_process(tree, arguments))
            print(json.dumps({name: runs[name][-1]}), flush=True)
    summary: dict[str, Any] = {"bits": arguments.bits, "sentences": _sentences(arguments)}
    for figure in FIGURES:
        times = {name: [run[figure] for run in own] for name, own in runs.items()}
        summary[figure] = {name: round(float(np.median(own)), 2) for name, own in times.items()}
        if "other" in times:
            pairs = zip(times["other"], times["ours"], strict=True)
            summary[figure]["times_less"] = round(float(np.median([other / ours for other, ours in pairs])), 2)
    summary["kl"] = {name: own[-1]["kl"] for name, own in runs.items()}
    print(json.dumps(summary))


def _sentences(arguments: argparse.Namespace) -> int:
    return 32 if arguments.quick else 128


def _in_a_process(tree: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--child", str(tree), "--bits", *map(str, arguments.bits)]
    options += ["--quick"] if arguments.quick else []
    options += ["--model", str(arguments.model)] if arguments.model else []
    paths = os.pathsep.join([str(tree), str(tree / "examples")])
    done = subprocess.run(
        [sys.executable, __file__, *options],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of one process, and the KL of each number of bits on the test rows."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # The directory of this file would hide the example of the tree that is measured.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != OURS / "examples" / "benchmarks"]
    import jax
    import quantize_bert
    from minilm import load_task

    import jaxcompress as jc

    assert Path(jc.__file__).is_relative_to(arguments.child), jc.__file__
    task = load_task(arguments.model)
    model = quantize_bert.Model(task.module, task.params)
    samples = quantize_bert.calibration(task.train, 0, rows=_sentences(arguments))

    def run(bits: int) -> tuple[Any, float]:
        begun = time.process_time()
        params = quantize_bert.METHODS["reconstruct"](model, samples, bits)
        jax.block_until_ready(jax.tree.leaves(params))
        return params, time.process_time() - begun

    first = [run(bits) for bits in arguments.bits]
    _, again = run(arguments.bits[-1])
    dense = model.outputs(model.params, task.test)["logits"]
    kl = [
        round(jc.report.kl_divergence(dense, model.outputs(params, task.test)["logits"]).mean, 5) for params, _ in first
    ]
    return {"cpu_s": round(sum(seconds for _, seconds in first), 2), "again_cpu_s": round(again, 2), "kl": kl}


if __name__ == "__main__":
    main()
