"""common/config.py: files and flags are treated alike, and nothing is ever silently ignored."""
import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
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
from common.config import Config, ConfigError, UserError, help_text, launch, load, option_types

import pytest

SCRIPTS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig, "bench.py": bench.BenchConfig,
           "prepare_data.py": prepare_data.PrepareConfig, "sweep.py": sweep.SweepConfig,
           "quantize.py": quantize.QuantizeConfig, "recall_probe.py": recall_probe.RecallConfig,
           "memory_probe.py": memory_probe.ProbeConfig, "loop_train.py": loop_train.LoopConfig,
           "optimizer_probe.py": optimizer_probe.SteerConfig, "pretrained.py": pretrained.PretrainedConfig,
           "distill.py": distill.DistillConfig}


@dataclasses.dataclass
class Example(Config):
    POSITIONAL: typing.ClassVar[str] = "things"
    # size
    width: int = 4  # how wide
    rate: float = 0.5  # how fast
    fast: bool = False  # hurry
    kind: typing.Literal["round", "square"] = "round"  # which shape
    lens: tuple[int, ...] = ()  # several
    words: tuple[str, ...] = ("a",)  # some words
    things: tuple[str, ...] = ()  # bare arguments
    name: str = "example"

    def problems(self):
        return [f"width must be even, got {self.width}"] if self.width % 2 else []


def file(tmp_path, text, name="my.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_defaults_then_files_then_flags(tmp_path):
    one = file(tmp_path, "width = 6\nrate = 1\nlens = [1, 2]", "one.py")
    two = file(tmp_path, "width = 8", "two.py")
    assert load(Example, []) == Example()
    cfg = load(Example, [one, two, "--rate=2e-3", "--fast", "--kind", "square", "--words=x, y", "--words=z"])
    assert cfg == Example(width=8, rate=0.002, fast=True, kind="square", lens=(1, 2), words=("x, y", "z"),
                          name="one")
    assert load(Example, ["--width=1_000", "--lens=1,2,3", "--fast=false", "thing", "other"]) == Example(
        width=1000, lens=(1, 2, 3), things=("thing", "other"))
    assert load(Example, ["--width=1e3", "--rate", "-1"]).rate == -1.0 and isinstance(cfg.rate, float)
    assert load(Example, [one, "--name=mine"]).name == "mine"


def test_values_to_start_from(tmp_path):
    base = dataclasses.asdict(Example(width=6, rate=2.0, name="mine"))
    assert load(Example, [file(tmp_path, "rate = 3.0")], base) == Example(width=6, rate=3.0, name="mine")
    assert load(Example, ["--width=8"], base) == Example(width=8, rate=2.0, name="mine")
    assert base["width"] == 6


def test_config_files_may_compute_and_import(tmp_path):
    file(tmp_path, "width = 6", "nanomem_base_config.py")
    sys.path.insert(0, str(tmp_path))
    try:
        path = file(tmp_path, "import math\nfrom nanomem_base_config import *\n_n = 3\n"
                              "def f(x):\n    return x\n"
                              "lens = tuple(f(2 ** i) for i in range(_n))\nrate = math.sqrt(4) * width")
        assert load(Example, [path]) == Example(width=6, lens=(1, 2, 4), rate=12.0, name="my")
    finally:
        sys.path.remove(str(tmp_path))


def test_all_problems_at_once_with_the_nearest_names(tmp_path):
    path = file(tmp_path, "widht = 6\nrate = 'fast'\nfor i in range(3): pass\nkind = 'squar'")
    with pytest.raises(ConfigError) as error:
        load(Example, [path, "--fsat", "--width=3.5", "--lens=1,x", "--rate", "no/such.py", "-x"])
    text = str(error.value)
    for expected in (r"9 problems in the configuration, nothing was run",
                     r"my.py: no option 'widht'; did you mean 'width'\?",
                     r"my.py: rate: expected float, got 'fast'",
                     r"my.py: no option 'i'", r"names of helper variables must begin with '_'",
                     r"kind: expected one of round, square; got 'squar'; did you mean 'square'\?",
                     r"flag: no option 'fsat'; did you mean 'fast'\?",
                     r"flag --width: expected int, got 3.5 \(float\)",
                     r"flag --lens: expected int, got 'x'", r"flag --rate: expected float, got 'no/such.py'"):
        assert re.search(expected, text), (expected, text)


@pytest.mark.parametrize("text, message", [
    ("width = True", "width: expected int, got True"), ("width = 4.5", "expected int, got 4.5"),
    ("fast = 1", "expected bool, got 1"),
    ("lens = 3", "lens: expected a list of int, got 3"), ("lens = [1, 'x']", "expected int, got 'x'"),
    ("width = 3", "width must be even, got 3"), ("1/0", r"my.py:1: ZeroDivisionError"),
    ("width = = 3", "SyntaxError"),
    ("\n\nimport nothing_of_the_kind", "my.py:3: ModuleNotFoundError")])
def test_wrong_values_in_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(Example, [file(tmp_path, text)])


def test_missing_file_and_missing_value(tmp_path):
    file(tmp_path, "", "exp1.py")
    with pytest.raises(ConfigError, match="no config file '.*exp11.py'; did you mean '.*exp1.py'"):
        load(Example, [str(tmp_path / "exp11.py")])
    with pytest.raises(ConfigError, match="flag --width: no value given"):
        load(Example, ["--width", "--fast"])
    with pytest.raises(ConfigError, match=r"unexpected argument 'demo' \(config files end in .py"):
        load(train.TrainConfig, ["demo"])


def test_auto_or_a_switch(tmp_path):
    def compile_of(*argv):
        return load(train.TrainConfig, list(argv)).compile

    assert compile_of() == "auto" and compile_of("--compile") == compile_of("--compile=true") == "true"
    assert compile_of("--compile", "--lr=1e-3") == "true" and compile_of("--compile", "false") == "false"
    assert compile_of("--compile", "auto") == "auto"
    assert compile_of(file(tmp_path, "compile = True")) == "true"
    assert compile_of(file(tmp_path, "compile = False")) == "false"
    with pytest.raises(ConfigError, match="flag --compile: expected one of auto, true, false; got 'maybe'"):
        compile_of("--compile=maybe")


def test_values_from_python_are_checked_too():
    with pytest.raises(ConfigError, match="width: expected int, got '4'"):
        Example(width="4")


@pytest.mark.parametrize("script, cls", SCRIPTS.items())
def test_help_names_every_option_with_default_and_comment(script, cls):
    text = help_text(cls)
    for f in dataclasses.fields(cls):
        line = re.search(rf"^    --{f.name}=(.*)$", text, re.M)
        assert line, f"{f.name} is not in --help of {script}"
        assert len(line[1].split("  ", 1)) == 2, f"{script}: {f.name} has no comment"
    assert text.startswith(inspect.getdoc(sys.modules[cls.__module__])[:40]) and f"python {script}" in text


def test_starting_a_script_imports_neither_the_compiler_nor_torch_without_need():
    """Each takes as long to import as the rest of the start."""
    code = ("import sys, prepare_data; assert 'torch' not in sys.modules; import "
            + ", ".join(script.removesuffix(".py") for script in SCRIPTS)
            + "; assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def reads(source: str, classes: set[str], configs=("cfg", "self.cfg")) -> set[str]:
    """Names that `source` reads: as cfg.NAME, getattr(cfg, "NAME") or, in the config `classes`, self.NAME.
    problems() and the like do not count, as reading an option there has no effect on the run."""
    found = set()

    def visit(node, in_config=False):
        if isinstance(node, ast.FunctionDef) and (node.name.endswith("problems") or node.name in (
                "contradictions", "differences")):
            return
        in_config = node.name in classes if isinstance(node, ast.ClassDef) else in_config
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value) in (*configs, *["self"] * in_config):
                found.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(cfg, '"):
            found.add(node.args[1].value)
        for child in ast.iter_child_nodes(node):
            visit(child, in_config)

    visit(ast.parse(source))
    return found


def unread(script: str, cls, source: str = "") -> set[str]:
    """Options of `cls` that neither the script reads nor the module that declares them. Other modules do not
    count: common/ may mention an option of the same name for another script. What a script imports from
    probes/ is part of it, and calls the config of an arm `arm`, `c` or `arms[a]`; so is what scripts that
    train share."""
    out, configs = set(), ("cfg", "self.cfg")
    used = re.findall(r"^from probes\.(\w+) import", Path(script).read_text(), re.M)
    parts = [Path(f"probes/{name}.py").read_text() for name in used]
    configs += ("arm", "c", "arms[a]") * bool(parts)
    shared = re.findall(r"^from common\.(plan|samples|distill_report) import", Path(script).read_text(), re.M)
    parts += [Path(f"common/{name}.py").read_text() for name in shared]
    for c in cls.__mro__[:-1]:
        if cls is sweep.SweepConfig and c is train.TrainConfig:
            break  # from here on, options are passed on to the script that is swept
        module = Path(sys.modules[c.__module__].__file__)
        texts = [source or Path(script).read_text(), *[module.read_text()] * (module.name != script), *parts]
        names = {name for name, kind in vars(c).get("__annotations__", {}).items()
                 if "ClassVar" not in str(kind)}
        names -= set().union(*(vars(b).get("__annotations__", {}) for b in c.__mro__[1:]))  # only a default
        out |= names - set().union(*(reads(text, {k.__name__ for k in cls.__mro__}, configs)
                                     for text in texts))
    return out


@pytest.mark.parametrize("script, cls", SCRIPTS.items())
def test_every_option_is_read(script, cls):
    """An option that nobody reads would be silently ignored."""
    assert not unread(script, cls)
    if script == "sweep.py":
        assert {"max_minutes", *reads(Path(script).read_text(), set())} >= set(sweep.OF_THE_SWEEP)


@pytest.mark.parametrize("script, option", [  # common/ mentions each of them as cfg.OPTION
    ("train.py", "checkpoint_activations"), ("train.py", "tbptt"), ("train.py", "device"),
    ("quantize.py", "data"), ("sample.py", "device"), ("recall_probe.py", "window"), ("bench.py", "dropout")])
def test_an_option_that_only_other_code_mentions_is_found(script, option):
    source = re.sub(rf"\bcfg\.{option}\b", "cfg.something", Path(script).read_text())
    assert any(f"cfg.{option}" in p.read_text() for p in Path("common").glob("*.py"))
    assert unread(script, SCRIPTS[script], source) == {option}


def test_a_script_prints_a_mistake_without_a_traceback():
    command = [sys.executable, "train.py", "config/demo.py", "--n_heads=3", "--batchsize=4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "no option 'batchsize'; did you mean 'batch_size'?" in done.stderr
    assert "n_heads=3 does not divide d_model=128" in done.stderr


def test_an_option_has_one_type_in_all_scripts():
    types = {}
    for script, cls in SCRIPTS.items():
        for name, kind in option_types(cls).items():
            types.setdefault(name, {}).setdefault(str(kind), []).append(script)
    assert not {name: kinds for name, kinds in types.items() if len(kinds) > 1}
    assert all({"device", "dtype", "compile"} <= option_types(cls).keys() for script, cls in SCRIPTS.items()
               if script not in ("prepare_data.py", "pretrained.py"))  # which run no model


@pytest.mark.parametrize("error, code, message", [
    (UserError("do this"), 2, "error: do this"), (KeyboardInterrupt(), 130, "interrupted; what was saved"),
    (RuntimeError("could not create a primitive descriptor for an LSTM"), 2, "use --dtype=fp32"),
    (RuntimeError("[enforce fail] not enough memory: you tried"), 2, "error: out of memory"),
    (MemoryError(), 2, "error: out of memory"),
    (OSError(5, "I/O error", "x"), 2, "error: x: I/O")])
def test_what_a_user_can_fix_ends_without_a_traceback(monkeypatch, capsys, error, code, message):
    def main(cfg):
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        launch(main, train.TrainConfig)
    assert ended.value.code == code and message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(cfg):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        launch(main, train.TrainConfig)


def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as done:
        load(train.TrainConfig, ["--lr=fast", "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and "torchrun" in out and "--lr=" in out


@pytest.mark.parametrize("path", sorted(Path("config").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_config_loads_and_says_what_it_asks(path):
    kinds = {"probe": memory_probe.ProbeConfig, "loop": loop_train.LoopConfig,
             "steer": optimizer_probe.SteerConfig, "rates": optimizer_probe.SteerConfig,
             "exp9": distill.DistillConfig, "exp10": distill.DistillConfig}
    cls = kinds.get(path.stem.split("_")[0], train.TrainConfig)
    if path.stem.startswith(("sweep", "recipe")):
        cls = sweep.chosen_config([str(path)])
    assert load(cls, [str(path)]).name == path.stem
    head = path.read_text().splitlines()[:4]
    if path.stem.startswith(("exp", "mini")):
        assert [line.split()[1].rstrip(":") for line in head[:3]] == ["Question", "Changed", "Documents"]


LADDER = {  # FACTS: d_model, layers, heads, d_ff, dropout, flash, positions, batch, lr, epochs
    1: (16, 2, 2, 64, 0.3, False, "learned", 8, 3e-4, 300),
    2: (16, 2, 2, 64, 0.3, False, "learned", 32, 3e-4, 10),
    3: (128, 4, 8, 512, 0.1, False, "learned", 32, 6e-4, 20),
    4: (256, 4, 8, 1024, 0.1, False, "learned", 32, 4e-4, 15),
    5: (256, 8, 8, 1024, 0.1, False, "learned", 16, 4e-4, 20),
    6: (512, 12, 8, 2048, 0.1, True, "learned", 16, 4e-4, 16),
    7: (512, 12, 8, 2048, 0.1, True, "rope", 16, 4e-4, 8)}


@pytest.mark.parametrize("exp", LADDER)
def test_ladder_configs_match_the_documents(exp):
    c = load(train.TrainConfig, [f"config/exp{exp}.py"])
    assert LADDER[exp] == (c.d_model, c.n_layers, c.n_heads, c.d_ff, c.dropout, c.flash, c.pos,
                           c.batch_size, c.lr, c.epochs)
    assert (c.vocab_size, c.max_seq_len, c.weight_decay, c.grad_clip, c.patience) == (50257, 512, 0.1, 1.0, 5)
    assert c.optimizer == "adamw" and c.tie_embeddings and c.head_bias and c.bias and len(c.prompts) == 5
    assert c.data == ("data/wikitext2" if exp == 1 else "data/wikitext103")
