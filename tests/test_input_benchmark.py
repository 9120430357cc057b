"""The benchmark of the input pipeline: that it runs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_input_benchmark_runs(tmp_path):
    names = ["tf.data, files", "ours, files"]
    flags = ["--images=20", "--rounds=1", "--contestants", *names]
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "benchmarks" / "input.py", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "| tf.data, files | " in done.stdout and "needs --tf-python" in done.stdout
    assert "| ours, files | " in done.stdout and "Resident memory" in done.stdout
