"""memory_probe.py on an imported model: full training, LoRA and touched rows."""
import json
from dataclasses import replace

import memory_probe
import prepare_data
import pretrained
from common import checkpoint, lora, tokenizer
from common.config import ConfigError
from common.data import open_text
from common.distributed import Dist
from common.files import read_rows
from common.stop import StopRequest
from memory_probe import ProbeConfig
from probes.base import architecture, base_config, load_base
from tests.conftest import prepare

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"level": "H0", "pool": 8, "gate": 0.0, "base_steps": 20, "facts": 4, "spread": 16, "steps": 3,
         "lead": 2, "batch_size": 16, "max_seq_len": 48, "seeds": 1, "chaos_seeds": 0, "dtype": "fp32",
         "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, and the run folder of a model shaped as Qwen2, with padding rows, in its tokens."""
    root = tmp_path_factory.mktemp("imported")
    tok = tokenizer.load(prepare(root, "theirs", "bpe:2000"))
    torch.manual_seed(0)
    options = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **options))
    model.save_pretrained(root / "theirs")
    (root / "theirs" / "tokenizer.json").write_text(json.dumps(pretrained.library_json(tok)))
    cfg = pretrained.PretrainedConfig(source=str(root / "theirs"), out_dir=str(root / "out"), name="qwen")
    base = pretrained.main(cfg)["folder"]
    prepare_data.main(prepare_data.PrepareConfig(source=str(root / "theirs_text"), name="topics",
                                                 data_dir=str(root / "data"), tokenizer_from=base))
    return {"data": str(root / "data" / "topics"), "out_dir": str(root / "out"), "base": base}


@pytest.mark.slow
def test_an_imported_model_is_probed_by_full_training_lora_and_rows(place, monkeypatch):
    arms = ("lora_rank=4 lr=1e-2", "method=rows lr=1e-2")
    cfg = ProbeConfig(**SMALL | place, arm=arms, lr=1e-2, name="probed")
    row = memory_probe.main(cfg)
    assert row["status"] == "finished"
    logged = read_rows(f"{cfg.out_dir}/probed/probes.jsonl")
    by = {arm: [r for r in logged if r["part"][0] == arm] for arm in ("as it is", *arms)}
    first = {arm: rows[0]["kinds"] for arm, rows in by.items()}
    last = {arm: rows[-1]["kinds"] for arm, rows in by.items()}
    assert first["as it is"] == first[arms[0]] == first[arms[1]]  # B is 0 at the start, to the bit
    assert last["as it is"] != last[arms[0]] != last[arms[1]] != last["as it is"]  # each learns its way

    left = iter((11, 33, 58))

    class Stopping(StopRequest):
        def __init__(self):
            super().__init__()
            self.left = next(left, 10**9)

        def agreed(self, dist):
            self.left -= 1
            return self.left < 0

    monkeypatch.setattr(memory_probe, "StopRequest", Stopping)
    other = replace(cfg, name="again")
    while (again := memory_probe.main(other))["status"] == "stopped":
        pass
    assert again["result"] == row["result"]


def test_lora_trains_its_matrices_alone(place):
    cfg = architecture(ProbeConfig(**SMALL | place, lora_rank=4), open_text(place["data"]).meta)
    model, optimizer = load_base(cfg, checkpoint.load(place["base"]), Dist(0, 1, torch.device("cpu")), False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(lora.is_lora(n) for n in trained)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(trained)
    assert base_config(cfg).vocab_size == 2048 and base_config(cfg).n_tokens == 2000


@pytest.mark.parametrize("options, words", [
    ({"lora_rank": 4, "method": "rows"}, "freezes"), ({"lora_rank": -1}, "lora_rank"),
    ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha"),
    ({"experiment": "frequency", "method": "ewc"}, "continual")])
def test_contradictions_are_named(place, options, words):
    with pytest.raises(ConfigError, match=words):
        ProbeConfig(**SMALL | place | options)


@pytest.mark.parametrize("options, names", [
    ({"arm": ("window=8", "lr=1e-3")}, "window"), ({"arm": ("mixer=lstm pos=none",)}, "mixer"),
    ({"arm": ("base_optimizer=muon",), "pool": 0}, "base_optimizer")])
def test_an_arm_that_the_base_would_undo_is_refused(place, options, names):
    with pytest.raises(ConfigError, match=f"'{options['arm'][0]}': {names} has no effect"):
        ProbeConfig(**SMALL | place | options)
    if names != "base_optimizer":
        ProbeConfig(**SMALL | {"data": place["data"]} | options)  # without a base it is an arm


def test_an_imported_model_hands_facts_over(place):
    """Options of the architecture, such as those of config/probe_handover.py, are the imported model's."""
    cfg = ProbeConfig(**SMALL | place | {"max_seq_len": 64}, experiment="handover", context_share=0.5,
                      short_conv=3, d_model=64, base_optimizer="muon", name="handed")
    row = memory_probe.main(cfg)
    assert row["status"] == "finished"
    base = checkpoint.load(f"{cfg.out_dir}/{base_config(architecture(cfg, open_text(cfg.data).meta)).name}")
    assert base["config"]["d_model"] == 48 and base["config"]["n_kv_heads"] == 2
    found = json.loads(open(f"{cfg.out_dir}/handed/summary.json").read())["arms"][0]["modes"]
    assert set(found) == {"ce", "kl"} and all(m["steps"] == [0, 1, 2, 3] for m in found.values())
