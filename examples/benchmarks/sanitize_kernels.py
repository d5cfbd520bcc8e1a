"""Fuzzes the compiled CPU kernels under sanitizers, in a program without Python: memory, undefined behaviour, threads.

    python examples/benchmarks/sanitize_kernels.py [--quick] [--problems 300] [--seed 0]

Each build runs random problems on every instruction set of the processor and compares them with plain loops. The exit
status is 1 if any result is wrong or any sanitizer reports anything. What the handlers in front of the kernels do with
XLA's call frames is not covered here but by the tests. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from jaxcompress._src.execution.kernels.native.build_hook import BuildError, compile_library

BUILDS = {
    "plain": (),
    "address": ("-fsanitize=address",),
    "undefined": ("-fsanitize=undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
DRIVER = Path(__file__).with_name("fuzz_kernels.cc")
HALT = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few problems")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problems = 30 if options.quick else options.problems
    outcomes = {name: _run(name, problems, options.seed) for name in BUILDS}
    print(json.dumps({"problems": problems, "outcomes": outcomes}))
    if any(outcome != "passed" for outcome in outcomes.values()):
        raise SystemExit(1)


def _run(name: str, problems: int, seed: int) -> str:
    flags = ("-O1", "-g", *BUILDS[name])
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = compile_library(Path(folder) / "fuzz", flags=flags, sources=[DRIVER], link=())
        except BuildError as err:
            print(f"{name}: not built ({err})")
            return "not built"
        begun = time.perf_counter()
        command = [str(program), str(problems), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | HALT)
    print(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - begun:.1f} s")
    print((done.stdout + done.stderr)[-3000:])
    return "passed" if done.returncode == 0 else "failed"


if __name__ == "__main__":
    main()
