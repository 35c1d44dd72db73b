"""pretrained.py against transformers: the same numbers in, through the cache, and out again."""
import json
import os

import prepare_data
import pretrained
from common import tokenizer
from model import load_model
from pretrained import PretrainedConfig
from tests.conftest import write_documents

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

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
            config = AutoConfig.for_model(kind, **options, bos_token_id=279, eos_token_id=279, pad_token_id=None)
            model = AutoModelForCausalLM.from_config(config)
            for p in model.parameters():
                p.data += 0.2 * torch.randn_like(p)
            model.save_pretrained(root / name)
            (root / name / "tokenizer.json").write_text(json.dumps(tok))
            made[name] = str(root / name), model.eval()
        return made[name]

    return make


def imported(folder, tmp_path, **options) -> str:
    return pretrained.main(PretrainedConfig(source=folder, out_dir=str(tmp_path), name="run", **options))["folder"]


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
    extra = {"n_inner", "head_dim", "max_window_layers", "sliding_window", "layer_types", "transformers_version",
             "architectures", "_name_or_path", "rotary_pct", "rotary_emb_base", "rope_theta", "partial_rotary_factor"}
    assert {k: v for k, v in was.items() if k not in extra} == {k: now.get(k) for k in was if k not in extra}
