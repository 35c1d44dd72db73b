"""common/student.py: students that must give their teacher's logits, and a trained teacher."""
import dataclasses

from common.config import ConfigError
from common.student import from_teacher, problems_between
from model import LM, ModelConfig

import pytest
import torch

BASE = {"vocab_size": 61, "max_seq_len": 24, "d_model": 32, "n_layers": 4, "n_heads": 4, "d_ff": 48}
MODERN = {"pos": "rope", "activation": "swiglu", "norm": "rmsnorm", "bias": False, "head_bias": False,
          "n_kv_heads": 2, "tie_embeddings": False}
VARIANTS = [{}, MODERN, MODERN | {"qk_norm": True, "qk_norm_weights": True, "attn_bias": "qkv"},
            {"attn_scale": True, "attn_sink": True, "norm": "rmsnorm", "window": 5},
            {"pos": "none", "activation": "relu2", "bias": False, "parallel_residual": True}]


def made(seed=0, **options) -> LM:
    """A model all of whose parameters matter."""
    torch.manual_seed(seed)
    model = LM(ModelConfig(**BASE | options)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def empty(**options) -> LM:
    """A student none of whose values may survive."""
    model = LM(ModelConfig(**BASE | options)).eval()
    for p in model.parameters():
        p.data.fill_(torch.nan)
    return model


def logits(model):
    x = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    return model(x)[0].detach()


# ------------------------------------------------------------------------------------------------------------
# The same sizes


@pytest.mark.parametrize("width", ["slice", "svd"])
@pytest.mark.parametrize("options", VARIANTS)
def test_all_layers_at_the_same_width_are_an_exact_copy(options, width):
    teacher, student = made(**options), empty(**options)
    from_teacher(student, teacher, (0, 1, 2, 3), width)
    assert torch.equal(logits(student), logits(teacher))


def test_the_chosen_layers_are_copied():
    teacher, student = made(**MODERN), empty(**MODERN | {"n_layers": 3})
    from_teacher(student, teacher, (3, 0, 3), "slice")
    theirs = teacher.state_dict()
    want = {k: v for k, v in theirs.items() if not k.startswith("trunk")}
    for ours, layer in enumerate((3, 0, 3)):
        start = f"trunk.{layer}."
        want |= {f"trunk.{ours}." + k[len(start):]: v for k, v in theirs.items() if k.startswith(start)}
    got = student.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_tied_teacher_and_an_untied_student():
    teacher, student = made(), empty(tie_embeddings=False)
    from_teacher(student, teacher, (0, 1, 2, 3), "slice")
    assert torch.equal(logits(student), logits(teacher)) and student.head.weight is not student.embed.weight


# ------------------------------------------------------------------------------------------------------------
# A wider teacher that computes what a narrow model computes: the student is to find that model


EXACT = {"norm_eps": 1e-12}  # else it adds to another mean square


def wider(small: LM, to, width: int, norm_weights: float = 0.0) -> LM:
    """`small` with its stream mapped by `to` (width, C), whose columns are orthonormal, into a teacher's. The
    teacher's norm weights are random by `norm_weights`, and the maps after them undo that."""
    teacher = LM(dataclasses.replace(small.cfg, d_model=width, head_size=8)).eval()
    shrunk = (width / small.cfg.d_model) ** -0.5  # as the root mean square over more channels is smaller

    def reader(norm, our_norm, linear, our_linear):
        linear.weight.data = our_linear.weight * our_norm.weight @ to.t() * shrunk
        norm.weight.data = 1 + norm_weights * torch.rand(width)
        linear.weight.data /= norm.weight
        if our_linear.bias is not None:
            shift = 0 if our_norm.bias is None else our_linear.weight @ our_norm.bias
            norm.bias.data = norm_weights * torch.randn(width)
            linear.bias.data = our_linear.bias + shift - linear.weight @ norm.bias

    def writer(linear, our_linear):
        linear.weight.data = to @ our_linear.weight
        if our_linear.bias is not None:
            linear.bias.data = to @ our_linear.bias

    with torch.no_grad():
        teacher.embed.weight.data = small.embed.weight @ to.t()
        if small.pos_embed is not None:
            teacher.pos_embed.weight.data = small.pos_embed.weight @ to.t()
        for block, own in zip(teacher.trunk, small.trunk, strict=True):
            reader(block.mixer_norm, own.mixer_norm, block.mixer.qkv, own.mixer.qkv)
            reader(block.ff_norm, own.ff_norm, block.ff.up, own.ff.up)
            writer(block.mixer.proj, own.mixer.proj)
            writer(block.ff.down, own.ff.down)
        reader(teacher.final_norm, small.final_norm, teacher.head, small.head)
    return teacher


def orthonormal(rows: int, columns: int):
    return torch.linalg.qr(torch.randn(rows, columns))[0]


def centred(n: int):
    """(n, n - 1): an orthonormal basis of the vectors with mean 0."""
    return torch.linalg.qr(torch.eye(n)[:, 1:] - 1 / n)[0]


@pytest.mark.parametrize("layernorm", [False, True])
def test_svd_finds_the_directions_that_a_teacher_uses(layernorm):
    options = EXACT | ({"tie_embeddings": False} if layernorm else MODERN)
    small = made(**options)
    if layernorm:  # the mean of the channels is lost in every norm, so it may be lost on the way
        to = centred(48) @ orthonormal(47, 31) @ centred(32).t()
    else:
        to = orthonormal(48, 32)
    teacher = wider(small, to, 48, norm_weights=0.5)
    torch.testing.assert_close(logits(teacher), logits(small), atol=1e-4, rtol=1e-4)
    student = empty(**options)
    from_teacher(student, teacher, (0, 1, 2, 3), "svd")
    torch.testing.assert_close(logits(student), logits(teacher), atol=1e-4, rtol=1e-4)
    from_teacher(student, teacher, (0, 1, 2, 3), "slice")
    assert (logits(student) - logits(teacher)).abs().max() > 0.1


def test_slice_finds_the_channels_that_a_teacher_uses():
    options = EXACT | MODERN
    small = made(**options)
    used = torch.randperm(48)[:32].sort().values
    teacher, student = wider(small, torch.eye(48)[:, used], 48, norm_weights=0.5), empty(**options)
    from_teacher(student, teacher, (0, 1, 2, 3), "slice")
    torch.testing.assert_close(logits(student), logits(teacher), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(student.embed.weight, small.embed.weight)


@pytest.mark.parametrize("options", [{}, {"rope_fraction": 0.5}, {"pos": "none"}])
def test_heads_their_dimensions_and_neurons_that_do_nothing_are_left_out(options):
    """Of 8 query and 4 key/value heads of size 16, and 96 neurons, what the student does not take is silent:
    heads by their output, half the dimensions by both sides of each product."""
    common = MODERN | options | {"attn_bias": "qkv"}
    teacher = made(**common | {"n_heads": 8, "n_kv_heads": 4, "head_size": 16, "d_ff": 96})
    kept_heads = torch.zeros(8, dtype=torch.bool)
    kept_heads[[0, 1, 4, 5]] = True  # both queries of key/value heads 0 and 2
    R = 0 if teacher.cfg.pos == "none" else teacher.cfg.rope_size
    qk = torch.zeros(16)
    if R:  # every other pair, whose frequencies are those of the student
        qk[torch.arange(0, R // 2, 2)] = qk[R // 2 + torch.arange(0, R // 2, 2)] = 1
    qk[R + torch.randperm(16 - R)[:8 - R // 2]] = 1
    v = torch.zeros(4, 16).scatter(1, torch.rand(4, 16).topk(8).indices, 1.0)
    neurons = torch.zeros(teacher.cfg.d_ff).index_fill(0, torch.randperm(teacher.cfg.d_ff)[:48], 1.0)
    for block in teacher.trunk:
        rows = torch.cat((qk.repeat(8), qk.repeat(4), v.flatten()))
        block.mixer.qkv.weight.data *= rows[:, None]
        block.mixer.qkv.bias.data *= rows
        block.mixer.proj.weight.data *= (v.repeat_interleave(2, 0) * kept_heads[:, None]).flatten()
        block.ff.up.weight.data *= neurons.repeat(2)[:, None]
        block.ff.down.weight.data *= neurons
    student = empty(**common | {"n_heads": 4, "n_kv_heads": 2, "head_size": 8})
    from_teacher(student, teacher, (0, 1, 2, 3), "slice")
    torch.testing.assert_close(logits(student), logits(teacher), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# A trained teacher, and what is refused


def loss(model, rows) -> float:
    with torch.no_grad():
        return model.eval()(rows[:, :-1], rows[:, 1:])[0].item()


@pytest.mark.parametrize("options", [{"norm": "rmsnorm", "pos": "rope"}, {}])  # both with tied embeddings
def test_a_narrow_student_of_a_trained_teacher_starts_below_chance(options):
    start = torch.randint(61, (16, 1), generator=torch.Generator().manual_seed(0))
    rows = (start + 7 * torch.arange(21)) % 61  # (B, T + 1)
    teacher = LM(ModelConfig(**BASE | options | {"n_layers": 2}))
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        teacher(rows[:, :-1], rows[:, 1:])[0].backward()
        optimizer.step()
    student = LM(ModelConfig(**BASE | options | {"n_layers": 2, "d_model": 24, "head_size": 8, "d_ff": 40}))
    chance = loss(student, rows)
    from_teacher(student, teacher, (0, 1), "svd")
    assert loss(teacher, rows) < loss(student, rows) < chance - 1


def test_what_cannot_be_is_refused_by_name():
    teacher = ModelConfig(**BASE)

    def said(layers=(0, 1), width="slice", **options):
        student = ModelConfig(**BASE | {"n_layers": 2} | options)
        return "; ".join(problems_between(student, teacher, layers, width))

    assert said() == said(d_model=16, d_ff=8, n_heads=2) == said(tie_embeddings=False) == ""
    assert "d_model is 64, more than the teacher's 32" in said(d_model=64)
    assert "head_size is 16" in said(n_heads=2) and "d_ff is 49" in said(d_ff=49)
    assert "query heads per key/value head is 2" in said(n_kv_heads=2)
    assert "max_seq_len is 25" in said(max_seq_len=25)
    assert "3 teacher layers for a student with n_layers=2" in said((0, 1, 2))
    assert "teacher layer 4 does not exist: it has layers 0 to 3" in said((0, 4)) and said((-1, 0))
    assert "norm=rmsnorm, but the teacher has norm=layernorm" in said(norm="rmsnorm")
    assert "activation=relu" in said(activation="relu") and "bias=False" in said(bias=False)
    assert "n_experts=2 of the student is not supported" in said(n_experts=2)
    assert said(n_unique_blocks=1) and said(proj_rank=2) and said(embed_rank=2) and said(short_conv=2)
    assert "mixer=lstm: only attention" in said(mixer="lstm", pos="none")
    assert "head_bias=False" in said(head_bias=False)
    untied = dataclasses.replace(teacher, tie_embeddings=False, head_bias=False)
    assert "two matrices" in problems_between(teacher, untied, (0, 1, 2, 3), "slice")[0]
    assert "needs head_bias" in problems_between(untied, untied, (0, 1, 2, 3), "svd")[0]
    with pytest.raises(ConfigError, match="does not exist"):
        from_teacher(empty(), made(), (0, 1, 2, 9), "slice")
