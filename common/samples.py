"""What a model says to a prompt: a continuation, or a table of its most probable next tokens."""
from common.console import say
from common.files import write_text

import torch


def continue_prompts(model, tok, cfg, device) -> dict[str, str]:
    """{prompt: its continuation}, with the same seed at every evaluation, so that texts compare."""
    model.eval()
    texts = {}
    for prompt in cfg.prompts:
        ids = torch.tensor([[tok.eot, *tok.encode(prompt)]], device=device)  # (1, T)
        room = cfg.max_seq_len - ids.size(1) if cfg.pos == "learned" else cfg.sample_tokens
        new = model.generate(ids, min(cfg.sample_tokens, room), temperature=0.8, top_k=50,
                             stop_tokens=[tok.eot], generator=torch.Generator(device).manual_seed(cfg.seed))
        texts[prompt] = tok.decode([i for i in (int(t) for t in new) if i != tok.eot])
    model.train()
    return texts


def write_samples(rows: list[dict], path: str) -> None:
    """All samples among the rows of metrics.jsonl; rewritten each time, so that a resumed run has all."""
    write_text(path, "\n".join(
        f"=== step {r['step']:,}, validation loss {r['val_loss']:.4f}\n"
        + "".join(f"{prompt}|{continuation}\n" for prompt, continuation in r["samples"].items())
        for r in rows if r.get("samples")))


@torch.no_grad()
def next_tokens(model, tok, ids, k: int) -> list[tuple[str, float]]:
    """The k most probable tokens after the tokens `ids` (1, T), with their probabilities."""
    if model.pos_embed is not None and ids.size(1) > model.cfg.max_seq_len:
        say(f"the prompt has {ids.size(1):,} tokens, but the model only {model.cfg.max_seq_len:,} positions: "
            "only the end of the prompt is read")
        ids = ids[:, -model.cfg.max_seq_len:]
    logits = model.step(ids, None)[0, :model.n_tokens]  # (V,)
    top = logits.softmax(dim=-1).topk(min(k, model.n_tokens))
    return [(tok.decode([int(i)]), float(p)) for p, i in zip(top.values, top.indices, strict=True)]


def next_token_table(columns: dict[str, list[tuple[str, float]]]) -> str:
    """The results of next_tokens side by side, by the names of the models."""
    width = max(24, *(len(name) + 2 for name in columns))
    lines = ["    " + "".join(f"{name:<{width}}" for name in columns)]
    for rank, row in enumerate(zip(*columns.values(), strict=False), 1):
        lines.append(f"{rank:>2}  " + "".join(f"{p:7.2%}  {token!r:<{width - 9}}" for token, p in row))
    return "\n".join(lines)
