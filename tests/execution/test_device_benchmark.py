"""The script that a machine with a GPU or a TPU is to run works, as far as a CPU can tell."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "device.py"


def test_it_runs_with_interpreted_kernels():
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["left_out"] == []
    assert figures["cases"].pop("train step")["ratio"] > 0
    for case in figures["cases"].values():
        assert len(case) == 12
        for name, variant in case.items():
            assert "failed" not in variant, name
            assert variant["error"] < 1e-2
