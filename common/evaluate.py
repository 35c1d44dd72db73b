"""A model's loss over a whole split, in units that compare between tokenizers. To add a metric, add a line to
`measures`: the log, the ledger and sweep.py's --metric then have it."""
import contextlib
import functools
import math
import sys

from common import data
from common.distributed import Dist, autocast

import torch
import torch.nn.functional as F
from tqdm import tqdm

LOGITS = 2**25  # logits held at once: 128 MB


def measures(nats: float, right: float | None, targets: float, split: dict) -> dict[str, float]:
    """Metrics from sums over a split: nats, correct top-1 predictions (None: not counted) and targets. Bits
    per byte and word perplexity divide by the bytes and words of the text, so they do not depend on the
    tokenizer."""
    return {"loss": nats / targets,  # nats per token
            "perplexity": math.exp(min(700, nats / targets)),
            "bits_per_byte": nats / math.log(2) / split["bytes"],
            "word_perplexity": math.exp(min(700, nats / split["words"])),
            **({} if right is None else {"top1": right / targets})}


def measures_text(result: dict) -> str:
    return (f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits/byte, "
            f"word perplexity {result['word_perplexity']:.1f}")


@torch.inference_mode()
def evaluate(model, tokens, split: dict, seq_len: int, batch_size: int, dist: Dist, dtype: str, *,
             stop=None, top1: bool = False, by_logits: bool = False, label: str = "loss") -> dict | None:
    """`measures` over all of `tokens` in windows of seq_len, and each expert's share of the tokens; None if
    `stop` was requested halfway. Sums are reduced over processes and divided last, so the result does not
    depend on batch_size or the number of processes.

    top1: also the share of tokens predicted as the most probable. by_logits: through the decoding head, not
    the fused loss (an INT8 model has only that)."""
    training = model.training
    model.eval()
    nats, right, count = 0.0, 0.0, 0
    batches = data.eval_batches(tokens, seq_len, batch_size, dist.rank, dist.world, dist.device)
    total = math.ceil(len(tokens) / seq_len / batch_size / dist.world)
    with expert_usage(model) as usage:
        for x, y in tqdm(batches, total=total, desc=f"evaluating {label}", leave=False, delay=5,
                         disable=not dist.is_main or not sys.stderr.isatty()):
            valid = int((y >= 0).sum())
            with autocast(dtype, dist.device):
                if top1 or by_logits:
                    sums = logit_sums(model, x, y)
                else:
                    sums = model(x, y)[0].item() * valid, 0
            nats, right, count = nats + sums[0], right + sums[1], count + valid
            if stop and stop.requested:
                break
    model.train(training)
    stopped = float(bool(stop and stop.requested))
    nats, right, count, stopped, *used = dist.sum(nats, right, count, stopped, *usage.flatten().tolist())
    if stopped:
        return None
    used = torch.tensor(used).view(usage.shape)  # (L, E)
    shares = {"expert_usage": (used / used.sum(dim=1, keepdim=True)).tolist()} if used.numel() else {}
    return {**shares, **measures(nats, right if top1 or by_logits else None, count, split)}


def logit_sums(model, x, y) -> tuple[float, float]:
    """Nats and correct top-1 predictions over the counted targets y (B, T) of x (B, T)."""
    hidden, y = model.hidden(x).flatten(0, 1), y.flatten()  # (N, C), (N,)
    nats, right = 0.0, 0
    rows = max(1, LOGITS // model.cfg.vocab_size)
    for part, targets in zip(hidden.split(rows), y.split(rows), strict=True):
        logits = model.head(part)  # (R, V)
        nats += F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum").item()
        right += int((logits.argmax(dim=-1) == targets).sum())
    return nats, right


@contextlib.contextmanager
def expert_usage(model):
    """Counts the tokens each layer sends to each expert while open, in the tensor (L, E) it yields."""
    routers = [m.router for m in model.modules() if hasattr(m, "router")]
    E, device = (routers[0].out_features, routers[0].weight.device) if routers else (0, "cpu")
    counts = torch.zeros(len(routers), E, dtype=torch.long, device=device)

    def count(layer, module, inputs, logits):
        counts[layer] += F.one_hot(logits.argmax(dim=-1), E).sum(dim=(0, 1))

    hooks = [r.register_forward_hook(functools.partial(count, i)) for i, r in enumerate(routers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
