"""Checkpoints: written atomically, loaded as data, never as code."""
import hashlib
import os
import pickle
import re
import zipfile

from common import lora
from common.config import UserError
from common.files import write_atomically

import torch


class CheckpointError(UserError):
    pass


def save(path: str, state: dict) -> None:
    write_atomically(path, lambda f: torch.save(state, f))


def find(path: str) -> str:
    """`path` itself, or best.pt, else last.pt, in a run's folder. CheckpointError if there is none."""
    if os.path.isdir(path):
        for name in ("best.pt", "last.pt"):
            if os.path.exists(file := os.path.join(path, name)):
                return file
        raise CheckpointError(f"no best.pt or last.pt in {path}")
    if not os.path.exists(path):
        raise CheckpointError(f"no checkpoint at {path}; runs keep theirs in out/NAME/")
    return path


def file_sha256(path: str) -> str:
    """Of the file that find(path) names."""
    with open(find(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load(path: str, keys=("model", "config"), map_location="cpu", int8: bool = False,
         mmap: bool = False) -> dict:
    """The checkpoint that find(path) names; with `mmap` its tensors stay on disk until they are used.
    CheckpointError if it is damaged, holds anything but tensors and plain values, lacks one of `keys`, or is
    in INT8 without `int8`."""
    path, way_out = find(path), "copy it again, or use the other .pt file in its folder"
    if not zipfile.is_zipfile(path):  # the container of torch.save, with its directory at the end
        size = os.path.getsize(path)
        raise CheckpointError(f"{path} is not a whole checkpoint ({size:,} bytes); {way_out}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as e:
        reason = str(e).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise CheckpointError(f"{path} holds more than tensors and plain values and was not loaded: "
                              f"a checkpoint is data, never code\n({reason})") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is damaged ({type(e).__name__}: {str(e):.200}); {way_out}") from None
    has = [str(k) for k in state] if isinstance(state, dict) else [type(state).__name__]
    if "int8" in has and not int8:
        raise CheckpointError(f"{path} is in INT8, to be read and not trained; use what it was made from: "
                              + state["int8"]["source"])
    if missing := [k for k in keys if k not in has]:
        raise CheckpointError(f"{path} is not a nanoMem checkpoint: it lacks {', '.join(missing)} "
                              f"(it has: {', '.join(has[:8])})")
    return state


def new_name(name: str, own) -> str:
    """Old files call the trunk "blocks", and the gated context "blocks.0"."""
    new = re.sub(r"^blocks\.", "trunk.", name)
    return new if new in own else re.sub(r"^blocks\.0\.", "trunk.", name)


def fitting(model, weights: dict, path: str) -> dict:
    """`weights` under the model's own names, merged if they are of a LoRA run and `model` has no LoRA.
    CheckpointError that lists the tensors that do not fit."""
    own = model.state_dict()
    weights = weights if any(map(lora.is_lora, own)) else lora.merged(weights)
    weights = {new_name(name, own): w for name, w in weights.items()}
    problems = [f"{k}: missing in the file" for k in own if k not in weights]
    problems += [f"{k}: not in this model" for k in weights if k not in own]
    problems += [f"{k}: {tuple(weights[k].shape)} in the file, {tuple(own[k].shape)} in this model"
                 for k in own if k in weights and own[k].shape != weights[k].shape]
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} is of another model:\n  " + "\n  ".join(problems[:5]) + more)
    return weights


def load_weights(model, weights: dict, path: str) -> None:
    """Copy `weights` into `model`. CheckpointError as above."""
    model.load_state_dict(fitting(model, weights, path))


def assign_weights(model, weights: dict, path: str) -> None:
    """Make `weights` themselves the parameters of `model`, which was built on the meta device and so holds
    none: no second copy exists. Shared parameters stay shared. CheckpointError as above."""
    weights, ours = fitting(model, weights, path), {}
    for name, p in model.named_parameters():  # each once
        ours[id(p)] = torch.nn.Parameter(weights[name], requires_grad=p.requires_grad)
    for module in model.modules():
        for key, p in module._parameters.items():
            module._parameters[key] = None if p is None else ours[id(p)]


def with_new_tokens(weights: dict, known: int, n_tokens: int) -> dict:
    """`weights` with ids known .. n_tokens - 1 added to the vocabulary. Their rows are the mean of the known
    ones: a trained head gives a random row a far higher logit than the tokens it has learned to rule out."""
    weights = dict(weights)
    for name in ("embed.weight", "head.weight", "head.bias") if n_tokens > known else ():
        if (old := weights.get(name)) is not None:
            new = old[:known].mean(dim=0, keepdim=True).expand(n_tokens - known, *old.shape[1:])
            weights[name] = torch.cat((old[:known], new, old[n_tokens:]))
    return weights


def check_tokenizer(theirs: dict, path: str, ours: dict, folder: str, fix: str = "", new: bool = False,
                    has: str = "was trained with the tokenizer") -> None:
    """UserError, with the way out, if the model at `path` (or data, as `has` says) has another tokenizer than
    the data in `folder`. `new`: chat tokens may be new to `path`."""
    if theirs["fingerprint"] not in (ours["fingerprint"], ours.get("base") if new else None):
        raise UserError(f"{path} {has} {theirs['name']} "
                        f"({theirs['fingerprint'][:12]}), but {folder} is tokenised with {ours['name']} "
                        f"({ours['fingerprint'][:12]}): the same ids stand for different text\n" + (
                            fix or "make the data with the model's tokenizer:  "
                            f"python prepare_data.py ... --tokenizer_from={path}"))
