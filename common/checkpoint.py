"""Checkpoints: written to a temporary file, flushed and renamed; loaded as data, never as code."""
import os
import pickle
import re
import zipfile

from common.config import UserError
from common.files import write_atomically

import torch


class CheckpointError(UserError):
    pass


def save(path: str, state: dict) -> None:
    write_atomically(path, lambda f: torch.save(state, f))


def find(path: str) -> str:
    """The checkpoint file at `path`, or best.pt / last.pt if it is a run's folder; or CheckpointError."""
    if os.path.isdir(path):
        found = [p for p in (os.path.join(path, n) for n in ("best.pt", "last.pt")) if os.path.exists(p)]
        if not found:
            raise CheckpointError(f"no best.pt or last.pt in {path}")
        return found[0]
    if not os.path.exists(path):
        raise CheckpointError(f"no checkpoint at {path}; runs keep theirs in out/NAME/")
    return path


def load(path: str, keys=("model", "config"), map_location="cpu", int8: bool = False) -> dict:
    """The checkpoint at `path`, or at best.pt / last.pt if it is a run's folder. CheckpointError if it is
    missing, damaged, holds anything but tensors and plain values, lacks one of `keys`, or if it is in INT8
    and `int8` does not allow that."""
    path = find(path)
    if not zipfile.is_zipfile(path):  # torch.save's container, whose directory is at its end
        raise CheckpointError(f"{path} is not a whole checkpoint ({os.path.getsize(path):,} bytes); "
                              "copy it again, or go on from the folder's other .pt file")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise CheckpointError(f"{path} holds more than tensors and plain values and was not loaded: "
                              f"a checkpoint is data, never code\n({reason})") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as e:
        raise CheckpointError(f"{path} is damaged ({type(e).__name__}: {str(e):.200}); "
                              "copy it again, or go on from the folder's other .pt file") from None
    if isinstance(state, dict) and "int8" in state and not int8:
        raise CheckpointError(f"{path} is in INT8, to be read and not trained; use what it was made from: "
                              + state["int8"]["source"])
    missing = [k for k in keys if not isinstance(state, dict) or k not in state]
    if missing:
        has = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} is not a nanoMem checkpoint: no {', '.join(missing)} in it "
                              f"(it has: {has})")
    return state


def new_name(name: str, own) -> str:
    """Files made before trunks had that name call it blocks, and the gated context blocks.0."""
    new = re.sub(r"^blocks\.", "trunk.", name)
    return new if new in own else re.sub(r"^blocks\.0\.", "trunk.", name)


def load_weights(model, weights: dict, path: str) -> None:
    """Put `weights` into `model`, or say which tensors do not fit."""
    own = model.state_dict()
    weights = {new_name(name, own): w for name, w in weights.items()}
    problems = [f"{k}: missing in the file" for k in own if k not in weights]
    problems += [f"{k}: not in this model" for k in weights if k not in own]
    problems += [f"{k}: {tuple(weights[k].shape)} in the file, {tuple(own[k].shape)} in this model"
                 for k in own if k in weights and own[k].shape != weights[k].shape]
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} is of another model:\n  " + "\n  ".join(problems[:5]) + more)
    model.load_state_dict(weights)


def check_tokenizer(theirs: dict, path: str, ours: dict, folder: str, fix: str = "") -> None:
    """UserError, with what to do, if the model at `path` and what is in `folder` have other tokenizers."""
    if ours["fingerprint"] != theirs["fingerprint"]:
        raise UserError(f"{path} was trained with the tokenizer {theirs['name']} "
                        f"({theirs['fingerprint'][:12]}), but {folder} is tokenised with {ours['name']} "
                        f"({ours['fingerprint'][:12]}): the same ids mean other text\n" + (
                            fix or "make the data with the model's tokenizer:  "
                            f"python prepare_data.py ... --tokenizer_from={path}"))
