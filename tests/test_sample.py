"""sample.py on a run that train.py made."""
import io
import math
import os
import shutil
import subprocess
import sys

import sample
import train
from common import checkpoint, data, tokenizer
from common.config import ConfigError, UserError
from model import load_model
from sample import SampleConfig

import pytest
import torch


@pytest.fixture(scope="module")
def trained(bpe_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for name, layers in (("one", 1), ("two", 2)):
        train.main(train.TrainConfig(
            data=bpe_corpus, out_dir=str(out), name=name, device="cpu", dtype="fp32", d_model=32,
            n_layers=layers, n_heads=2, max_seq_len=64, batch_size=8, epochs=0.0, max_steps=30, pos="rope",
            lr=1e-2))
    return str(out)


def cfg(trained, *names, **options):
    paths = tuple(f"{trained}/{n}" for n in names)
    return SampleConfig(**{"checkpoints": paths, "device": "cpu", "max_new_tokens": 12} | options)


def test_prompts_are_continued_and_streamed(trained, capsys):
    both = {"prompt": ("The ", "If"), "num_samples": 2}
    result = sample.main(cfg(trained, "one", "two", **both))
    assert list(result) == ["The ", "If"]
    assert all(len(texts) == 2 for r in result.values() for texts in r.values())
    out = capsys.readouterr().out
    for prompt, by_run in result.items():
        for texts in by_run.values():
            assert all(prompt + text in out for text in texts)
    assert sample.main(cfg(trained, "one", "two", **both)) == result  # the seed decides
    assert sample.main(cfg(trained, "one", "two", **both, seed=2)) != result


def test_greedy_equals_the_argmax_by_hand(trained):
    path = f"{trained}/two"
    model, tok = load_model(path)[0], tokenizer.load(path)
    ids = [tok.eot, *tok.encode("The ")]
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    text = sample.main(cfg(trained, "two", prompt=("The ",), temperature=0.0))["The "][path][0]
    assert text == tok.decode(ids[1 + len(tok.encode("The ")):])


def test_next_token_tables_side_by_side(trained, capsys):
    result = sample.main(cfg(trained, "one", "two", prompt=("The ",), top_tokens=5))["The "]
    model, tok = load_model(f"{trained}/one")[0], tokenizer.load(f"{trained}/one")
    probabilities = model(torch.tensor([[tok.eot, *tok.encode("The ")]]))[0][0, -1].softmax(-1)
    rows = result[f"{trained}/one"]
    assert len(rows) == 5 and [p for _, p in rows] == sorted((p for _, p in rows), reverse=True)
    assert math.isclose(rows[0][1], probabilities.max().item(), rel_tol=1e-5)
    assert rows[0][0] == tok.decode([int(probabilities.argmax())])
    out = capsys.readouterr().out
    assert f"{trained}/one" in out and f"{trained}/two" in out and f"{rows[0][1]:.2%}" in out


def test_prompts_from_file_stdin_and_terminal(trained, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("The \n\nIf\n")
    assert list(sample.main(cfg(trained, "one", prompt_file=str(tmp_path / "prompts.txt")))) == ["The ", "If"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("A\nB\n"))
    assert list(sample.main(cfg(trained, "one", prompt_file="-"))) == ["A", "B"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert list(sample.main(cfg(trained, "one", interactive=True))) == ["hello"]
    assert list(sample.main(cfg(trained, "one"))) == [""]


def test_mistakes_are_reported(trained, tmp_path, corpus):
    with pytest.raises(UserError, match="no prompt file 'nowhere.txt'"):
        sample.main(cfg(trained, "one", prompt_file="nowhere.txt"))
    with pytest.raises(ConfigError, match="use one of prompt, prompt_file and interactive"):
        cfg(trained, "one", prompt=("a",), interactive=True)
    with pytest.raises(ConfigError, match="top_p must be in"):
        cfg(trained, "one", top_p=1.5)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        sample.main(cfg(trained, "three"))
    message = "(?s)was trained with the tokenizer bpe:400.*with bytes.*--tokenizer_from"
    with pytest.raises(UserError, match=message):
        sample.main(cfg(trained, "one", tokenizer_from=corpus))
    shutil.copy(f"{trained}/one/best.pt", tmp_path / "alone.pt")
    with pytest.raises(UserError, match="tokenizer"):
        sample.main(SampleConfig(checkpoints=(str(tmp_path / "alone.pt"),), device="cpu"))
    moved = SampleConfig(checkpoints=(str(tmp_path / "alone.pt"),), device="cpu", max_new_tokens=3,
                         tokenizer_from=f"{trained}/one")
    assert list(sample.main(moved)) == [""]


def test_a_run_folder_is_enough_on_another_machine(trained, tmp_path):
    folder = shutil.copytree(f"{trained}/one", tmp_path / "copied")
    script, flags = os.path.abspath("sample.py"), ["--prompt=The ", "--max_new_tokens=5"]
    done = subprocess.run([sys.executable, script, str(folder), *flags], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"--- {folder}\nThe " in done.stdout, done.stderr


def test_sampled_text_is_written_as_tokens_to_train_on(trained, bpe_corpus, tmp_path):
    folder = str(tmp_path / "self")
    options = {"write": folder, "write_tokens": 3000, "temperature": 1.0, "top_k": 0}
    counts, = sample.main(cfg(trained, "two", **options)).values()
    meta = data.read_meta(folder)
    ids, tok = data.open_tokens(folder, "train", meta), tokenizer.load(folder)
    assert 2900 < len(ids) == counts["tokens"] <= 3000 and ids[0] == tok.eot
    assert meta["tokenizer"] == data.read_meta(bpe_corpus)["tokenizer"]
    model, _ = load_model(f"{trained}/two")
    new = model.generate(torch.full((sample.ROWS, 1), tok.eot), 63,
                         generator=torch.Generator().manual_seed(1))
    row = [int(t[0]) for t in new]
    assert ids[1:64].tolist() == row or tok.eot in row
    with pytest.raises(UserError, match="already exists"):
        sample.main(cfg(trained, "two", **options))
    with pytest.raises(ConfigError, match="(?s)goes without prompt.*one checkpoint, got 2"):
        cfg(trained, "one", "two", **options, top_tokens=3)
    assert train.main(train.TrainConfig(
        data=bpe_corpus, init_from=f"{trained}/two", out_dir=str(tmp_path), replay=0.2, replay_data=folder,
        max_steps=2, batch_size=8, device="cpu"))["status"] == "finished"
