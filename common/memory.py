"""What a training step will need, predicted before anything is allocated.

Nothing here knows the architecture: what autograd keeps is counted on fake tensors, which have shapes but no
memory, so the figure follows every change to model.py."""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common import distributed, head_loss


def kept_by_autograd(make_model, sequences: int, seq_len: int, dtype: str) -> int:
    """Bytes that a forward pass leaves for backward, without the parameters and what the loss keeps of the
    size of the head. Counted as on a CPU: a GPU's attention kernels keep no weights, so there it is a little
    more than needed."""
    with FakeTensorMode():
        model = make_model()
        own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

        def count(x):
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that no later one gets its address
            return x

        tokens = torch.zeros(sequences, seq_len, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)
        with hooks, distributed.autocast(dtype, torch.device("cpu")):
            hidden = model.hidden(tokens)
        return sum(s.nbytes() for s in kept.values()) + 2 * 4 * hidden.numel()  # and its gradient, in float32


class Needs:
    """The peak memory of a training step of make_model(), in bytes, for any number of sequences at once.

    Within 15 % of what was measured on the CPU for the ladder's shapes and their neighbours
    (tests/test_memory.py). torch.compile usually needs less."""

    def __init__(self, make_model, cfg, dtype: str, device):
        length = min(cfg.tbptt or cfg.max_seq_len, cfg.max_seq_len)  # of what one backward goes through
        one, two = (kept_by_autograd(make_model, n, length, dtype) for n in (1, 2))
        # what an LSTM's kernel keeps, and the gradients of a convolution's shifted copies, are not seen;
        # measured in fp32 and bf16: 1.36 and 1.6 times as much, 1.18 and 1.39
        two = one + (two - one) * (1.5 if cfg.mixer == "lstm" else 1) * (1.28 if cfg.short_conv else 1)
        # of a sequence; the gated loop's backward keeps gradients for all its layers, about half of the whole
        layer = self.layer = (two - one) / (2 if cfg.gated else cfg.n_layers)
        self.fixed, self.per_sequence = 2 * one - two, two - one + layer  # and one block's gradients
        # the input of each block; one block run again, its gradients, and holes: repeats of one run measured
        # 1.15 to 1.36 GB (d 256, T 1,024), why is not known; this lies between
        if cfg.checkpoint_activations:
            self.fixed = 0
            self.per_sequence = cfg.n_layers * cfg.max_seq_len * cfg.d_model * 4 + 3.5 * layer
        with FakeTensorMode():
            self.parameters = sum(p.numel() * 4 for p in make_model().parameters())
        self.states = self.parameters * (1 if cfg.optimizer == "sgd" else 2)  # a little less with muon
        self.head = cfg.vocab_size * cfg.head_width * 4
        self.logits = length * cfg.vocab_size * (4 if dtype == "fp32" else 2)  # of a sequence
        self.base, self.slack = 0.0, 1.0
        if device.type == "cpu":  # the whole process counts; and as measured: libraries, holes in the heap
            self.base, self.slack = distributed.resident_memory() * 1e9 + 6e7, 1.08

    def peak(self, sequences: int, gradients_stay: bool) -> float:
        """`gradients_stay`: they are already there when a forward pass runs (accumulation, DDP)."""
        loss = min(sequences * self.logits, head_loss.CHUNK_BYTES) + 2 * self.head
        forward = self.fixed + sequences * self.per_sequence + loss + gradients_stay * self.parameters
        backward = self.parameters + 2 * self.head  # gradients, and the two that make a tied embedding's
        return self.base + self.slack * (self.parameters + self.states + max(forward, backward))

    def evaluated_at_once(self, sequences: int) -> int:
        """How many sequences need no more without gradients than training on `sequences`: one block's
        activations at a time are alive."""
        return max(sequences, int(sequences * self.per_sequence / self.layer))


def free_memory(device) -> float:
    """Bytes that this process may still take, or infinity where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        with open("/proc/meminfo") as f:
            return 1024 * int(next(line for line in f if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return float("inf")
