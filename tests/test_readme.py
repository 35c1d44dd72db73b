"""Every command of the README and of the scripts' docstrings names things and options that exist."""
import re
import shlex
from pathlib import Path

import bench
import prepare_data
import quantize
import recall_probe
import sample
import sweep
import train
from common.config import load

import pytest

CLASSES = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig, "bench.py": bench.BenchConfig,
           "prepare_data.py": prepare_data.PrepareConfig, "sweep.py": sweep.SweepConfig,
           "quantize.py": quantize.QuantizeConfig, "recall_probe.py": recall_probe.RecallConfig}
TEXTS = ["README.md", *CLASSES, *sorted(str(p) for p in Path("config").glob("*.py"))]


def commands():
    for path in TEXTS:
        text = Path(path).read_text()
        if path.startswith("config"):
            text = re.sub(r"^# +", "", text, flags=re.M)
        elif path != "README.md":
            text = "\n".join(re.findall(r'^"""(.*?)"""|^#(.*)$', text, re.M | re.S)[0])
        for line in text.splitlines():
            for part in re.split(r"&&|; do |; done", line):
                if re.match(r"\s*(#.*: +)?!?(python|torchrun .*) ?\S*\.py", part):
                    yield path, part.strip().lstrip("!").split("  #")[0].strip()


ALL = sorted(set(commands()))


def test_there_are_commands():
    assert len(ALL) > 30 and {p for p, _ in ALL} >= {"README.md", *CLASSES, "config/demo.py"}


@pytest.mark.parametrize("path, command", ALL)
def test_command_parses(path, command):
    words = shlex.split(command.replace("$n", "1").replace("${n}", "1"))
    script = next(w for w in words if w.endswith(".py"))
    args = words[words.index(script) + 1:]
    assert script in CLASSES
    if "--help" not in args:
        load(CLASSES[script], args)


def test_files_the_readme_names_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|md|txt))`", Path("README.md").read_text()):
        made = name in ("samples.txt", "table.md")
        assert made or Path(name).exists() or Path("config", name).exists(), name


def test_make_targets_the_readme_names_exist():
    makefile = Path("Makefile").read_text()
    for target in set(re.findall(r"(?:^|`|= )make ([a-z][\w-]+)", Path("README.md").read_text(), re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_troubleshooting_quotes_real_messages():
    paths = ["train.py", "model.py", "prepare_data.py", *Path("common").glob("*.py")]
    sources = "".join(Path(p).read_text() for p in paths)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that go on in the next line
    table = Path("README.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    for quoted in re.findall(r"^\| `(.*?)` \|", table, re.M):
        for piece in re.split(r"\.\.\.|'x'|'y'|data/", quoted):
            assert piece.strip() in sources or piece == "CUDA out of memory", piece
