"""pretrained.py against transformers: the same numbers in, through the cache, and out again."""
import copy
import fnmatch
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import prepare_data
import pretrained
import quantize
import sample
import train
from common import checkpoint, data, tokenizer
from common.chat import format_of
from common.config import UserError
from common.config import load as load_config
from common.distributed import Dist
from common.evaluate import evaluate
from common.weights import WeightsError, open_weights, write_safetensors
from config.lm_eval.split import whole
from model import LM, ModelConfig, load_model
from pretrained import PretrainedConfig, choose_family, config_of, model_config
from tests.conftest import write_documents

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 64}
GROUPED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 3e-4}


def rope(theta, **options):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **options}}


# of each family the ordinary model, and what its options change
MODELS = {
    "gpt2": ("gpt2", {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
                      "layer_norm_epsilon": 1e-3}),
    "gpt2-untied": ("gpt2", {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
                             "n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False}),
    "llama": ("llama", GROUPED | rope(7000.0)),
    "llama-tied": ("llama", GROUPED | rope(500.0) | {"head_dim": 12, "attention_bias": True,
                                                     "tie_word_embeddings": True}),
    "llama-biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", GROUPED | rope(20000.0) | {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("qwen2", GROUPED | rope(1e6) | {"tie_word_embeddings": True}),
    "qwen2-local": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 6, "layer_types": [
        "sliding_attention", "sliding_attention", "full_attention"]}),
    "qwen3": ("qwen3", GROUPED | rope(1e6) | {"head_dim": 24}),
    "gpt_neox": ("gpt_neox", SIZES | rope(10000.0, partial_rotary_factor=0.25)
                 | {"intermediate_size": 40, "layer_norm_eps": 1e-4}),
    "gpt_neox-serial": ("gpt_neox", SIZES | rope(900.0, partial_rotary_factor=1.0) | {
        "intermediate_size": 40, "use_parallel_residual": False, "tie_word_embeddings": True}),
    "opt": ("opt", SIZES | {"ffn_dim": 48}),
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Data with a byte-level BPE of 280 ids, so that 20 rows of every model are padding."""
    root = tmp_path_factory.mktemp("text")
    source = write_documents(root / "source", 12, 4000)
    prepare_data.main(prepare_data.PrepareConfig(source=str(source), name="text", data_dir=str(root),
                                                 tokenizer="bpe:280"))
    return str(root / "text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_folder):
    """{name: folder as transformers writes it}, made when asked for: no bias is 0, no norm weight 1."""
    root, made = tmp_path_factory.mktemp("theirs"), {}
    tok = pretrained.library_json(tokenizer.load(text_folder))

    def make(name):
        if name not in made:
            kind, options = MODELS[name]
            torch.manual_seed(0)
            special = {"bos_token_id": 279, "eos_token_id": 279, "pad_token_id": None}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options, **special))
            for p in model.parameters():
                p.data += 0.2 * torch.randn_like(p)
            model.save_pretrained(root / name)
            (root / name / "tokenizer.json").write_text(json.dumps(tok))
            made[name] = str(root / name), model.eval()
        return made[name]

    return make


def imported(folder, tmp_path, **options) -> str:
    cfg = PretrainedConfig(source=folder, **{"out_dir": str(tmp_path), "name": "run"} | options)
    return pretrained.main(cfg)["folder"]


def exported(run, tmp_path, name="out") -> str:
    return pretrained.main(PretrainedConfig(source=run, export=str(tmp_path / name)))["folder"]


def ids(batch=2, length=30, seed=1):
    return torch.randint(280, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# In and out


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_in_and_the_same_bits_out(name, folders, tmp_path):
    folder, theirs = folders(name)
    run = imported(folder, tmp_path)
    ours, saved = load_model(run)
    x, close = ids(), {"atol": 1e-4, "rtol": 1e-4}
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x)[0], expected, **close)
        state = ours.init_state()  # a cache, filled by pieces and tokens
        parts = [ours(part, state=state)[0] for part in x.split([9, 1, 1, 19], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, **close)
    prompts = [x[0, :3], x[1, :11], x[0, 5:12]]  # of different lengths, each as alone in transformers
    got = torch.cat(list(ours.generate(prompts, 12, temperature=0)), dim=1)
    for prompt, row in zip(prompts, got, strict=True):
        alone = theirs.generate(prompt[None], max_new_tokens=12, min_new_tokens=12, do_sample=False,
                                suppress_tokens=list(range(280, 300)), eos_token_id=None)
        assert row.tolist() == alone[0, len(prompt):].tolist()

    out = str(tmp_path / "out")
    assert pretrained.main(PretrainedConfig(source=run, export=out))["family"] == MODELS[name][0]
    a, b = (load_file(os.path.join(f, "model.safetensors")) for f in (folder, out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again(x).logits, expected)
    was, now = (AutoConfig.from_pretrained(f).to_dict() for f in (folder, out))
    free = {"_name_or_path", "max_window_layers", "n_inner", "sliding_window"}  # where null says the same
    assert {k: v for k, v in was.items() if k not in free} == {k: now.get(k) for k in was if k not in free}


LOAD = """
import json, sys
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import model
    sys.exit("this process can import the repository")
except ImportError:
    pass
out = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if info[k]]
    ids = AutoTokenizer.from_pretrained(folder)(sys.argv[1], add_special_tokens=False)["input_ids"]
    new = model.generate(torch.tensor([ids]), max_new_tokens=50, min_new_tokens=50, do_sample=False)
    out[folder] = [wrong, ids, new[0, len(ids):].tolist()]
print(json.dumps(out))
"""


def test_a_process_without_this_repository_generates_the_same(folders, tmp_path):
    prompt, expected = "The for statement", {}
    for name in ("gpt2", "llama-tied", "mistral", "qwen2", "qwen3", "gpt_neox", "opt"):
        run = imported(folders(name)[0], tmp_path, name=name)
        model, tok = sample.load(run, "", "cpu")
        ids = tok.encode(prompt)
        eos = 279  # forbidden, as by min_new_tokens
        model.n_tokens = eos
        new = torch.cat(list(model.generate(torch.tensor([ids]), 50, temperature=0)), dim=1)
        expected[exported(run, tmp_path, f"{name}-out")] = [[], ids, new[0].tolist()]
    command = [sys.executable, "-I", "-c", LOAD, prompt, *expected]
    got = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert got.returncode == 0, got.stderr[-2000:]
    assert json.loads(got.stdout.splitlines()[-1]) == expected


# ------------------------------------------------------------------------------------------------------------
# Configurations


QWEN = {"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936}


def test_a_dry_run_needs_config_json_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    pretrained.main(PretrainedConfig(source=str(tmp_path), dry_run=True, out_dir=str(tmp_path / "out")))
    assert "parameters  494,032,768 (" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_the_demo_can_be_exported():
    cfg = load_config(train.TrainConfig, ["config/demo.py", "--vocab_size=300"])
    assert choose_family(cfg) == "llama"


def test_keys_of_transformers_4_mean_the_same():
    """As Qwen/Qwen2.5-0.5B, EleutherAI/pythia-70m, mistralai/Mistral-7B-v0.1 have them."""
    qwen = QWEN
    cfg = model_config(qwen, "qwen")
    with torch.device("meta"):
        assert LM(cfg).count_parameters()["total"] == 494_032_768
    assert (cfg.n_kv_heads, cfg.head_size, cfg.rope_theta, cfg.window) == (2, 0, 1e6, 0)
    assert (cfg.norm_eps, cfg.attn_bias) == (1e-6, "qkv")
    pythia = {"model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048,
              "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 8,
              "num_hidden_layers": 6, "rotary_emb_base": 5000, "rotary_pct": 0.25,
              "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304}
    cfg = model_config(pythia, "pythia")
    with torch.device("meta"):
        assert LM(cfg).count_parameters()["total"] == 70_426_624
    assert (cfg.rope_theta, cfg.rope_fraction, cfg.rope_size) == (5000.0, 0.25, 16)
    mistral = {**qwen, "model_type": "mistral", "sliding_window": 4096, "rope_scaling": None}
    assert model_config(mistral, "mistral").window == 4096
    assert model_config(mistral | {"sliding_window": None}, "mistral").window == 0
    for kind, theirs in (("qwen2", qwen), ("gpt_neox", pythia), ("mistral", mistral)):  # and are written
        ours = model_config(theirs, kind)
        written = config_of(ours, kind, {}, "float32")
        old = {"rope_theta", "rotary_pct", "rotary_emb_base"}
        assert all(written[k] == theirs[k] for k in old & theirs.keys())
        assert model_config(written, kind) == ours  # and by rope_parameters alone:
        assert model_config({k: v for k, v in written.items() if k not in old}, kind) == ours


LLAMA = {"model_type": "llama", **GROUPED}


@pytest.mark.parametrize("config, message", [
    ({"model_type": "gemma2"}, "model_type='gemma2' is not a family known here: gpt2, llama"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    (LLAMA | rope(1e4, rope_type="llama3"), "rope_parameters of type 'llama3'"),
    (LLAMA | rope(1e4, partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (LLAMA | {"mlp_bias": True}, "attention_bias=False with mlp_bias=True cannot be expressed"),
    (LLAMA | {"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is none of silu, swish"),
    (LLAMA | {"hidden_act": "gelu"}, "activation 'gelu' is none of silu, swish"),
    ({"model_type": "llama", "hidden_size": 32}, "vocab_size is missing\n.*num_hidden_layers is missing"),
    (LLAMA | {"num_key_value_heads": 3}, "n_kv_heads=3 does not divide n_heads=4"),
    ({"model_type": "qwen2", **GROUPED, "use_sliding_window": True, "max_window_layers": 1},
     "max_window_layers.* mix full and sliding attention"),
    ({"model_type": "qwen3", **GROUPED, "sliding_window": 4, "layer_types": [
        "full_attention", "sliding_attention", "sliding_attention"]}, "layer_types .*mix full and sliding"),
    ({"model_type": "gpt_neox", **SIZES, "intermediate_size": 40, "attention_bias": False},
     "attention_bias=False, but only True"),
    ({"model_type": "opt", **SIZES, "ffn_dim": 48, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
     "do_layer_norm_before=False, but only True .*\n.*word_embed_proj_dim=16, but only 32"),
    ({"model_type": "gpt2", "vocab_size": 9, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 8,
      "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
])
def test_what_cannot_be_expressed_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        model_config(config, "somewhere")


TINY = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 16, "head_bias": False}


@pytest.mark.parametrize("flags, family", [
    ({"pos": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}, "llama"),
    ({"pos": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "window": 8}, "mistral"),
    ({"pos": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "window": 8, "global_every": 2,
      "attn_bias": "qkv"}, "qwen2"),
    ({}, "gpt2"), ({"activation": "relu2", "n_kv_heads": 4, "bias": False, "dropout": 0.1}, "gpt2"),
    ({"pos": "rope", "rope_fraction": 0.5}, "gpt_neox"), ({"pos": "rope", "bias": False}, "gpt_neox"),
    ({"pos_offset": 2, "activation": "relu"}, "opt"),
])
def test_our_models_become_the_family_that_fits(flags, family, tmp_path, text_folder):
    cfg = ModelConfig(**TINY | {"vocab_size": 300, "max_seq_len": 64, "d_ff": 48} | flags, n_tokens=280)
    torch.manual_seed(0)
    model, tok = LM(cfg).eval(), tokenizer.load(text_folder)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    assert choose_family(cfg) == family
    run = tmp_path / "run"
    run.mkdir()
    tok.save(str(run))
    checkpoint.save(str(run / "best.pt"), {"model": model.state_dict(), "config": vars(cfg), "tokenizer": {
        "name": tok.name, "fingerprint": tok.fingerprint}})
    theirs = AutoModelForCausalLM.from_pretrained(exported(str(run), tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, model(ids())[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flags, message", [
    ({"head_bias": True}, "nearest, gpt2, .*\n  - head_bias=True, where it has False\n"),
    ({"pos": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "qk_norm": True},
     "nearest, llama, .*\n  - qk_norm=True, where it has False\n"),
    ({"attn_sink": True, "n_kv_heads": 2}, "attn_sink=True.*"),
    ({"pos": "none", "mixer": "lstm"}, "mixer=lstm, where it has attention"),
])
def test_our_models_that_no_family_has_are_refused(flags, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        choose_family(ModelConfig(**TINY | flags))


# ------------------------------------------------------------------------------------------------------------
# The hub


HUB = {"flax_model.msgpack", "README.md", "merges.txt", "onnx/model.onnx", "original/params.json", "LICENSE"}


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """A hub with one model, owner/name, in tmp_path/hub; `asked` collects the files that were asked for."""
    root, asked = tmp_path / "hub", []
    shutil.copytree(folders("qwen2")[0], root)
    for name in HUB - {"merges.txt"} | {"pytorch_model.bin"}:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not what it should be")

    def files(source):
        if source != "owner/name":
            raise huggingface_hub.errors.HFValidationError(f"Repository Not Found: {source}")
        return [str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()]

    def download(source, allow_patterns):
        asked[:] = sorted(f for f in files(source) if any(fnmatch.fnmatch(f, p) for p in allow_patterns))
        target = tmp_path / f"snapshot{len(os.listdir(tmp_path))}"
        for name in asked:
            target.mkdir(exist_ok=True)
            shutil.copy(root / name, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, name: os.path.join(
        download(source, [name]), name))
    return root, asked


def test_only_what_is_needed_is_downloaded(hub, tmp_path):
    root, asked = hub
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    (root / "chat_template.jinja").write_text("{{ messages }}")
    run = imported("owner/name", tmp_path)
    assert asked == ["chat_template.jinja", *files]
    assert tokenizer.load(run).template["chat_template"] == "{{ messages }}"
    whole = load_model(run)[0].state_dict()
    tok = tokenizer.open_tokenizer("hf:owner/name")
    assert asked == ["chat_template.jinja", "tokenizer.json"]
    assert (tok.name, tok.template["chat_template"]) == ("hf:owner/name", "{{ messages }}")
    pretrained.main(PretrainedConfig(source="owner/name", dry_run=True))
    assert asked == ["config.json"]
    torch.save(load_file(root / "model.safetensors"), root / "pytorch_model.bin")
    (root / "model.safetensors").unlink()  # .bin files are taken if there is nothing else
    again = load_model(imported("owner/name", tmp_path, overwrite=True))[0].state_dict()
    assert "pytorch_model.bin" in asked and all(torch.equal(again[k], w) for k, w in whole.items())


def test_what_the_hub_does_not_give_is_said(hub, tmp_path, monkeypatch):
    (hub[0] / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model.bin.* is damaged|holds more than tensors"):
        imported("owner/name", tmp_path)
    (hub[0] / "pytorch_model.bin").unlink()
    with pytest.raises(WeightsError, match="no weights in .*looked for model.safetensors, pytorch_model.bin"):
        imported("owner/name", tmp_path)
    with pytest.raises(UserError, match="(?s)^owner/other is not a local folder and could not be fetched "
                                        "from the .*hub .*Repository Not Found.*\nwithout a network, name"):
        imported("owner/other", tmp_path)

    def offline(*_, **__):
        raise OSError("[Errno 101] Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for dry_run in (False, True):
        with pytest.raises(UserError, match="(?s)could not be fetched.*Network is unreachable.*without a"):
            imported("owner/name", tmp_path, dry_run=dry_run)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------
# Files


def test_shards_and_bin_files_hold_the_same(folders, tmp_path):
    folder, theirs = folders("qwen2")
    whole = load_model(imported(folder, tmp_path))[0].state_dict()
    for name, options in (("shards", {"max_shard_size": "40KB"}), ("bf16", {}), ("bin", {}), ("base", {})):
        other = tmp_path / name
        if name == "bin":
            shutil.copytree(folder, other, ignore=lambda *_: ["model.safetensors"])
            torch.save(theirs.state_dict(), other / "pytorch_model.bin")  # with the tied head
        elif name == "base":  # the model without its head has no prefix
            shutil.copytree(folder, other)
            weights = load_file(f"{folder}/model.safetensors")
            save_file({k.removeprefix("model."): w for k, w in weights.items()}, other / "model.safetensors")
        else:
            saved = copy.deepcopy(theirs).bfloat16() if name == "bf16" else theirs
            saved.save_pretrained(other, **options)
        if name == "shards":
            assert len(open_weights(str(other)).open) == 0 and len(list(other.glob("*.safetensors"))) > 3
        loaded = pretrained.load(str(other)).state_dict()
        assert all(torch.equal(loaded[k].float(), w.bfloat16().float() if name == "bf16" else w)
                   for k, w in whole.items())
        assert loaded["embed.weight"].dtype == (torch.bfloat16 if name == "bf16" else torch.float32)


def test_damaged_folders_are_refused_with_one_clear_error(folders, tmp_path):
    folder, model = folders("llama")
    weights = load_file(f"{folder}/model.safetensors")

    def refused(message, name="model.safetensors", content=None, tensors=None):
        other = tmp_path / "damaged"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other)
        if content is None:
            write_safetensors(str(other / name), tensors)
        else:
            (other / name).write_bytes(content)
        with pytest.raises(UserError, match=f"(?s){message}"):
            pretrained.main(PretrainedConfig(source=str(other), out_dir=str(tmp_path / "refused")))
        assert not (tmp_path / "refused" / "damaged" / "best.pt").exists()
        return other

    data = open(f"{folder}/model.safetensors", "rb").read()
    refused("model.safetensors is damaged: it has .* bytes of .*, so the copy was cut", content=data[:-9])
    refused("model.safetensors is damaged: it has 5 bytes", content=data[:5])
    refused("model.safetensors is damaged: JSON", content=data[:8] + b"?" + data[9:])
    refused("config.json is damaged", name="config.json", content=b"{")
    norm, q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    refused(r"do not fit its config.json:\n  norm.weight: missing in the file$",
            tensors={k: w for k, w in weights.items() if k != norm})
    refused(r"layers.9.mlp.up_proj.weight: not in this model",
            tensors=weights | {"model.layers.9.mlp.up_proj.weight": weights[q]})
    refused(rf"{q}: \(3, 32\) in the file, \(32, 32\) by config.json",
            tensors=weights | {q: weights[q][:3]})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors") | {
        norm: "model-00002-of-00002.safetensors"}}
    refused("lacks model-00001-of-00002.safetensors, model-00002-of-", "model.safetensors.index.json",
            json.dumps(index).encode())
    other = tmp_path / "code"
    shutil.copytree(folder, other, ignore=lambda *_: ["model.safetensors"])
    with pytest.raises(WeightsError, match="no weights in .*looked for model.safetensors, pytorch_model.bin"):
        open_weights(str(other))
    torch.save({"a": UserError("code")}, other / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="holds more than tensors and was not loaded"):
        open_weights(str(other))
    with pytest.raises(UserError, match="no tokenizer.json in .*--tokenizer=hf:NAME_OR_PATH"):
        (tmp_path / "bare").mkdir()
        shutil.copy(f"{folder}/config.json", tmp_path / "bare")
        pretrained.main(PretrainedConfig(source=str(tmp_path / "bare"), out_dir=str(tmp_path / "refused")))
    run = imported(folder, tmp_path)
    with pytest.raises(UserError, match="already holds a run; replace its best.pt with --overwrite"):
        imported(folder, tmp_path)
    with pytest.raises(UserError, match="no config.json in .*add --export=FOLDER"):
        pretrained.main(PretrainedConfig(source=run, out_dir=str(tmp_path / "refused")))


@pytest.mark.parametrize("kind", ["bpe:400", "bytes", "words:200"])
def test_exported_tokenizers_give_the_same_ids(kind, tmp_path):
    texts = [f.read_text() for f in sorted(write_documents(tmp_path / "text", 8, 3000).iterdir())]
    tok = tokenizer.open_tokenizer(kind, iter(texts))
    (tmp_path / "tokenizer.json").write_text(json.dumps(pretrained.library_json(tok)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(pretrained.tokenizer_config(tok, 64)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    odd = "", " ", "  two  spaces\n\n\nand\tlines ", "na\u00efve \u4f60\u597d \U0001f600", "don't 1234"
    for text in (*texts, *odd):
        ids = tok.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert kind.startswith("words") or theirs.decode(ids) == text
    assert theirs.eos_token_id == tok.eot and len(theirs) == tok.vocab_size


@pytest.mark.parametrize("kind", ["bpe:400", "words:200"])
def test_an_exported_chat_tokenizer_has_the_same_template(kind, tmp_path):
    texts = [f.read_text() for f in sorted(write_documents(tmp_path / "text", 8, 3000).iterdir())]
    tok = tokenizer.with_chat_tokens(tokenizer.open_tokenizer(kind, iter(texts)))
    (tmp_path / "tokenizer.json").write_text(json.dumps(pretrained.library_json(tok)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(pretrained.tokenizer_config(tok, 64)))
    theirs, form = AutoTokenizer.from_pretrained(tmp_path), format_of(tok)
    turns = [("system", "the help"), ("user", "what is a class?"), ("assistant", "a type"), ("user", "and")]
    ids = theirs.apply_chat_template([{"role": r, "content": t} for r, t in turns],
                                     add_generation_prompt=True)["input_ids"]
    assert ids == form.join([(r, tok.encode(t)) for r, t in turns]) + form.opens["assistant"]
    assert len(theirs) == tok.vocab_size and theirs.eos_token_id == form.stop
    for origin, ends in (({}, [tok.eot]), ({"generation_config.json": {"eos_token_id": [7, 8]}}, [7, 8]),
                         ({"config.json": {"eos_token_id": 9}}, [9])):
        assert pretrained.generation_settings(tok, origin)["eos_token_id"] == [*ends, form.stop]


# ------------------------------------------------------------------------------------------------------------
# The lm-evaluation-harness


def rolling(folder: str, tokens: list[int], T: int) -> float:
    """Nats per target as loglikelihood_rolling defines it: T targets at a time, each time from the T tokens
    that end before the last of them. tokens[0] is the prefix."""
    model, nats = AutoModelForCausalLM.from_pretrained(folder), 0.0
    for start in range(1, len(tokens), T):
        targets = tokens[start:start + T]
        end = start + len(targets) - 1
        with torch.no_grad():
            logits = model(torch.tensor([tokens[max(0, end - T):end]])).logits[0, -len(targets):]  # (T, V)
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    return nats / (len(tokens) - 1)


def test_the_harness_has_our_windows_but_for_the_last(folders, text_folder, tmp_path):
    run = imported(folders("llama")[0], tmp_path)
    out, (model, _), meta = exported(run, tmp_path), load_model(run), data.read_meta(text_folder)
    split, tokens = meta["splits"]["val"], data.open_tokens(text_folder, "val", meta)
    doc, T, dist = whole(text_folder, "val", out)["test"][0], 64, Dist(0, 1, torch.device("cpu"))
    assert doc["targets"] == len(tokens) - 1 and doc["bytes"] == split["bytes"]
    rest = doc["targets"] % T
    ours, cut = (evaluate(model, t, split, T, 8, dist, "fp32")["loss"] for t in (tokens, tokens[:-rest]))
    assert rest and abs(rolling(out, tokens[:-rest].tolist(), T) - cut) < 1e-5
    assert 1e-5 < abs(rolling(out, tokens.tolist(), T) - ours) < rest / len(tokens)
    with pytest.raises(UserError, match="does not give back the tokens of"):
        Path(out, "tokenizer.json").write_text(json.dumps(pretrained.library_json(tokenizer.Bytes())))
        whole(text_folder, "val", out)


@pytest.mark.slow
def test_the_harness_itself_gives_these_log_likelihoods(folders, text_folder, tmp_path):
    assert importlib.util.find_spec("lm_eval"), 'not installed; run:  pip install "lm_eval[hf]"'
    out = exported(imported(folders("llama")[0], tmp_path), tmp_path)
    lines = Path("config/lm_eval/split.yaml").read_text().splitlines()
    command = shlex.split(next(line for line in lines if " -m lm_eval " in line).lstrip("# "))[1:]
    command[command.index("pretrained=demo_hf")] = f"pretrained={out}"
    subprocess.run([sys.executable, *command, f"--output_path={tmp_path}/got", "--metadata",
                    f"data={text_folder}"], check=True)
    got = json.loads(next((tmp_path / "got").rglob("*.json")).read_text())["results"]["nanomem_split"]
    tokens = data.open_tokens(text_folder, "val", data.read_meta(text_folder)).tolist()
    assert abs(math.log(got["perplexity,none"]) - rolling(out, tokens, 64)) < 1e-4


# ------------------------------------------------------------------------------------------------------------
# The scripts


def test_scripts_take_an_imported_model(folders, tmp_path):
    run, machine = imported(folders("qwen3")[0], tmp_path, max_seq_len=32), {"device": "cpu", "dtype": "fp32"}
    texts = sample.main(sample.SampleConfig(checkpoints=(run,), prompt=("The",), max_new_tokens=5, **machine))
    assert len(texts["The"][run][0]) > 0
    with pytest.raises(UserError, match="trained on no data folder here: name one with --data"):
        quantize.main(quantize.QuantizeConfig(checkpoint=run, **machine))
    source = write_documents(tmp_path / "source", 12, 3000)
    data = str(tmp_path / "text")
    prepare_data.main(prepare_data.PrepareConfig(source=str(source), name="text", data_dir=str(tmp_path),
                                                 tokenizer_from=run))
    row = quantize.main(quantize.QuantizeConfig(checkpoint=run, data=data, speed_tokens=0, **machine))
    assert abs(row["result"]["int8"]["loss"] / row["result"]["fp32"]["loss"] - 1) < 0.1
    flags = {k: v for k, v in checkpoint.load(run)["config"].items() if k not in ("data", "n_tokens")}
    row = train.main(train.TrainConfig(**flags | machine, init_from=run, data=data, out_dir=str(tmp_path),
                                       name="more", max_steps=3, batch_size=4, optimizer="muon"))
    assert row["result"]["loss"] < 7
    out = exported(str(tmp_path / "more"), tmp_path)  # trained here, on to transformers
    again = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, load_model(str(tmp_path / "more"))[0](ids())[0],
                                   atol=1e-4, rtol=1e-4)


def test_a_trained_model_keeps_what_the_original_said(folders, tmp_path):
    source, out = tmp_path / "theirs", str(tmp_path / "out")
    shutil.copytree(folders("qwen2")[0], source)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # of no use here
    was = {**json.loads((source / "config.json").read_text()), "eos_token_id": 278, "pad_token_id": 277,
           "_name_or_path": "theirs", "sliding_window": 40, "max_window_layers": 2, "initializer_range": 0.03}
    generation = {"bos_token_id": 279, "eos_token_id": [278, 279], "temperature": 0.7, "do_sample": True}
    (source / "config.json").write_text(json.dumps(was))
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 99, "bos_token": None}))
    (source / "chat_template.jinja").write_text(template)
    run = imported(str(source), tmp_path)
    text = str(write_documents(tmp_path / "source", 12, 1000))
    prepare_data.main(prepare_data.PrepareConfig(source=text, name="data", data_dir=str(tmp_path),
                                                 tokenizer_from=run))
    more = {"data": f"{tmp_path}/data", "out_dir": str(tmp_path), "device": "cpu", "dtype": "fp32",
            "batch_size": 4, "max_steps": 1, "max_seq_len": 32}

    def export(**options):
        train.main(train.TrainConfig(**more | options))
        pretrained.main(PretrainedConfig(source=f"{tmp_path}/{options['name']}", export=out, overwrite=True))
        return json.loads(Path(out, "config.json").read_text())

    export(name="once", init_from=run)
    now = export(name="twice", init_from=f"{tmp_path}/once", lora_rank=2)  # through a second run
    for key in was.keys() - {"dtype"}:
        assert now[key] == was[key], key
    loaded, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert {k: getattr(loaded.generation_config, k) for k in generation} == generation
    assert loaded.generation_config.suppress_tokens == list(range(280, 300))
    assert (loaded.config.eos_token_id, tok.model_max_length, tok.chat_template) == (278, 99, template)
    now = export(name="local", init_from=run, window=8, max_seq_len=80, rope_theta=300.0)
    assert (now["sliding_window"], now["use_sliding_window"], now["max_window_layers"]) == (8, True, 0)
    assert now["rope_parameters"]["rope_theta"] == 300 and now["max_position_embeddings"] == 80
    assert now["eos_token_id"] == 278 and model_config(now, out).window == 8


LOADED = """
import pretrained, sys, torch
from common.distributed import resident_memory
before = resident_memory()
model = pretrained.load(sys.argv[1], sys.argv[2])
total = sum(float(p.sum()) for p in model.parameters())  # what is mapped is read now
print((resident_memory("VmHWM") - before) * 1e9 / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_a_full_size_folder_loads_in_little_more_than_its_own_memory(dtype, tmp_path):
    cfg = model_config(QWEN, "qwen")
    with torch.device("meta"):
        model = LM(cfg)
    family, tensors = pretrained.FAMILIES["qwen2"], {}
    for name, p in model.named_parameters():
        place = pretrained.places(model, family)[name]
        tensors |= {family.prefix + n: torch.full(shape, 0.01, dtype=torch.bfloat16) for n, shape in zip(
            place.names, pretrained.their_shapes(p, place), strict=True)}
    write_safetensors(str(tmp_path / "model.safetensors"), dict(sorted(tensors.items())))
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    out = subprocess.run([sys.executable, "-c", LOADED, tmp_path, dtype], capture_output=True, text=True)
    assert out.returncode == 0 and float(out.stdout) < 1.2, (out.stdout, out.stderr)
