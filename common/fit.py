"""Will it fit? Predicts the peak memory of a training step before anything is allocated; reads what is free.

Nothing here knows the architecture. What autograd keeps is counted on fake tensors, which have shapes but no
memory, so the prediction follows every change to model.py; what its hooks cannot see, layers declare."""
import contextlib
import math
import os
import signal
from dataclasses import replace

from common import distributed, head_loss
from common.config import UserError

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

LAYER_OBJECTS = 1e5  # rough bytes of Python objects per layer of any kind


@contextlib.contextmanager
def fake_tensors():
    """Tensors made inside have shapes but no memory. Ctrl-C waits: inside, it would abort the process."""
    held, handler = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        with FakeTensorMode():
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def kept_by_autograd(model, sequences: int, seq_len: int, dtype: str) -> int:
    """Bytes that a forward pass keeps for backward, without the parameters and the head-sized tensors of the
    loss. Counted for a CPU; a GPU's attention kernels keep no weights, so it needs slightly less. `model` is
    made of fake tensors, and FakeTensorMode is on."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def count(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not reused
        return x

    tokens = torch.zeros(sequences, seq_len, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)
    with hooks, distributed.autocast(dtype, torch.device("cpu")):
        hidden = model.hidden(tokens)
    return sum(s.nbytes() for s in kept.values()) + 2 * 4 * hidden.numel()  # and its gradient, in float32


def kept_of(model, seq_len: int, dtype: str) -> tuple[float, float]:
    """Bytes that autograd keeps per sequence, and besides. Counted where there are many: small tensors are
    kept although they could be recomputed (layers.keeping_input)."""
    some, more = (kept_by_autograd(model, n, seq_len, dtype) for n in (256, 512))
    return (more - some) / 256, 2 * some - more


class Needs:
    """The peak memory in bytes of a training step of make_model(cfg), for any number of sequences at once.
    `model` is the model without memory, for counting.

    Within 15 % of measurements on a CPU for shapes like the ladder's (tests/test_fit.py). torch.compile
    usually needs less."""

    def __init__(self, make_model, cfg, dtype: str, device):
        self.cfg = cfg
        length = min(cfg.tbptt or cfg.max_seq_len, cfg.max_seq_len)  # tokens per backward pass
        with fake_tensors():
            self.model = make_model(cfg)
            kept, fixed = kept_of(self.model, length, dtype)
        unseen = {type(m): m.unseen_memory for m in self.model.modules() if hasattr(m, "unseen_memory")}
        kept *= math.prod(unseen.values())
        layer = self.layer = kept / self.model.trunk.depth  # of a sequence
        self.fixed, self.per_sequence = fixed, kept + layer  # and one block's gradients
        # each block's input, plus one block recomputed with its gradients; on a CPU also what the heap loses
        # in between (repeats of one run with d 256, T 1,024 measured 1.10 to 1.33 GB)
        if cfg.checkpoint_activations:
            self.fixed = 1.2e8 if device.type == "cpu" else 0.0
            self.per_sequence = cfg.n_layers * cfg.max_seq_len * cfg.d_model * 4 + 3.5 * layer
        self.parameters = sum(p.numel() * 4 for p in self.model.parameters())
        self.gradients = sum(p.numel() * 4 for p in self.model.parameters() if p.requires_grad)
        self.states = self.gradients * states_of(cfg)
        self.head = self.model.head.weight.numel() * 4
        self.head_trains = self.model.head.weight.requires_grad
        row = cfg.vocab_size * (4 if dtype == "fp32" else 2)
        self.logits = length * row  # of a sequence
        self.chunk = head_loss.CHUNK_BYTES  # of logits at once
        if device.type == "cpu":
            self.chunk = min(self.chunk, head_loss.CHUNK_ROWS * row)
        self.beside = []  # models read beside the one that is trained
        self.base, self.slack = 0.0, 1.0
        if device.type == "cpu":  # the whole process; measured: libraries, heap fragmentation
            self.base, self.slack = distributed.resident_memory() * 1e9 + 6e7, 1.12

    def peak(self, sequences: int, world: int) -> float:
        """With accumulation, tbptt or several processes, gradients already exist during a forward pass."""
        gradients_stay = world > 1 or sequences * world < self.cfg.batch_size or self.cfg.tbptt
        loss = min(sequences * self.logits, self.chunk) + (1 + self.head_trains) * self.head
        forward = self.fixed + sequences * self.per_sequence + loss + bool(gradients_stay) * self.gradients
        # gradients, and a tied embedding's own, which is then added to the head's
        backward = self.gradients + self.head_trains * self.head
        beside = sum(r.weights + sequences * r.per_sequence for r in self.beside)
        return self.base + self.slack * (self.parameters + self.states + beside + max(forward, backward))

    def evaluated_at_once(self, sequences: int) -> int:
        """How many sequences fit without gradients where training on `sequences` fits: only one block's
        activations are alive at a time."""
        return max(sequences, int(sequences * self.per_sequence / self.layer))


class Reading:
    """The memory in bytes of a forward pass of make_model(cfg) without gradients: its weights, held in the
    dtype of the matmuls, and one block's activations and the output for each sequence."""

    def __init__(self, make_model, cfg, seq_len: int, dtype: str):
        size = 4 if dtype == "fp32" else 2
        with fake_tensors():
            self.model = make_model(cfg)
            kept, _ = kept_of(self.model, seq_len, dtype)
        self.weights = size * sum(p.numel() for p in self.model.parameters())
        output = size * seq_len * self.model.head.in_features
        self.per_sequence = kept / self.model.trunk.depth + output


def states_of(cfg) -> int:
    """Numbers the optimiser keeps per parameter (slightly fewer with Muon)."""
    return 1 if cfg.optimizer == "sgd" else 2


def refuse_hopeless(make_model, cfg, room: float, batch_size: int, states: int = 2,
                    dry_run: bool = False) -> None:
    """UserError for a model far too large for `room` bytes, judged from one or two of its layers: building
    1e9 layers would itself fill the memory. A dry run may describe a model that is too large, if it can be
    built without its tensors."""
    unit, unique = cfg.qkv_share or 1, cfg.n_unique_blocks or cfg.n_layers
    few = [replace(cfg, n_layers=n, n_unique_blocks=0) for n in (unit, 2 * unit)]
    try:
        with fake_tensors():  # what is trained has a gradient and the optimiser's states
            a, b = (sum(p.numel() * (2 + states if p.requires_grad else 1)
                        for p in make_model(c).parameters()) for c in few)
    except RuntimeError:  # a size beyond 2^63
        a = b = 1e30
    weights = 4 * (a + (unique / unit - 1) * (b - a))
    activations = 4.0 * cfg.max_seq_len * cfg.d_model * cfg.n_layers
    objects, ids = LAYER_OBJECTS * cfg.n_layers, 16.0 * batch_size * cfg.max_seq_len
    needed = objects + activations + ids + (0 if dry_run and weights < 1e15 else weights)
    if needed > room:
        sizes = ", ".join(f"{k}={getattr(cfg, k):,}" for k in (
            "n_layers", "d_model", "max_seq_len", "vocab_size"))
        raise UserError(f"this needs at least {needed / 1e9:,.0f} GB, but there is room for "
                        f"{room / 1e9:.1f} GB; use smaller sizes: {sizes}, batch_size={batch_size:,}")


def largest_micro_batch(needs: Needs, dist, room: float) -> int:
    """The largest divisor of a process's share of the batch that fits into `room` bytes on every process. A
    collective; UserError on all processes if not even one sequence fits."""
    cfg, share = needs.cfg, max(1, needs.cfg.batch_size // dist.world)
    most = min(share, int(max(1.0, room / needs.per_sequence)))
    fits = next((n for n in range(most, 0, -1) if share % n == 0 and needs.peak(n, dist.world) <= room), 0)
    fits, least = int(dist.min(fits)), dist.min(room)
    if not fits and not cfg.dry_run:
        raise UserError(f"one sequence at a time needs about {needs.peak(1, dist.world) / 1e9:.1f} GB, but "
                        f"there is room for {least / 1e9:.1f} GB on {dist.device.type}; use "
                        "--checkpoint_activations, a smaller --max_seq_len or model, or --micro_batch_size=1 "
                        "to try it nevertheless")
    return max(1, fits)


def room_for(memory_gb: float, dist) -> float:
    """Bytes this process may use in total: as asked, or what it holds plus most of what is free."""
    if memory_gb:
        return 1e9 * memory_gb
    if dist.device.type != "cpu":
        return 0.9 * free_memory(dist.device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world))  # processes that share this machine's memory
    return distributed.resident_memory() * 1e9 + 6e7 + 0.9 * free_memory(dist.device) / here


def free_memory(device) -> float:
    """Bytes this process may still take; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        with open("/proc/meminfo") as f:
            free = 1024 * int(next(line for line in f if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        free = math.inf
    return min(free, cgroup_free())


def cgroup_free(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """Bytes that the limits of a container (docker run -m 4g) or job still allow; infinity without limits.
    Cached files do not count as used: the system evicts them."""
    files = {"": ("memory.max", "memory.current", "inactive_file"),
             "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # v2, v1
    free = math.inf
    for line in read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in files:
            continue
        top, folders = os.path.join(root, kind), path.strip("/").split("/")
        for depth in range(len(folders) + 1):  # parents' limits count; a container may show only the top
            folder = os.path.join(top, *folders[:depth])
            names = (*files[kind][:2], "memory.stat")
            limit, used, cached = (read(os.path.join(folder, name)) for name in names)
            if limit.strip().isdecimal() and used:
                held = dict(row.split() for row in cached.splitlines()).get(files[kind][2], 0)
                free = min(free, max(0, int(limit) - int(used) + int(held)))
    return free


def read(path: str) -> str:
    try:
        with open(path) as f:
            return f.read()
    except OSError:
        return ""
