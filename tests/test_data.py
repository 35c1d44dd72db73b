"""common/data.py: each token exactly once, batches as a function of position alone, and damaged files."""
import json
import os
import shutil

from common import data

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")


def test_an_epoch_shows_every_window_once_and_offsets_differ():
    tokens = np.arange(1000, dtype=np.uint16)
    windows = data.Windows(tokens, 16, seed=3)
    assert windows.per_epoch == (1000 - 16) // 16
    offsets = []
    for epoch in range(5):
        starts = windows.starts(epoch * windows.per_epoch, windows.per_epoch)
        offset = starts.min()
        assert sorted(starts) == [offset + 16 * i for i in range(windows.per_epoch)]
        assert list(starts) != sorted(starts)
        assert 0 <= offset < 16 and starts.max() + 16 < 1000
        offsets.append(int(offset))
    assert len(set(offsets)) > 1


def test_batches_are_a_function_of_seed_and_position():
    tokens = np.arange(1000, dtype=np.uint16)
    one, two = data.Windows(tokens, 16, seed=3), data.Windows(tokens, 16, seed=3)
    whole = one.starts(0, 200)
    for first, count in ((150, 50), (0, 10), (61, 3), (59, 8)):  # out of order and across epochs
        assert list(two.starts(first, count)) == list(whole[first:first + count])
    assert list(data.Windows(tokens, 16, seed=4).starts(0, 200)) != list(whole)
    x, y = one.batch(7, 4, CPU)
    assert x.dtype == torch.int64
    assert torch.equal(x, torch.from_numpy(whole[7:11])[:, None] + torch.arange(16))
    assert torch.equal(y, x + 1)


def test_too_few_tokens_for_one_window():
    message = "31 training tokens are too few for a context of 16: at least 32"
    with pytest.raises(data.DataError, match=message):
        data.Windows(np.zeros(31, dtype=np.uint16), 16, seed=1)
    assert data.Windows(np.zeros(32, dtype=np.uint16), 16, seed=1).per_epoch == 1


@pytest.mark.parametrize("length, seq_len", [(100, 7), (99, 7), (8, 7), (9, 7), (2, 7), (64, 8)])
@pytest.mark.parametrize("batch_size, world", [(1, 1), (3, 1), (100, 1), (2, 2), (2, 3)])
def test_evaluation_predicts_every_token_but_the_first_once(length, seq_len, batch_size, world):
    tokens, seen = np.arange(length, dtype=np.uint16), []
    for rank in range(world):
        for x, y in data.eval_batches(tokens, seq_len, batch_size, rank, world, CPU):
            assert x.shape == y.shape and x.size(0) <= batch_size and x.size(1) == seq_len
            assert torch.equal(y[y >= 0], x[y >= 0] + 1)  # each target follows its input
            seen += y[y >= 0].tolist()
    assert sorted(seen) == list(range(1, length))


def broken(corpus, tmp_path, change):
    folder = shutil.copytree(corpus, tmp_path / "broken")
    change(folder)
    return str(folder)


def rewrite_meta(folder, change):
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def resize(folder, size):
    os.truncate(folder / "train.bin", size)


def foreign(folder):
    raw = bytearray((folder / "train.bin").read_bytes())
    raw[:1000] = raw[1000:2000]
    (folder / "train.bin").write_bytes(raw)


def out_of_range(folder):
    raw = np.fromfile(folder / "train.bin", dtype=np.uint16)
    raw[5] = 999
    raw.tofile(folder / "train.bin")
    rewrite_meta(folder, lambda m: m["splits"]["train"].pop("head_sha256"))


@pytest.mark.parametrize("change, message", [
    (lambda f: os.remove(f / "train.bin"), "no .*train.bin; repeat the prepare_data.py command.*--overwrite"),
    (lambda f: os.remove(f / "meta.json"), "no tokens in .*python prepare_data.py"),
    (lambda f: (f / "meta.json").write_text("{ not json"), "meta.json is damaged"),
    (lambda f: rewrite_meta(f, lambda m: m.pop("tokenizer")),
     r"meta.json is damaged \(KeyError: 'tokenizer'"),
    (lambda f: resize(f, 0), "train.bin is empty, but meta.json says"),
    (lambda f: resize(f, 1001), "train.bin has 1,001 bytes, but meta.json says .* truncated"),
    (lambda f: rewrite_meta(f, lambda m: m["splits"]["train"].update(tokens=5)),
     "meta.json says 5 uint16 tokens"),
    (lambda f: shutil.copy(f / "val.bin", f / "train.bin"), "truncated or from another corpus"),
    (foreign, "does not start with the tokens that meta.json describes"),
    (out_of_range, "contains id 999, but the tokenizer has 257 ids"),
])
def test_damaged_folders_are_diagnosed(corpus, tmp_path, change, message):
    folder = broken(corpus, tmp_path, change)
    with pytest.raises(data.DataError, match=f"(?s){message}"):
        data.open_tokens(folder, "train", data.read_meta(folder))


def test_an_intact_folder_opens(corpus):
    meta = data.read_meta(corpus)
    for split in ("train", "val", "test"):
        assert len(data.open_tokens(corpus, split, meta)) == meta["splits"][split]["tokens"] > 5000
