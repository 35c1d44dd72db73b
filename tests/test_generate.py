"""Generation for prompts of different lengths, and with a compiled step."""
from model import load_model
from tests.test_model import tiny, tokens

import pytest
import torch

VARIANTS = [{"pos": "learned"}, {"pos": "rope", "n_kv_heads": 2, "window": 6, "qk_norm": True},
            {"pos": "none", "window": 3, "global_every": 2}]
PROMPTS = [tokens(1, n, seed=n)[0] for n in (9, 2, 17, 2, 5)]


def joined(*args, **options):
    return torch.cat(list(args[0].generate(*args[1:], **options)), 1)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_row_of_a_batch_goes_on_as_it_would_alone(options, use_cache):
    model = tiny(**options, max_seq_len=48)
    alone = [joined(model, p[None], 20, temperature=0) for p in PROMPTS]
    together = joined(model, PROMPTS, 20, temperature=0, use_cache=use_cache)
    assert together.shape == (5, 20) and torch.equal(together, torch.cat(alone))
    penalised = {"temperature": 0, "repetition_penalty": 1.5}
    assert torch.equal(joined(model, PROMPTS, 9, **penalised),
                       torch.cat([joined(model, p[None], 9, **penalised) for p in PROMPTS]))


def test_rows_of_different_lengths_stop_on_their_own():
    model = tiny(max_seq_len=48)
    free = joined(model, PROMPTS, 20, temperature=0).tolist()
    stops = {free[2][6], free[0][3], int(PROMPTS[2][4])}  # one stands in a prompt, where it ends nothing
    stopped = joined(model, PROMPTS, 20, temperature=0, stop_tokens=stops).tolist()
    ends = [next((i for i, t in enumerate(row) if t in stops), 19) for row in free]
    assert len(stopped[0]) == max(ends) + 1 and min(ends) < max(ends)
    for row, full, end in zip(stopped, free, ends, strict=True):
        assert row == (full[:end + 1] + [full[end]] * 20)[:len(row)]


def test_a_list_of_equal_lengths_draws_like_a_tensor():
    model, prompts = tiny(), tokens(3, 5)
    a, b = (joined(model, p, 9, generator=torch.Generator().manual_seed(1)) for p in (prompts, list(prompts)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("prompts", [tokens(2, 0), [], [tokens(1, 3)[0], tokens(1, 0)[0]], tokens(1, 3)[0],
                                     [tokens(1, 3)]])
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="expected prompts"):
        list(tiny().generate(prompts, 3))
    with pytest.raises(ValueError, match="compile=True compiles the cached step"):
        list(tiny().generate(tokens(), 3, compile=True, use_cache=False))


def test_the_compiled_step_makes_the_same_tokens_and_is_compiled_once():
    model = tiny(pos="rope", n_kv_heads=2, window=6, global_every=2, n_layers=2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt, n in ((tokens(1, 3), 30), (tokens(1, 7), 20)):
            expected = joined(model, prompt, n, temperature=0)
            assert torch.equal(joined(model, prompt, n, temperature=0, compile=True), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_weights_are_loaded_in_16_bits(tmp_path):
    model = tiny(pos="rope", window=6, n_kv_heads=2)
    cfg = {"vocab_size": 61, "max_seq_len": 24, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48,
           "pos": "rope", "window": 6, "n_kv_heads": 2}
    torch.save({"model": model.state_dict(), "config": cfg, "tokenizer": {}}, tmp_path / "a.pt")
    half = load_model(str(tmp_path / "a.pt"), dtype="bf16")[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.head.weight is half.embed.weight
    x = tokens(1, 20)
    with torch.no_grad():
        error = (half(x)[0].float() - model(x)[0]).std() / model(x)[0].std()
    assert 0 < error < 0.05
    assert joined(half, x, 15).shape == (1, 15)
