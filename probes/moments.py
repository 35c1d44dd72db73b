"""Optimiser state as context: kept per loop, zeroed, averaged over loops.

    kept[loop] = read(optimizer)                        # a deep copy: what is done to one leaves the others
    write(optimizer, mix(read(optimizer), kept.get(new), first="loop", second="zero"))
    write(optimizer, average([kept[k] for k in kept], betas_of(optimizer)))

A state is {"first" | "second" | "count": {index of a parameter: tensor}}. `first` is Adam's first moment, or
the momentum of SGD and Muon; `second` and `count` are Adam's second moment and its number of steps, by which
it corrects both moments' bias. So a second moment starts from zero only where the first does too.
"""
import torch

KEYS = {"first": ("exp_avg", "momentum_buffer", "momentum"), "second": ("exp_avg_sq",), "count": ("step",)}
EMPTY = {"first": {}, "second": {}, "count": {}}  # zero
SOURCES = ("global", "loop", "zero")  # carried on from the loop before | what this loop left | zero


def parameters(optimizer) -> list:
    return [p for group in optimizer.param_groups for p in group["params"]]


def read(optimizer) -> dict:
    """A deep copy of the state."""
    out = {part: {} for part in KEYS}
    for i, p in enumerate(parameters(optimizer)):
        for part, names in KEYS.items():
            for name in names:
                value = optimizer.state.get(p, {}).get(name)
                if value is not None:  # SGD without momentum keeps None
                    out[part][i] = value.detach().clone()
    return out


@torch.no_grad()
def write(optimizer, state: dict) -> None:
    """Copy a state into the optimiser; what it lacks begins anew."""
    for i, p in enumerate(parameters(optimizer)):
        own = optimizer.state.get(p, {})
        for part, names in KEYS.items():
            for name in names:
                if own.get(name) is None:
                    continue
                if i in state[part]:
                    own[name].copy_(state[part][i])
                else:
                    own[name].zero_()


def mix(now: dict, left: dict | None, first: str, second: str) -> dict:
    """The state with which a loop begins. now: carried on from the loop before; left: what this loop left
    when it last ended, None at its first time, when "loop" means the state that is carried on."""
    sources = {"global": now, "loop": left or now, "zero": EMPTY}
    return {"first": sources[first]["first"], "second": sources[second]["second"],
            "count": sources[second]["count"]}


def average(states: list[dict], betas: list[tuple[float, float]]) -> dict:
    """Of several loops, each moment corrected for its bias, averaged, and biased again for the smallest
    count (MEMORY 5.3). `betas`: (beta1, beta2) of each parameter. Of one loop: the state itself."""
    out = {part: {} for part in KEYS}
    for i in states[0]["first"]:
        counts = [s["count"].get(i) for s in states]
        for part, beta in zip(("first", "second"), betas[i], strict=True):
            if i not in states[0][part]:
                continue
            if counts[0] is None:  # momentum without bias correction
                weights = [1.0] * len(states)
            else:
                least = float(min(counts))
                weights = [(1 - beta**least) / (1 - beta**float(n)) if n != least else 1.0 for n in counts]
            out[part][i] = sum(w * s[part][i] for w, s in zip(weights, states, strict=True)) / len(states)
        if counts[0] is not None:
            out["count"][i] = min(counts).clone()
    return out


def betas_of(optimizer) -> list[tuple[float, float]]:
    return [group.get("betas", (0.0, 0.0)) for group in optimizer.param_groups for _ in group["params"]]


def scrambled(state: dict, seed: int) -> dict:
    """The same values at other places of each tensor: moments that fit no weight."""
    generator, out = torch.Generator().manual_seed(seed), {"count": state["count"]}
    for part in ("first", "second"):
        out[part] = {i: v.flatten()[torch.randperm(v.numel(), generator=generator).to(v.device)].view_as(v)
                     for i, v in state[part].items()}
    return out


def size(state: dict) -> int:
    """Bytes."""
    return sum(v.numel() * v.element_size() for part in state.values() for v in part.values())
