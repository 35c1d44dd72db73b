"""Killed runs resume to the same bits: see tests/kills.py."""
import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("kills", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_runs_resume_exactly(corpus, tmp_path, kills):
    done = subprocess.run([sys.executable, "tests/kills.py", str(tmp_path / "runs"), corpus, str(kills)],
                          env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(json.loads(done.stdout.splitlines()[-1])["kills"].values()) >= kills
