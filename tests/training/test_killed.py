"""A run that is killed three times, whenever, ends as one that nothing interrupted: `resume_torture.py` does more."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "resume_torture.py"


def test_a_killed_run_ends_as_one_that_was_not_killed():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick"], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["kills"], figures["differing"], figures["faults"]) == (3, 0, 0), done.stdout
