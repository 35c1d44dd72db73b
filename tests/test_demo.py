"""The README's first screen, as a new user types it. Slow: pip fetches the text, and a model trains."""
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path.cwd()


@pytest.mark.slow
def test_the_first_commands_of_the_readme_work(tmp_path):
    def python(*command) -> str:
        done = subprocess.run([sys.executable, str(SCRIPTS / command[0]), *command[1:]], cwd=tmp_path,
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    out = python("prepare_data.py", "shakespeare")
    assert "of 2,965 val lines of 40 or more characters, 0 (0.00%) are in train too" in out
    demo = str(SCRIPTS / "config/demo.py")
    assert "finished: 40 steps" in python("train.py", demo, "--max_steps=40", "--eval_interval=20")
    assert (tmp_path / "out/demo/loss.png").exists()
    assert "ROMEO." in python("sample.py", "out/demo", "--prompt=ROMEO.", "--max_new_tokens=20")
    assert "%" in python("sample.py", "out/demo", "--prompt=ROMEO.", "--top_tokens=3")
