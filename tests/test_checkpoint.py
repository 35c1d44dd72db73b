"""common/checkpoint.py: a checkpoint is data, never code, and a damaged one is reported."""
import os
import pickle

from common import checkpoint
from common.checkpoint import CheckpointError
from common.files import DiskError, write_atomically

import pytest
import torch


def test_a_saved_checkpoint_loads_unchanged(tmp_path):
    state = {"model": {"w": torch.randn(3, 4)}, "config": {"lr": 1e-3, "lens": [1, 2]}, "step": 7}
    checkpoint.save(str(tmp_path / "last.pt"), state)
    loaded = checkpoint.load(str(tmp_path / "last.pt"))
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["config"] == state["config"] and loaded["step"] == 7
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_folder_stands_for_its_best_checkpoint(tmp_path):
    checkpoint.save(str(tmp_path / "last.pt"), {"model": {}, "config": {}, "step": 2})
    assert checkpoint.load(str(tmp_path))["step"] == 2
    checkpoint.save(str(tmp_path / "best.pt"), {"model": {}, "config": {}, "step": 1})
    assert checkpoint.load(str(tmp_path))["step"] == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "last.pt")
    checkpoint.save(path, {"model": {}, "config": {}, "step": 1})

    def half(file):
        file.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(DiskError, match="disk full"):
        write_atomically(path, half)
    assert checkpoint.load(path)["step"] == 1


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, 0.999])
def test_truncated_checkpoints_are_reported(tmp_path, keep):
    path = str(tmp_path / "last.pt")
    checkpoint.save(path, {"model": {"w": torch.randn(100, 100)}, "config": {}})
    size = os.path.getsize(path)
    os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
    with pytest.raises(CheckpointError, match=r"last.pt is not a whole checkpoint \([\d,]+ bytes"):
        checkpoint.load(path)


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, write):
    bomb = Malicious()
    bomb.path, path = str(tmp_path / "executed"), str(tmp_path / "bad.pt")
    if write == "torch":
        torch.save({"model": {}, "config": bomb}, path)
    else:
        with open(path, "wb") as f:
            pickle.dump({"model": {}, "config": bomb}, f)
    message = {"torch": "was not loaded: a checkpoint is data, never code",
               "pickle": "is not a whole checkpoint"}[write]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)
    assert not os.path.exists(bomb.path)
    with open(path, "rb") as f:  # the bomb is real: loading it as code sets it off
        torch.load(f, weights_only=False) if write == "torch" else pickle.load(f)
    assert os.path.exists(bomb.path)


def test_foreign_and_missing_files(tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "theirs.pt")
    message = r"not a nanoMem checkpoint: it lacks model, config \(it has: state_dict, epoch\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(str(tmp_path / "theirs.pt"))
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match=r"it has: Tensor"):
        checkpoint.load(str(tmp_path / "tensor.pt"))
    with pytest.raises(CheckpointError, match="no checkpoint at .*nowhere.pt"):
        checkpoint.load(str(tmp_path / "nowhere.pt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no best.pt or last.pt in"):
        checkpoint.load(str(tmp_path / "empty"))
    (tmp_path / "text.pt").write_text("hello, this is not a checkpoint")
    with pytest.raises(CheckpointError, match="text.pt"):
        checkpoint.load(str(tmp_path / "text.pt"))
