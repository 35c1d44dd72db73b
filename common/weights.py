"""Weights as transformers stores them: .safetensors or torch's .bin, in one file or in shards.

    source = open_weights(folder)               # .shapes and .dtypes of all tensors, nothing is read yet
    source.mapped(["wte.weight"], torch.float32)  # a tensor in the file itself, read when it is used; or None
    source.read_into("wte.weight", out)         # into a contiguous part of a tensor that already exists

A safetensors file is the length of its header (8 bytes), the header in JSON, then the tensors. It is read and
written here so that no tensor exists twice: what is one matrix here and two there (gate and up) is one piece
of the file, since names are sorted, and the parts of other matrices (q, k, v) go straight to their place.
"""
import json
import math
import mmap
import os
import pickle

from common.config import UserError
from common.files import read_json, write_atomically

import torch

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**22  # elements converted at once, where the dtype changes; what is mapped of them counts as memory
INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
WHOLE = "model.safetensors", "pytorch_model.bin"


class WeightsError(UserError):
    pass


def weight_files(folder: str) -> list[str]:
    """The paths that hold a folder's weights. WeightsError if there are none or a shard is missing."""
    for index, whole in zip(INDEX, WHOLE, strict=True):
        if os.path.exists(path := os.path.join(folder, index)):
            try:
                shards = sorted(set(read_json(path)["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as e:
                raise WeightsError(f"{path} is damaged ({type(e).__name__}: {e}); copy it again") from None
            files = [os.path.join(folder, os.path.basename(s)) for s in shards]
            if missing := [os.path.basename(f) for f in files if not os.path.exists(f)]:
                raise WeightsError(f"{folder} lacks {', '.join(missing)}, which {index} names "
                                   f"({len(files)} shards in all); copy the missing files")
            return files
        if os.path.exists(path := os.path.join(folder, whole)):
            return [path]
    raise WeightsError(f"no weights in {folder}: looked for {', '.join((*WHOLE, *INDEX))}")


def open_weights(folder: str) -> "Safetensors | TorchFiles":
    files = weight_files(folder)
    return (Safetensors if files[0].endswith(".safetensors") else TorchFiles)(files)


def damaged(path: str, reason: str) -> WeightsError:
    return WeightsError(f"{path} is damaged: {reason}; copy it again")


class Safetensors:
    """The tensors of some .safetensors files. WeightsError if one is truncated or its header is wrong."""

    def __init__(self, files: list[str]):
        self.shapes, self.dtypes, self.places, self.open = {}, {}, {}, {}
        for path in files:
            for name, entry, begin in read_header(path):
                self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), DTYPES[entry["dtype"]]
                self.places[name] = path, begin
        self.maps = {}

    def mapped(self, names, dtype):
        """The tensors `names` below each other as one tensor that is the file's memory map, private to this
        process if written to; None if they are not of this dtype and next to each other in one file."""
        path, begin = end = self.places[names[0]]
        for name in names:
            if self.places[name] != end or self.dtypes[name] != dtype or begin % dtype.itemsize:
                return None
            end = path, end[1] + math.prod(self.shapes[name]) * dtype.itemsize
        flat = torch.frombuffer(self.map_of(path), dtype=dtype, count=(end[1] - begin) // dtype.itemsize,
                                offset=begin)
        return flat.view(-1, *self.shapes[names[0]][1:])

    def map_of(self, path: str) -> mmap.mmap:
        if path not in self.maps:
            with open(path, "rb") as f:
                self.maps[path] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        return self.maps[path]

    def read_into(self, name: str, out) -> None:
        """Fill the contiguous tensor `out` with the tensor `name`, of as many elements, in out's dtype."""
        path, begin = self.places[name]
        flat, dtype = out.view(-1), self.dtypes[name]
        if out.dtype == dtype:
            file = self.open.get(path) or self.open.setdefault(path, open(path, "rb", buffering=0))
            file.seek(begin)
            return fill(file, flat, path)
        source = self.map_of(path)
        for part in flat.split(CHUNK):  # by all threads, from the file's own pages, which are then let go
            part.copy_(torch.frombuffer(source, dtype=dtype, count=len(part), offset=begin))
            page, end = begin - begin % mmap.PAGESIZE, begin + len(part) * dtype.itemsize
            source.madvise(mmap.MADV_DONTNEED, page, end - page)
            begin = end

    def close(self) -> None:
        for file in self.open.values():
            file.close()


def read_header(path: str):
    """Yield (name, its entry in the header, where its bytes begin in the file), all checked."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= min(size - 8, 10**8):
            raise damaged(path, f"it has {size:,} bytes, and its header would have {length:,}")
        try:
            entries = json.loads(f.read(length))
            entries.pop("__metadata__", None)
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise WeightsError(f"{path}: {name} is {entry['dtype']}, expected one of "
                                       f"{', '.join(DTYPES)}; quantised weights are not read")
                if end - begin != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize or begin < 0:
                    raise ValueError(f"{name} has {end - begin:,} bytes for the shape {entry['shape']}")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise damaged(path, f"{type(e).__name__}: {e}") from None
    needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < needed:
        raise damaged(path, f"it has {size:,} bytes of {needed:,}, so the copy was cut short")
    for name, entry in entries.items():
        yield name, entry, 8 + length + entry["data_offsets"][0]


def fill(file, tensor, path: str) -> None:
    view = memoryview(tensor.view(torch.uint8).numpy())
    while view:
        n = file.readinto(view)  # at most 2 GB per call
        if not n:
            raise damaged(path, "it ends early")
        view = view[n:]


class TorchFiles:
    """The tensors of some .bin files, loaded as data, never as code."""

    def __init__(self, files: list[str]):
        self.tensors = {}
        for path in files:
            try:
                try:
                    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # the format before torch 1.6 cannot be mapped
                    loaded = torch.load(path, map_location="cpu", weights_only=True)
                self.tensors |= {name: t for name, t in loaded.items() if torch.is_tensor(t)}
            except pickle.UnpicklingError:
                raise WeightsError(f"{path} holds more than tensors and was not loaded: weights are data, "
                                   "never code; look for a .safetensors version") from None
            except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as e:
                raise damaged(path, f"{type(e).__name__}: {str(e):.200}") from None
        self.shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self.tensors.items()}

    def mapped(self, names, dtype):
        return self.tensors[names[0]] if len(names) == 1 and self.dtypes[names[0]] == dtype else None

    def read_into(self, name: str, out) -> None:
        out.copy_(self.tensors[name].view(out.shape))

    def close(self) -> None:
        self.tensors = {}


def write_safetensors(path: str, tensors: dict) -> None:
    """Write {name: tensor} atomically, one tensor at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned

    def write(f):
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(memoryview(t.detach().contiguous().view(-1).view(torch.uint8).numpy()))

    write_atomically(path, write)
