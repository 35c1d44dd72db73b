"""The README: its commands run, its examples of new ideas work, what it names exists."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import bench
import distill
import loop_train
import memory_probe
import optimizer_probe
import prepare_data
import pretrained
import quantize
import recall_probe
import sample
import sweep
import train
from common.config import load
from tests.conftest import prepare
from tests.test_chat import prepare as prepare_chats
from tests.test_chat import talks

import pytest

SCRIPTS = {module.__name__ + ".py": (module.main, cls) for module, cls in (
    (train, train.TrainConfig), (sample, sample.SampleConfig), (bench, bench.BenchConfig),
    (prepare_data, prepare_data.PrepareConfig), (sweep, sweep.SweepConfig),
    (quantize, quantize.QuantizeConfig), (recall_probe, recall_probe.RecallConfig),
    (memory_probe, memory_probe.ProbeConfig), (loop_train, loop_train.LoopConfig),
    (optimizer_probe, optimizer_probe.SteerConfig), (pretrained, pretrained.PretrainedConfig),
    (distill, distill.DistillConfig))}
CONFIGS = sorted(str(p) for p in Path("config").glob("*.py"))
README = Path("README.md").read_text()


def commands():
    """(file, command) of the README, RESULTS.md, the scripts' docstrings and the configs' comments."""
    for path in ["README.md", "RESULTS.md", *SCRIPTS, *CONFIGS]:
        text = Path(path).read_text()
        if path.startswith("config"):
            text = re.sub(r"^# +", "", text, flags=re.M)
        elif path.endswith(".py"):
            text = "\n".join(re.findall(r'^"""(.*?)"""|^#(.*)$', text, re.M | re.S)[0])
        for line in text.splitlines():
            for part in re.split(r"&&|; do |; done", line):
                if m := re.match(r"\s*(?:#.*: +)?!?((?:python|torchrun .*) ?\S*\.py.*?)(  #.*)?$", part):
                    yield path, m[1].strip()


def words_of(command: str) -> tuple[str, list[str]]:
    """The script of a command and its arguments."""
    words = shlex.split(command.replace("$n", "1").replace("${n}", "1"))
    script = next(w for w in words if w.endswith(".py"))
    return script, words[words.index(script) + 1:]


def config_of(script: str, args: list[str]) -> type:
    return sweep.chosen_config(args) if script == "sweep.py" else SCRIPTS[script][1]


COMMANDS = list(commands())
ALL = sorted({(path, command) for path, command in COMMANDS if "softsign" not in command})  # tried below


def test_there_are_commands():
    assert len(ALL) > 60 and {p for p, _ in ALL} >= {"README.md", "RESULTS.md", *SCRIPTS, "config/demo.py"}


@pytest.mark.parametrize("path, command", ALL)
def test_command_parses(path, command):
    script, args = words_of(command)
    if "--help" not in args and script in SCRIPTS:  # train.py of nanoGPT stands in RESULTS.md too
        if path != "RESULTS.md" or "--eval_iters=20" not in args:
            load(config_of(script, args), args)


# ------------------------------------------------------------------------------------------------------------
# The commands run

SMALLER = {  # flags that make them cheap; the last one given counts
    "train.py": ["--batch_size=2", "--max_seq_len=16", "--epochs=0", "--max_steps=2", "--train_minutes=0",
                 "--device=cpu"],
    "distill.py": ["--batch_size=2", "--max_seq_len=16", "--epochs=0", "--max_steps=2", "--device=cpu"],
    "sample.py": ["--max_new_tokens=3", "--write_tokens=300", "--device=cpu"],
    "quantize.py": ["--speed_tokens=0", "--device=cpu"],
    "sweep.py": ["--dry_run"], "bench.py": ["--shapes=tiny", "--rounds=1", "--steps=1", "--device=cpu"],
    "memory_probe.py": ["--level=H0", "--pool=8", "--gate=0", "--facts=8", "--seeds=1", "--spread=8",
                        "--steps=2", "--d_model=16", "--n_layers=1", "--n_heads=1", "--batch_size=64",
                        "--device=cpu"],
    "loop_train.py": ["--level=H0", "--pool=8", "--gate=0", "--seeds=1", "--segment=4", "--cycles=1",
                      "--probes=2", "--loops=2", "--tail=0", "--arm=lr=1e-3", "--questions=3", "--own=3",
                      "--d_model=16", "--n_layers=1", "--n_heads=1", "--batch_size=32", "--device=cpu"],
    "optimizer_probe.py": ["--targets=2", "--seeds=1", "--steps=2", "--profiles=entries", "--device=cpu"],
    "pretrained.py": [],
    "recall_probe.py": ["--steps=2", "--eval_sequences=2", "--batch_size=4", "--device=cpu"]}
ELSEWHERE = ("prepare_data.py", "torchrun", "--peer", "softsign", "Qwen/",
             "probe_inherit")  # have tests of their own


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """In the README's order, in one folder: later ones use what earlier ones made."""
    for name, tokenizer in (("shakespeare", "bytes"), ("shakespeare_bpe8192", "bpe:400"),
                            ("shakespeare_words1000", "words:200"), ("wikitext2", "bytes"),
                            ("books", "bytes")):
        prepare(tmp_path, name, tokenizer, count=6)
    prepare(tmp_path, "chitchat", "bpe:400", count=6)
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"turns": t}) + "\n" for t in talks(60)))
    prepare_chats(tmp_path, tmp_path / "talks.jsonl", chat=True, name="chitchat_chat",
                  tokenizer_from=str(tmp_path / "data" / "chitchat"))
    shutil.copytree("config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.distill_report.TOKENS", 8)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    mine = [c for p, c in COMMANDS if p == "README.md" and not any(word in c for word in ELSEWHERE)]
    for command in ["python train.py config/mini3.py", "python train.py config/mini6.py", *mine]:
        script, args = words_of(command)
        main, cls = SCRIPTS[script][0], config_of(script, args)
        smaller = [] if "--dry_run" in args and script == "train.py" else SMALLER[script]
        assert isinstance(main(load(cls, args + smaller)), dict), command
    out = capsys.readouterr().out
    assert len(mine) >= 15 and "63,873,617" in out
    assert {p.name for p in Path("out").iterdir()} >= {"demo", "mini3_lr1e-3", "speedrun", "newllm_baseline"}


# ------------------------------------------------------------------------------------------------------------
# Adding ideas

IDEAS = README.split("## Add an idea")[1].split("\n## ")[0]
ACTIVATION, MIXER, OPTIMISER, METRIC, LOOP = re.findall(r"```python\n(.*?)```", IDEAS, re.S)

TRY = """
import json, math, torch
import quantize, sample, sweep, train
from common.data import Windows, open_text
from common.distributed import Dist
from common.step import backward, update
from model import LM, load_model
from muon import make_optimizer, set_learning_rates

common = dict(data=DATA, device="cpu", dtype="fp32", d_model=16, n_layers=2, n_heads=2, max_seq_len=16,
              batch_size=4, max_steps=4, eval_interval=2, sample_tokens=3, prompts=("the",))
options = common | dict(name="mine", activation="softsign", mixer="average", pos="none", optimizer="nadam",
                        lr=1e-2)
assert train.main(train.TrainConfig(**options, max_minutes=1e-6))["status"] == "stopped"
row = train.main(train.TrainConfig(**options))
assert row["status"] == "finished" and row["result"]["nats_per_word"] > row["result"]["loss"]
arms = sweep.SweepConfig(**options | {"name": "arms"}, metric="nats_per_word", dry_run=True,
                         arm=("mixer=attention pos=rope",))
assert len(sweep.main(arms)["runs"]) == 6 and sweep.score_of(row, "nats_per_word") > 0
model = load_model("out/mine")[0]
ids = torch.randint(250, (2, 12))
whole, state = model(ids)[0], model.init_state()
steps = [model(ids[:, t:t + 1], state=state)[0] for t in range(12)]
torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-4)
fresh = LM(model.cfg)
assert 0.3 < fresh.trunk[0].mixer.decay.std() < 3
quantize.main(quantize.QuantizeConfig(checkpoint="out/mine", device="cpu", speed_tokens=0))

text, dist, dtype = open_text(DATA), Dist(0, 1, torch.device("cpu")), "fp32"
cfg = train.TrainConfig(**options).resolved(text.meta)
model = LM(cfg)
optimizer, scaler = make_optimizer(model, cfg), torch.amp.GradScaler("cpu", enabled=False)
windows, losses = Windows(text.train, cfg.max_seq_len, cfg.seed), []
LOOP
    losses.append(loss.item())
assert losses[-1] < losses[0] and norm > 0
"""


def into(path: Path, place: str, text: str, before: bool = False) -> None:
    """Insert text after (or before) the first occurrence of `place` in a file."""
    source = path.read_text()
    assert place in source, f"{path.name} has no {place!r}"
    path.write_text(source.replace(place, text + place if before else place + text, 1))


def copy_with_ideas(folder: Path, leave_out: str = "") -> None:
    """A copy of the repository with the README's examples, put where the README says, but for one."""
    for path in (p for folder in (".", "common", "config", "probes") for p in Path(folder).glob("*.py")):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    places = {
        "activation": ("model.py", "ACTIVATIONS = {", f"\n{ACTIVATION}"),
        "mixer": ("model.py", "MIXERS = {", f"{MIXER}\n\n"),
        "its name": ("model.py", "MIXERS = {", '"average": Average, '),
        "optimiser": ("muon.py", "OPTIMIZERS = {", f"{OPTIMISER}\n\n"),
        "its name there": ("muon.py", "OPTIMIZERS = {", '"nadam": nadam_of, '),
        "metric": ("common/evaluate.py", "# nats per token\n", METRIC)}
    for name, (path, place, text) in places.items():
        if name != leave_out:
            into(folder / path, place, text, before=name in ("mixer", "optimiser"))


def run_in(folder: Path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_the_ideas_of_the_readme_work_in_the_places_it_names(tmp_path, corpus):
    """An activation in 1 place, a mixer in 2, an optimiser in 2, a metric in 1: nothing else has to change.
    And the example loop runs as printed."""
    copy_with_ideas(tmp_path)
    done = run_in(tmp_path, TRY.replace("DATA", repr(corpus)).replace("LOOP\n", LOOP))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("forgotten, code, message", [
    ("its name", "ModelConfig(mixer='average')", "mixer: expected one of attention, context, lstm; got"),
    ("its name there", "OptimizerConfig(optimizer='nadam')", "optimizer: expected one of adamw, muon, sgd"),
    ("specs", "LM(ModelConfig(vocab_size=9, mixer='average', pos='none'))",
     r"trunk.0.mixer.decay \(128,\) has no Spec .*: add 'decay' to the `specs` of the layer")])
def test_a_forgotten_place_is_named(tmp_path, forgotten, code, message):
    copy_with_ideas(tmp_path, leave_out=forgotten)
    if forgotten == "specs":
        source = (tmp_path / "model.py").read_text()
        (tmp_path / "model.py").write_text(re.sub(r' +self.specs = \{"decay".*\n', "", source))
    done = run_in(tmp_path, f"from model import *; from muon import *; {code}")
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[-1500:]


# ------------------------------------------------------------------------------------------------------------
# What it names


def test_training_alone_needs_the_files_it_says(tmp_path):
    """Copied to Colab, say."""
    said = re.search(r"training alone needs (.*?)\)", README, re.S)[1]
    for name in re.findall(r"`(.*?)`", said):
        (shutil.copytree if name.endswith("/") else shutil.copy)(name, tmp_path / name)
    done = run_in(tmp_path, "import train; train.main(train.TrainConfig(vocab_size=99, dry_run=True))")
    assert done.returncode == 0 and "parameters" in done.stdout, done.stderr


def test_it_is_one_page():
    assert len(README.split()) <= 2300


def test_files_the_readme_names_exist():
    for name in re.findall(r"[`(]([\w/]+\.(?:py|md|txt|png))[`)]", README):
        made = name in ("samples.txt", "table.md", "report.md", "sweep.png", "loss.png")
        assert made or Path(name).exists() or Path("config", name).exists(), name


def test_make_targets_the_readme_names_exist():
    makefile = Path("Makefile").read_text()
    for target in set(re.findall(r"(?:^|`|= )make ([a-z][\w-]+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_to_headings_lead_somewhere():
    links = re.findall(r"\]\((\S*?)#(.*?)\)", README)
    assert links
    for path, link in links:
        headings = re.findall(r"^## (.*)$", Path(path or "README.md").read_text(), re.M)
        assert link in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_troubleshooting_quotes_real_messages():
    paths = ["train.py", "model.py", "prepare_data.py", *Path("common").glob("*.py")]
    sources = "".join(Path(p).read_text() for p in paths)
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that continue on the next line
    table = README.split("## When something goes wrong")[1].split("\n## ")[0]
    quotes = re.findall(r"^\| `(.*?)` \|", table, re.M)
    assert len(quotes) > 8
    for quoted in quotes:
        for piece in re.split(r"\.\.\.|'x'|'y'|data/", quoted):
            assert piece.strip() in sources or piece == "CUDA out of memory", piece
