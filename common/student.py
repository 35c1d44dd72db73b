"""A student's weights from its teacher's: some of the teacher's layers, heads, neurons and channels.

    from_teacher(student, teacher, layers=(0, 3, 7), width="svd")

Layers are copied whole (DistilBERT, 1910.01108). What is narrower is chosen from the weights, without data:

- heads evenly spaced: key/value heads, and within the group of each its query heads
- of a head what RoPE turns by the frequencies nearest to the student's, in whole pairs; else, and of values,
  the largest product of norms (query and key, value and output)
- neurons of the feed-forward with the largest product of norms, in and out
- the residual stream, from what writes to it: with `slice` the channels with the largest sum of squares, with
  `svd` the main directions (SliceGPT, 2401.15024, with one basis for all layers)

A stream with fewer channels has another root mean square, so norm weights are multiplied by the ratio.

Shapes: C width, V vocabulary, H heads, G key/value heads, D head size, R what RoPE turns of it, F
feed-forward width; C_s, H_s, ... the student's, C_t, H_t, ... the teacher's
"""
import math
from typing import Literal, NamedTuple

from common.config import ConfigError

import torch

SAME = ("vocab_size", "mixer", "activation", "norm", "norm_eps", "bias", "attn_bias", "pos", "pos_offset",
        "rope_theta", "rope_fraction", "qk_norm", "qk_norm_weights", "attn_scale", "attn_sink",
        "parallel_residual")
OFF = ("short_conv", "n_unique_blocks", "adapter_rank", "proj_rank", "qkv_share", "n_experts", "embed_rank")


def problems_between(student, teacher, layers: tuple[int, ...], width: str) -> list[str]:
    """Why a model of the config `student` cannot start from one of the config `teacher`; [] if it can."""
    out = [f"mixer={cfg.mixer}: only attention can be taken from a teacher" for cfg in (student, teacher)
           if cfg.mixer != "attention"][:1]
    out += [f"{name}={getattr(cfg, name)} of the {who} is not supported here"
            for who, cfg in (("student", student), ("teacher", teacher)) for name in OFF
            if getattr(cfg, name)]
    out += [f"{name}={getattr(student, name)}, but the teacher has {name}={getattr(teacher, name)}"
            for name in SAME if getattr(student, name) != getattr(teacher, name)]
    if out:
        return out
    ours, theirs = sizes(student), sizes(teacher)
    out = [f"{name} is {ours[name]}, more than the teacher's {theirs[name]}" for name in ours
           if ours[name] > theirs[name]]
    if len(layers) != student.n_layers:
        out += [f"{len(layers)} teacher layers for a student with n_layers={student.n_layers}"]
    out += [f"teacher layer {i} does not exist: it has layers 0 to {teacher.n_layers - 1}" for i in layers
            if not 0 <= i < teacher.n_layers]
    if student.tie_embeddings and not teacher.tie_embeddings:
        out += ["tie_embeddings=True, but the teacher's embedding and head are two matrices"]
    if teacher.head_bias and not student.head_bias:
        out += ["head_bias=False, but the teacher's head has a bias"]
    if width == "svd" and teacher.norm == "layernorm" and teacher.bias and not student.head_bias:
        out += ["width=svd with norm=layernorm and bias=True needs head_bias=True: the last norm's bias goes "
                "into the head's"]
    return out


def sizes(cfg) -> dict[str, int]:
    """The sizes in which a student may be smaller."""
    groups = cfg.n_kv_heads or cfg.n_heads
    out = {"d_model": cfg.d_model, "d_ff": cfg.d_ff or 4 * cfg.d_model, "n_heads": cfg.n_heads,
           "n_kv_heads": groups, "query heads per key/value head": cfg.n_heads // groups,
           "head_size": cfg.head_size or cfg.d_model // cfg.n_heads}
    return out | ({"max_seq_len": cfg.max_seq_len} if cfg.pos == "learned" else {})


@torch.no_grad()
def from_teacher(student, teacher, layers: tuple[int, ...], width: Literal["slice", "svd"]) -> None:
    """Set the weights of `student` in place: its layer i from teacher layer layers[i]. ConfigError if that
    cannot be (problems_between). What has the teacher's size is copied exactly."""
    if problems := problems_between(student.cfg, teacher.cfg, layers, width):
        raise ConfigError(problems)
    stream = narrower_stream(student.cfg, teacher, layers, width)
    put(student.embed.weight, stream.narrow(whole(teacher.embed.weight)))
    if student.pos_embed is not None:
        rows = len(student.pos_embed.weight)
        put(student.pos_embed.weight, stream.narrow(whole(teacher.pos_embed.weight)[:rows]))
    for block, layer in zip(student.trunk, layers, strict=True):
        theirs = teacher.trunk[layer]
        copy_attention(stream, block, theirs, student.cfg, teacher.cfg)
        copy_feed_forward(stream, block, theirs)
    stream.read(student.final_norm, student.head, teacher.final_norm, teacher.head, slice(None),
                tied=student.head.weight is student.embed.weight)


# ------------------------------------------------------------------------------------------------------------
# The residual stream


class Stream(NamedTuple):
    """How the student's residual stream is made from the teacher's."""
    basis: torch.Tensor  # the channels that stay (C_s,), or the directions (C_s, C_t)
    gain: float  # the student's root mean square over the teacher's

    def narrow(self, w):
        """w (..., C_t) -> (..., C_s)"""
        if self.basis.dim() == 1:
            return w[..., self.basis]
        return (w.double() @ self.basis.t()).float()

    def write(self, ours, theirs, columns) -> None:
        """Set `ours`, a linear map to the stream, from these input columns of `theirs`."""
        put(ours.weight, self.narrow(whole(theirs.weight)[:, columns].t()).t())  # (C_s, n)
        if ours.bias is not None:
            put(ours.bias, self.narrow(whole(theirs.bias)))

    def read(self, norm, ours, their_norm, theirs, rows, tied: bool = False) -> None:
        """Set a norm and `ours`, the linear map after it, from these output rows of `theirs`.

        A norm's weights belong to the teacher's channels, so with other directions they go into the map, and
        the norm's bias into the map's. A tied head cannot take them: there the norm keeps the diagonal of
        what its weights are in the new directions."""
        w, b = whole(theirs.weight)[rows], None if theirs.bias is None else whole(theirs.bias)[rows]
        weight, bias = whole(their_norm.weight), whole(getattr(their_norm, "bias", None))
        if self.basis.dim() == 1:
            weight, bias = weight[self.basis], None if bias is None else bias[self.basis]
        else:
            if bias is not None:
                b, bias = w @ bias + (0 if b is None else b), torch.zeros(len(self.basis))
            if not tied:
                w = w * weight
            weight = (self.basis.square() @ weight.double()).float() if tied else torch.ones(len(self.basis))
        put(norm.weight, weight * self.gain)
        if bias is not None:
            put(norm.bias, bias)
        if not tied:
            put(ours.weight, self.narrow(w))
        if ours.bias is not None:
            put(ours.bias, torch.zeros(len(w)) if b is None else b)


def narrower_stream(cfg, teacher, layers, width: str) -> Stream:
    """The student's Stream for its config `cfg`; that of the teacher if d_model is the same."""
    n_s, n_t = cfg.d_model, teacher.cfg.d_model
    if n_s == n_t:
        return Stream(torch.arange(n_t), 1.0)
    gram = written(teacher, layers)  # (C_t, C_t)
    if width == "slice":
        basis = largest(gram.diagonal(), n_s)
        kept = gram.diagonal()[basis].sum() / gram.trace()
    elif width == "svd":
        z_s, z_t = (free_directions(n, cfg.norm) for n in (n_s, n_t))
        values, vectors = torch.linalg.eigh(z_t.t() @ gram @ z_t)  # ascending
        k = z_s.size(1)
        basis = z_s @ (z_t @ vectors[:, -k:]).t()  # (C_s, C_t)
        kept = values[-k:].sum() / values.sum()
    else:
        raise NotImplementedError(f"width={width}")
    return Stream(basis, math.sqrt(kept * n_t / n_s))


def written(teacher, layers):
    """(C_t, C_t) in float64: sum of w w^T over what the embeddings and the layers write to the stream. Each
    matrix has the weight 1, whatever its scale, since the scale of its input is unknown."""
    tables = [m.weight for m in (teacher.embed, teacher.pos_embed) if m is not None]  # (V, C_t)
    maps = [m for i in layers for m in (teacher.trunk[i].mixer.proj, teacher.trunk[i].ff.down)]
    total = 0
    for w in (*tables, *(m.weight.t() for m in maps)):
        w = whole(w)
        gram = (w.t() @ w).double()  # (C_t, C_t)
        total = total + gram / gram.trace().clamp(min=1e-30)
    return total


def free_directions(width: int, norm: str):
    """An orthonormal basis, (C, k), of what the norm lets through: all of it, or without the mean of the
    channels, which LayerNorm subtracts. So a student's LayerNorm finds a mean of 0 and is an RMSNorm."""
    if norm == "rmsnorm":
        return torch.eye(width, dtype=torch.float64)
    if norm == "layernorm":
        centre = torch.eye(width, dtype=torch.float64) - 1 / width
        return torch.linalg.eigh(centre)[1][:, 1:]  # (C, C - 1); the eigenvalue 0, of the mean, comes first
    raise NotImplementedError(f"norm={norm}")


# ------------------------------------------------------------------------------------------------------------
# A block's own widths


def copy_attention(stream: Stream, block, theirs, cfg, their_cfg) -> None:
    ours, mixer = block.mixer, theirs.mixer
    H, G, D, D_t = ours.n_heads, ours.n_kv_heads, ours.head_size, mixer.head_size
    per_group = mixer.n_heads // mixer.n_kv_heads
    groups = spaced(G, mixer.n_kv_heads)  # (G_s,)
    heads = (groups[:, None] * per_group + spaced(H // G, per_group)).flatten()  # (H_s,)
    maps = mixer.qkv.specs["weight"].maps
    q, k, v = (squares(w).view(-1, D_t) for w in whole(mixer.qkv.weight).split(maps))  # (H_t or G_t, D_t)
    out = squares(whole(mixer.proj.weight).t()).view(-1, D_t)[heads].view(G, -1, D_t).sum(1)  # (G_s, D_t)
    turned = (cfg.rope_size, their_cfg.rope_size) if cfg.pos == "rope" else (0, 0)
    dims = head_dims(q[heads].sum(0) * k[groups].sum(0), D, *turned)  # (D_s,)
    v_dims = largest(v[groups] * out, D)  # (G_s, D_s)
    rows = [(heads[:, None] * D_t + dims).flatten(), (groups[:, None] * D_t + dims).flatten(),
            (groups[:, None] * D_t + v_dims).flatten()]
    starts = (0, maps[0], maps[0] + maps[1])
    rows = torch.cat([r + start for r, start in zip(rows, starts, strict=True)])  # (H_s D_s + 2 G_s D_s,)
    columns = (heads[:, None] * D_t + v_dims.repeat_interleave(H // G, dim=0)).flatten()  # (H_s D_s,)
    stream.read(block.mixer_norm, ours.qkv, theirs.mixer_norm, mixer.qkv, rows)
    stream.write(ours.proj, mixer.proj, columns)
    for p in (ours.qkv.weight, ours.qkv.bias):  # scores are divided by sqrt(D_s) instead of sqrt(D_t)
        if p is not None:
            p[:H * D] *= math.sqrt(D / D_t)
    for own, other, index in ((ours.scale, mixer.scale, heads), (ours.sink, mixer.sink, heads),
                              *((getattr(ours, n), getattr(mixer, n), dims) for n in ("q_norm", "k_norm"))):
        if own is not None:
            put(getattr(own, "weight", own), whole(getattr(other, "weight", other))[index])


def head_dims(scores, count: int, turned: int, their_turned: int):
    """Which dimensions of a head (D_t,) the student's queries and keys take, (D_s,). Pair i of R has the
    frequency theta^(-2i/R), so the student's pair i is nearly pair i R_t / R_s of the teacher."""
    pairs = spaced(turned // 2, their_turned // 2)
    rest = their_turned + largest(scores[their_turned:], count - turned)
    return torch.cat((pairs, pairs + their_turned // 2, rest))


def copy_feed_forward(stream: Stream, block, theirs) -> None:
    up, down = theirs.ff.up, theirs.ff.down
    maps = up.specs["weight"].maps
    into = sum(squares(w) for w in whole(up.weight).split(maps))  # (F_t,), of gate and up together
    neurons = largest(into * squares(whole(down.weight).t()), block.ff.down.in_features)  # (F_s,)
    rows = torch.cat([neurons + i * maps[0] for i in range(len(maps))])
    stream.read(block.ff_norm, block.ff.up, theirs.ff_norm, up, rows)
    stream.write(block.ff.down, down, neurons)


def spaced(count: int, of: int):
    """`count` of the numbers 0 .. of - 1, evenly spaced from 0."""
    return torch.arange(count) * of // max(1, count)


def largest(scores, count: int):
    """The indices of the `count` largest scores along the last dimension, in order."""
    return scores.topk(count).indices.sort().values


def squares(w):
    """(n, m) -> (n,): the squared norm of each row."""
    return w.square().sum(dim=1)


def whole(p):
    """A parameter's values in fp32 on the CPU, where a matmul rounds to no less; None stays."""
    return None if p is None else p.detach().float().cpu()


def put(p, values) -> None:
    assert p.shape == values.shape, f"{tuple(values.shape)} for a parameter of {tuple(p.shape)}"
    p.copy_(values)
