"""Small real corpora, made by prepare_data.py from English that every Python ships: pydoc's help topics."""
import signal
from pydoc_data.topics import topics
from types import SimpleNamespace

import prepare_data
from common.data import Windows, open_text
from common.distributed import Dist
from model import LM
from muon import make_optimizer
from train import TrainConfig

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` ignores it, and so would scripts
torch.set_num_threads(1)  # the models are tiny, and threads of several processes get in each other's way


def write_documents(folder, count: int, characters: int):
    folder.mkdir(parents=True)
    for name in sorted(topics, key=lambda n: -len(topics[n]))[:count]:
        (folder / f"{name}.txt").write_text(topics[name][:characters], encoding="utf-8")
    return folder


def prepare(root, name: str, tokenizer: str, count=30, characters=6000) -> str:
    source = write_documents(root / f"{name}_text", count, characters)
    prepare_data.main(prepare_data.PrepareConfig(source=str(source), name=name, data_dir=str(root / "data"),
                                                 tokenizer=tokenizer))
    return str(root / "data" / name)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """About 160,000 training bytes, 9,000 for validation; byte tokenizer."""
    return prepare(tmp_path_factory.mktemp("corpus"), "topics", "bytes")


@pytest.fixture(scope="session")
def bpe_corpus(tmp_path_factory) -> str:
    return prepare(tmp_path_factory.mktemp("bpe"), "topics_bpe", "bpe:400")


@pytest.fixture
def small(corpus, tmp_path):
    """Makes configs of a run of seconds, in fp32 on the CPU."""
    def make(**options) -> TrainConfig:
        return TrainConfig(**{
            "data": corpus, "out_dir": str(tmp_path / "out"), "name": "run", "device": "cpu", "dtype": "fp32",
            "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32, "batch_size": 8, "lr": 3e-3,
            "epochs": 0.0, "max_steps": 20, "eval_interval": 10, "log_interval": 1,
            "sample_tokens": 8} | options)
    return make


def started(cfg: TrainConfig, rank: int = 0, world: int = 1) -> SimpleNamespace:
    """What a loop on the training kit needs, without a run folder."""
    text, dist = open_text(cfg.data), Dist(rank, world, torch.device("cpu"))
    cfg = cfg.resolved(text.meta)
    torch.manual_seed(cfg.seed)
    model = LM(cfg)
    return SimpleNamespace(cfg=cfg, text=text, dist=dist, model=model, optimizer=make_optimizer(model, cfg),
                           scaler=torch.amp.GradScaler("cpu", enabled=False),
                           windows=Windows(text.train, cfg.max_seq_len, cfg.seed))
