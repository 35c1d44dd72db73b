"""No invocation ends in a traceback, hangs, or damages existing files: see tests/wrong_invocations.py."""
import json
import os
import subprocess
import sys

import train

import pytest


@pytest.mark.parametrize("count", [12, pytest.param(0, marks=pytest.mark.slow, id="all")])
def test_wrong_invocations(small, tmp_path, corpus, count):
    cfg = small(max_steps=2)
    train.main(cfg)
    arguments = [str(tmp_path / "work"), corpus, os.path.join(cfg.out_dir, cfg.name), str(count)]
    (tmp_path / "cwd").mkdir()  # for whatever is written to a relative path
    script = os.path.abspath("tests/wrong_invocations.py")
    done = subprocess.run([sys.executable, script, *arguments], cwd=tmp_path / "cwd", text=True, timeout=3000,
                          env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["failures"], "\n".join([f"seed {result['seed']}", *result["failures"]])
    assert result["tried"] == count or result["tried"] > 300
