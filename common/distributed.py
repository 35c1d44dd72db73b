"""What differs between a laptop, a GPU and torchrun, in one object: rank, world, device, reductions. And
precision, memory and peak speed of the device."""
import ctypes
import os
import re
import resource
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

from common.config import UserError

import torch
import torch.distributed as dist

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Dist:
    """This process among those started by torchrun. As a context manager it closes the process group."""
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def grouped(self) -> bool:
        return dist.is_initialized()

    def reduce(self, total: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
        """The sum (or `op`) of a tensor over all processes, without waiting for a GPU. A collective: every
        process must call it."""
        if not self.grouped:
            return total
        total = total.to(self.device if self.device.type == "cuda" else "cpu")  # gloo works on the CPU
        dist.all_reduce(total, op)
        return total

    def sum(self, *values: float) -> list[float]:
        """Each number summed over all processes, in float64."""
        return self.reduce(torch.tensor(values, dtype=torch.float64)).tolist()

    def min(self, value: float) -> float:
        """The smallest value over all processes."""
        return self.reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MIN).item()

    def __enter__(self) -> "Dist":
        return self

    def __exit__(self, *_) -> None:
        if self.grouped:
            dist.destroy_process_group()


def pick_device(device: str = "auto") -> torch.device:
    """The device for cpu, cuda, cuda:N or mps, or UserError if it is missing; auto = the best available."""
    if device == "auto":
        mps = torch.backends.mps.is_available() and int(os.environ.get("WORLD_SIZE", 1)) == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"device={device}: expected auto, cpu, cuda, cuda:1 or mps")
    if device.startswith("cuda"):
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not gpus:
            raise UserError(f"device={device}, but this torch sees no CUDA device; use --device=auto")
        if int(device[5:] or 0) >= gpus:
            raise UserError(f"device={device}, but there are {gpus} CUDA devices, cuda:0 to cuda:{gpus - 1}")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device}, but this torch sees no Apple GPU; use --device=auto")
    return torch.device(device)


def setup(device: str = "auto") -> Dist:
    """Pick the device and, if torchrun's variables are set, always join the process group (NCCL on CUDA, else
    gloo)."""
    rank, world, local = (int(os.environ.get(key, default)) for key, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(device)
    if device == torch.device("cuda") and "RANK" in os.environ:
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"process {local} of this machine has no GPU: torchrun starts more processes "
                            f"than the {gpus} GPUs here; use --nproc_per_node={gpus}")
        device = torch.device("cuda", local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 matmuls remain
    if "RANK" in os.environ:
        # the default of ten minutes is too short if rank 0 saves a large model to a slow disk
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(minutes=60), device_id=own)
    return Dist(rank, world, device)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the system at each free: getting them back in
    cleared 4 KB pages took up to a fifth of a step. Other C libraries (macOS, musl) are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            mallopt(option, value)


def choose_dtype(dtype: str, device: torch.device) -> tuple[str, str]:
    """(fp32, bf16 or fp16; the reason). An explicit dtype is kept, or refused if the device lacks it."""
    if dtype != "auto":
        if dtype == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
            raise UserError("dtype=bf16 on this Mac needs macOS 14 or newer; use --dtype=fp32")
        return dtype, "as asked"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        # a T4 (7.5) claims bf16 and emulates it several times slower
        return ("bf16", f"compute capability {major}.{minor} has it") if major >= 8 else \
               ("fp16", f"compute capability {major}.{minor} has no bf16; gradients are scaled")
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if onednn and torch.cpu._is_avx512_bf16_supported():
        return "bf16", "this CPU has AVX512-BF16"
    return "fp32", f"no fast 16-bit arithmetic known for {device.type}"


def autocast(dtype: str, device: torch.device):
    """The context manager for forward passes; weights stay fp32."""
    return nullcontext() if dtype == "fp32" else torch.autocast(device.type, DTYPES[dtype])


# Dense 16-bit tensor FLOP/s with fp32 accumulation, from NVIDIA's data sheets. Other GPUs print no MFU.
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
              "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "Tesla T4": 65e12}


def peak_flops(device: torch.device, dtype: str) -> float:
    """Peak FLOP/s of this device at this precision; 0 if unknown."""
    if device.type != "cuda" or dtype == "fp32":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items()
                 if name.endswith(key) or key + " " in name or key + "-" in name), 0.0)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def peak_memory(device: torch.device) -> float:
    """Peak GB so far: allocated by torch on CUDA, resident on CPU (token files that were read count). On MPS
    what the driver holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    return resident_memory("VmHWM")


def resident_memory(field: str = "VmRSS") -> float:
    """GB of this process in memory: VmRSS now, VmHWM at its peak (other systems than Linux: always that)."""
    if sys.platform == "linux":  # here getrusage starts with the parent process's peak
        with open("/proc/self/status") as f:
            return 1024 * int(next(line for line in f if line.startswith(field)).split()[1]) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
