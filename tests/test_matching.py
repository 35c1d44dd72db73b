"""common/matching.py against written-out loops, and what it records against the model's own arithmetic."""
import math

from common.matching import attention_gap, hidden_gap, layer_pairs, watching
from model import LM, ModelConfig, attention

import pytest
import torch
import torch.nn.functional as F

COUNTED = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)  # (B, T), B=2, T=7


def made(seed=0, **options) -> LM:
    torch.manual_seed(seed)
    model = LM(ModelConfig(**{"vocab_size": 61, "max_seq_len": 24, "d_model": 32, "n_layers": 3, "n_heads": 4,
                              "d_ff": 48} | options)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def ids(length=7):
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(1))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def test_layers_are_spaced_evenly_and_end_together():
    assert layer_pairs(4, 8) == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert layer_pairs(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert layer_pairs(2, 5) == [(0, 2), (1, 4)] and layer_pairs(1, 12) == [(0, 11)]
    assert layer_pairs(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


# ------------------------------------------------------------------------------------------------------------
# The two losses against loops


def hidden_loop(hs, ht):
    """Pair by pair, in float64."""
    total, pairs = 0, 0
    for b in range(2):
        for t in range(7):
            for u in range(7):
                if COUNTED[b, t] and COUNTED[b, u]:
                    ours, theirs = (F.cosine_similarity(h[b, t].double(), h[b, u].double(), dim=0)
                                    for h in (hs, ht))
                    total, pairs = total + (ours - theirs) ** 2, pairs + 1
    return total / pairs


def head_average(q, k, b, t, window):
    """The weights of query t on keys, one head and one key at a time."""
    H, G, D = q.size(1), k.size(1), q.size(3)
    first = max(0, t - window + 1) if window else 0
    mean = 0
    for head in range(H):
        e = [torch.exp(q[b, head, t].double() @ k[b, head // (H // G), u].double() / math.sqrt(D))
             for u in range(first, t + 1)]
        mean = mean + torch.stack(e) / sum(e) / H
    return mean


def attention_loop(qs, ks, qt, kt, window):
    total = 0
    for b in range(2):
        for t in range(7):
            if COUNTED[b, t]:
                p, q = head_average(qt, kt, b, t, window), head_average(qs, ks, b, t, window)
                total = total + (p * (p / q).log()).sum()
    return total / COUNTED.sum()


def same_value_and_gradients(ours, loop, given):
    results = []
    for f in (ours, loop):
        args = [a.clone().requires_grad_() for a in given]
        value = f(*args)
        results.append((value.float(), *torch.autograd.grad(value, args)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_hidden_states_equal_a_loop():
    ht = random(2, 7, 5, seed=1)
    same_value_and_gradients(lambda hs: hidden_gap(hs, ht, COUNTED), lambda hs: hidden_loop(hs, ht),
                             [random(2, 7, 3)])


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (2, 1)])
def test_attention_equals_a_loop(heads, groups, window):
    qt, kt = 2 * random(2, 6, 7, 8, seed=2), random(2, 3, 7, 8, seed=3)  # a teacher of other sizes
    same_value_and_gradients(lambda q, k: attention_gap(q, k, qt, kt, COUNTED, window),
                             lambda q, k: attention_loop(q, k, qt, kt, window),
                             [random(2, heads, 7, 4), random(2, groups, 7, 4, seed=1)])


def test_equal_models_have_no_gap_and_padding_never_counts():
    h, q, k = random(2, 7, 5), random(2, 4, 7, 8), random(2, 2, 7, 8, seed=1)
    assert hidden_gap(h, h, COUNTED) == 0 and attention_gap(q, k, q, k, COUNTED) == 0
    assert hidden_gap(h, 3 * h, COUNTED) < 1e-12  # lengths do not matter
    none = torch.zeros_like(COUNTED)
    assert hidden_gap(h, -h * h, none) == 0 and attention_gap(q, k, -q, k, none) == 0
    ends = torch.arange(7) < torch.tensor([[7], [4]])  # the second row ends in padding
    others = [random(*x.shape, seed=7).requires_grad_() for x in (h, q, k)]
    noisy = [x.detach().clone() for x in others]
    noisy[0][1, 4:], noisy[1][1, :, 4:], noisy[2][1, :, 4:] = 1e3, -1e3, 1e3
    for gap, ours, filled, theirs in ((hidden_gap, others[:1], noisy[:1], (h,)),
                                      (attention_gap, others[1:], noisy[1:], (q, k))):
        value = gap(*ours, *theirs, ends)
        assert value == gap(*filled, *theirs, ends) > 0.01
        for x, grad in zip(ours, torch.autograd.grad(value, ours), strict=True):
            padding = grad[1, 4:] if x.dim() == 3 else grad[1, :, 4:]
            assert (padding == 0).all() and grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------
# What is recorded


def test_block_outputs_are_those_on_the_way_to_the_logits():
    model, x = made(), ids()
    with watching(model, (0, 2)) as seen:
        logits, _ = model(x)
    assert list(seen.hidden) == [0, 2] and not seen.queries
    assert torch.equal(model.head(model.final_norm(seen.hidden[2])), logits)
    first = made(n_layers=1)
    first.load_state_dict({k: v for k, v in model.state_dict().items() if k in first.state_dict()})
    with watching(first, [0]) as alone:
        first(x)
    assert torch.equal(alone.hidden[0], seen.hidden[0])
    before = seen.hidden[2]
    model(ids(5))
    assert seen.hidden[2] is before and not any(b._forward_hooks for b in model.trunk)


@pytest.mark.parametrize("options", [{}, {"pos": "rope", "n_kv_heads": 2, "qk_norm": True, "window": 3,
                                          "global_every": 3, "attn_scale": True}])
@pytest.mark.parametrize("flash", [True, False])
def test_queries_and_keys_give_the_attention_of_the_model(options, flash):
    """With them the block's mixer can be computed from its values alone."""
    model, x = made(**options, flash=flash), ids()
    inputs = {}
    hook = model.trunk[1].mixer.register_forward_hook(lambda m, args, y: inputs.update(x=args[0], y=y))
    with watching(model, range(3), attention=True) as seen:
        model(x)
    hook.remove()
    assert all(block.mixer.watch is None for block in model.trunk)
    q, k, mixer = seen.queries[1], seen.keys[1], model.trunk[1].mixer
    assert q.shape == (2, 4, 7, 8) and k.shape == (2, mixer.n_kv_heads, 7, 8)
    assert seen.windows == {0: 3, 1: 3, 2: 0} if options else seen.windows == {0: 0, 1: 0, 2: 0}
    v = mixer.qkv(inputs["x"])[..., -mixer.sizes[2]:].view(2, 7, -1, 8).transpose(1, 2)  # (B, G, T, D)
    y = attention(q, k, v, seen.windows[1], None, 0.0, None).transpose(1, 2).reshape(2, 7, -1)
    torch.testing.assert_close(mixer.proj(y), inputs["y"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_step_reach_the_student_alone(checkpointed):
    student, teacher, x = made(), made(1, d_model=48, n_heads=6, n_kv_heads=2, n_layers=5), ids()
    student.trunk.checkpoint_activations = checkpointed
    pairs = layer_pairs(3, 5)
    with watching(teacher, [j for _, j in pairs], attention=True) as theirs, torch.no_grad():
        teacher(x)
    with watching(student, [i for i, _ in pairs], attention=True) as ours:
        student(x)
    loss = sum(hidden_gap(ours.hidden[i], theirs.hidden[j], COUNTED)
               + attention_gap(ours.queries[i], ours.keys[i], theirs.queries[j], theirs.keys[j], COUNTED)
               for i, j in pairs)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    grads = {name: p.grad.abs().sum() for name, p in student.named_parameters() if p.grad is not None}
    assert grads["embed.weight"] > 0 and grads["trunk.2.mixer.qkv.weight"] > 0
    expected = made()
    with watching(expected, range(3), attention=True) as seen:
        expected(x)
    other = sum(hidden_gap(seen.hidden[i], theirs.hidden[j], COUNTED)
                + attention_gap(seen.queries[i], seen.keys[i], theirs.queries[j], theirs.keys[j], COUNTED)
                for i, j in pairs)
    other.backward()
    for p, q in zip(student.parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad))


def test_models_without_blocks_or_attention_are_refused():
    gated = made(mixer="context", pos="none", activation="relu", tie_embeddings=False)
    with pytest.raises(ValueError, match="no blocks"), watching(gated, [0]):
        pass
    lstm = made(mixer="lstm", pos="none")
    with watching(lstm, [1]) as seen:
        lstm(ids())
    assert seen.hidden[1].shape == (2, 7, 32)
    with pytest.raises(ValueError, match="no attention"), watching(lstm, [0], attention=True):
        pass
