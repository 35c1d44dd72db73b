"""muon.py against torch.optim.Muon, the singular value decomposition, torch's AdamW, and one process."""
import copy
import math
import re
from pathlib import Path

import muon
import train
from common.config import load
from model import LM
from muon import Muon, make_optimizer, orthogonalize, parameter_groups

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing


def config(**options):
    return train.TrainConfig(**{"vocab_size": 61, "max_seq_len": 24, "d_model": 32, "n_layers": 2,
                                "n_heads": 4, "d_ff": 48, "optimizer": "muon"} | options)


def learn(params, optimizer, steps=6, **per_step):
    """Steps on random gradients that are the same at each call."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        for group in optimizer.param_groups:
            group.update({k: f(step) for k, f in per_step.items()})
        optimizer.step()
    return [p.detach().clone() for p in params]


def matrices(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


# ------------------------------------------------------------------------------------------------------------
# Orthogonalisation


@pytest.mark.parametrize("shape", [(5, 32, 32), (3, 64, 24), (2, 24, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_1_and_vectors_stay(shape, dtype):
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    g = 1e-3 * (u * torch.linspace(1, 0.05, min(shape[1:]))) @ vt
    out = orthogonalize(g, dtype).float()
    values = torch.linalg.svdvals(out)
    assert 0.6 < values.min() and values.max() < 1.3
    inner = u.mT @ out @ vt.mT  # diagonal where the singular vectors are those of g
    off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
    s = torch.linalg.svdvals(g) / g.norm(dim=(1, 2))[:, None]
    for _ in range(5):  # the scalar polynomial on each singular value
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    close = {"atol": 1e-4, "rtol": 0} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0}
    torch.testing.assert_close(values, s.sort(descending=True).values, **close)


def test_a_batch_is_its_matrices_and_zero_stays_zero():
    g = torch.randn(4, 16, 40)
    g[2] = 0
    out = orthogonalize(g)
    assert not out[2].any()
    for i in range(4):
        torch.testing.assert_close(out[i], orthogonalize(g[i:i + 1])[0])


# ------------------------------------------------------------------------------------------------------------
# Optimiser


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_muon_of_torch(monkeypatch, dtype):
    """Which works in bf16 always; so in fp32 the two agree to what bf16 loses."""
    monkeypatch.setattr(muon, "fast_bf16", lambda device: dtype == torch.bfloat16)
    shapes = [(32, 32), (48, 16), (16, 48), (32, 32)]
    one, two = matrices(*shapes), matrices(*shapes)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    ours = learn(one, Muon([{"params": one, "kind": "muon"}], **settings),
                 momentum=lambda step: 0.85 + 0.01 * step)
    theirs = learn(two, torch.optim.Muon(two, **settings), momentum=lambda step: 0.85 + 0.01 * step)
    for a, b, start in zip(ours, theirs, matrices(*shapes), strict=True):
        error = (a - b).norm() / (b - start).norm()
        assert error < 0.02, error  # of the way they went; 0.5 without the momentum's warm-up, say


def test_every_part_of_the_update_counts(monkeypatch):
    """In fp32 against the definition, written out with an exact polynomial on the singular values."""
    monkeypatch.setattr(muon, "fast_bf16", lambda device: False)
    p, = matrices((48, 16))
    expected, m = p.detach().clone(), torch.zeros(48, 16)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        g = torch.randn(48, 16, generator=generator)
        m = 0.9 * m + 0.1 * g
        u, s, vt = torch.linalg.svd(0.1 * g + 0.9 * m, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        expected = expected * (1 - 0.02 * 0.3) - 0.02 * math.sqrt(48 / 16) * (u * s) @ vt
    got, = learn([p], Muon([{"params": [p], "kind": "muon"}], lr=0.02, weight_decay=0.3, momentum=0.9), 4)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_parts_of_a_matrix_are_matrices_of_their_own():
    whole, = matrices((40, 16))
    pieces = [torch.nn.Parameter(x.clone()) for x in whole.detach().split([16, 16, 8])]
    generator = torch.Generator().manual_seed(3)
    one = Muon([{"params": [whole], "kind": "muon", "parts": [[16, 16, 8]]}], lr=0.1)
    two = Muon([{"params": pieces, "kind": "muon"}], lr=0.1)
    for _ in range(3):
        whole.grad = torch.randn(40, 16, generator=generator)
        for p, g in zip(pieces, whole.grad.split([16, 16, 8]), strict=True):
            p.grad = g
        one.step(), two.step()
    assert torch.equal(whole, torch.cat(pieces))


def test_a_stack_is_its_matrices():
    stack, = matrices((3, 12, 16))
    apart = [torch.nn.Parameter(x.clone()) for m in stack.detach() for x in m.split([8, 4])]
    one = Muon([{"params": [stack], "kind": "muon", "parts": [[8, 4]]}], lr=0.1)
    two = Muon([{"params": apart, "kind": "muon"}], lr=0.1)
    for _ in range(2):
        stack.grad = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(3))
        for p, g in zip(apart, [x for m in stack.grad for x in m.split([8, 4])], strict=True):
            p.grad = g
        one.step(), two.step()
    torch.testing.assert_close(stack.detach(), torch.cat(apart).view(3, 12, 16).detach())


def test_its_adamw_is_that_of_torch():
    one, two = matrices((8, 8), (5,)), matrices((8, 8), (5,))
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.2}
    ours = learn(one, Muon([{"params": one, "kind": "adamw"}], **settings))
    theirs = learn(two, torch.optim.AdamW(two, fused=True, **settings))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_muon_cannot_take_is_refused():
    vector, = matrices((5,))
    with pytest.raises(ValueError, match=r"Muon is for matrices.*\(5,\)"):
        Muon([{"params": [vector], "kind": "muon"}])
    with pytest.raises(ValueError, match="kind is muon or adamw, got 'sgd'"):
        Muon([{"params": [vector], "kind": "sgd"}])


def test_its_state_is_saved_and_loaded():
    first, whole = matrices((16, 8), (6,)), matrices((16, 8), (6,))
    groups = lambda ps: [{"params": ps[:1], "kind": "muon"}, {"params": ps[1:], "kind": "adamw"}]  # noqa: E731
    learn(whole, Muon(groups(whole)), steps=3)
    optimizer = Muon(groups(first))
    learn(first, optimizer, steps=3)
    resumed = Muon(groups(first))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert str(resumed.state_dict()) == str(optimizer.state_dict())
    for p, q in zip(first, whole, strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------------------------------------
# Processes


def one_of_two(rank, world, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    params = matrices((24, 16), (24, 16), (24, 16), (16, 40), (7,))  # three of a shape do not split in two
    optimizer = Muon([{"params": params[:4], "kind": "muon"}, {"params": params[4:], "kind": "adamw"}])
    learn(params, optimizer)
    state = [s.get("momentum", s.get("exp_avg")) for s in optimizer.state.values()]
    results[rank] = [p.detach().tolist() for p in params], [s.tolist() for s in state]
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_each_holds_the_whole_state(monkeypatch):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        import socket
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        torch.multiprocessing.spawn(one_of_two, (2, port, results), nprocs=2)
        first, second = results[0], results[1]
    assert first == second
    params = matrices((24, 16), (24, 16), (24, 16), (16, 40), (7,))
    optimizer = Muon([{"params": params[:4], "kind": "muon"}, {"params": params[4:], "kind": "adamw"}])
    learn(params, optimizer)
    for got, p in zip(first[0], params, strict=True):
        torch.testing.assert_close(torch.tensor(got), p.detach(), atol=1e-4, rtol=0)
    for got, s in zip(first[1], optimizer.state.values(), strict=True):
        assert torch.equal(torch.tensor(got), s.get("momentum", s.get("exp_avg")))


# ------------------------------------------------------------------------------------------------------------
# Groups


def test_every_parameter_is_in_one_group_by_rule():
    cfg = config(tie_embeddings=False, embed_lr=5e-3, head_lr=2e-3, scalar_lr=3e-4, lr=1e-3, muon_lr=0.03)
    model = LM(cfg)
    groups = {g["name"]: g for g in parameter_groups(model, cfg)}
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {k: sorted(names[id(p)] for p in g["params"]) for k, g in groups.items()}
    assert inside["embeddings"] == ["embed.weight", "pos_embed.weight"] and inside["head"] == ["head.weight"]
    assert inside["matrices"] == sorted(f"trunk.{i}.{n}.weight" for i in (0, 1) for n in
                                        ("mixer.qkv", "mixer.proj", "ff.up", "ff.down"))
    assert sorted(sum(inside.values(), [])) == sorted(names.values())
    assert all(n.endswith("bias") or "norm" in n for n in inside["scalars"])
    got = {k: (g["kind"], g["peak_lr"], g["weight_decay"]) for k, g in groups.items()}
    assert got == {"matrices": ("muon", 0.03, 0.1), "head": ("adamw", 2e-3, 0.1),
                   "embeddings": ("adamw", 5e-3, 0.0), "scalars": ("adamw", 3e-4, 0.0)}
    plain = {g["name"]: (g["kind"], g["peak_lr"]) for g in parameter_groups(model, config(
        tie_embeddings=False, optimizer="adamw", lr=1e-3))}
    assert plain == dict.fromkeys(("matrices", "head", "embeddings", "scalars"), ("adamw", 1e-3))


def test_a_parameter_without_a_rule_stops():
    model = LM(config())
    model.cube = torch.nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(AssertionError, match=r"cube \(2, 2, 2\) has no Spec"):
        parameter_groups(model, config())


def test_queries_keys_values_and_gates_are_orthogonal_each():
    cfg = config(n_kv_heads=2, activation="swiglu", bias=False)
    group = next(g for g in parameter_groups(LM(cfg), cfg) if g["name"] == "matrices")
    assert group["parts"] == [[32, 16, 16], [32], [48, 48], [32]] * 2
    group = next(g for g in parameter_groups(LM(config()), config()) if g["name"] == "matrices")
    assert group["parts"] == [[32, 32, 32], [32], [48], [32]] * 2


def test_learning_rate_of_a_head_that_is_tied_is_refused():
    with pytest.raises(train.UserError, match="head_lr=0.001 is set, but the head is tied"):
        config(head_lr=1e-3)


def test_reused_parameters_have_their_groups_too():
    cfg = config(n_unique_blocks=1, adapter_rank=4, proj_rank=8, n_experts=2, embed_rank=8, qkv_share=1,
                 attn_scale=True, attn_sink=True, activation="swiglu", tie_embeddings=False)
    model = LM(cfg)
    groups = {g["name"]: g for g in parameter_groups(model, cfg)}
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {k: {names[id(p)] for p in g["params"]} for k, g in groups.items()}
    assert sorted(n for group in inside.values() for n in group) == sorted(names.values())
    assert inside["embeddings"] == {"embed.weight", "embed_up.weight", "pos_embed.weight"}
    assert inside["head"] == {"head.weight", "head_in.weight"}
    vectors = ("bias", "scale", "sink", "router.weight", "norm.weight")
    assert all(n.endswith(vectors) for n in inside["scalars"])
    rows = dict(zip((names[id(p)] for p in groups["matrices"]["params"]), groups["matrices"]["parts"],
                    strict=True))
    assert rows["trunk.0.mixer.qkv.b.weight"] == [32, 32, 32] and rows["trunk.0.mixer.qkv.a.weight"] == [8]
    assert rows["trunk.0.ff.pool.up.b.weight"] == [48, 48] and rows["trunk.1.adapter.a.weight"] == [4]
    optimizer = make_optimizer(model, cfg)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["tinier", "tinier_recycled", "tinier_compact"])
def test_the_kit_has_as_many_parameters_as_its_files_say(name):
    path = f"config/{name}.py"
    said = re.search(r"([\d,]+) parameters, ([\d,]+) without embeddings", Path(path).read_text()).groups()
    with torch.device("meta"):
        counts = LM(load(train.TrainConfig, [path, "--vocab_size=8192"])).count_parameters()
    assert (f"{counts['total']:,}", f"{counts['non_embedding']:,}") == said
    assert name != "tinier" or counts["total"] == 4_894_272  # the notes' own figure
