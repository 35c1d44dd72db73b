"""Post-training INT8: a checkpoint a quarter of the size that decodes one stream several times faster.

    python quantize.py out/demo                          # best.pt -> out/demo/int8.pt, and what that costs
    python quantize.py out/demo/last.pt --overwrite      # another checkpoint of the run
    python quantize.py out/demo --data=data/shakespeare  # measure on other text, in the same tokens
    python quantize.py out/demo --compile                # time the compiled decoding step as well
    python sample.py out/demo/int8.pt --prompt="ROMEO."  # the result is a checkpoint like any other

Each matrix is rounded to 8 bits with a scale per output channel, each embedding table with a scale per entry;
activations are rounded on the fly, with a scale per token. Norms, biases, other vectors and routers are left
as they are. Nothing is calibrated: text is used only to measure what was lost. The table compares the file,
loaded back, with the checkpoint, on the whole validation split in windows of max_seq_len, with decoding's
logits. An INT8 file cannot be trained: keep the checkpoint. It is smaller everywhere, faster only on x86.
"""
import copy
import os
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

from common import checkpoint, data, distributed
from common.config import UserError, launch
from common.console import say
from common.evaluate import evaluate
from common.int8 import to_int8
from common.race import timed
from common.run import MachineConfig, append_to_ledger, ledger_row
from model import LM, load_model

import torch

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class QuantizeConfig(MachineConfig):
    POSITIONAL: ClassVar[str] = "checkpoint"
    # files
    checkpoint: str = "out/demo"  # run folder (its best.pt) or .pt file; int8.pt is written beside it
    overwrite: bool = False  # replace an existing int8.pt
    out_dir: str = ""  # folder of ledger.jsonl; "" = the one that holds the checkpoint's folder
    # measurement
    data: str = ""  # folder whose validation split is used; "" = the one the model was trained on
    speed_tokens: int = 256  # tokens generated to time one stream, the median of three times; 0 = not timed
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # of the weights that INT8 is compared with
    compile: Literal["auto", "true", "false"] = "auto"  # also time the compiled decoding step; auto: no

    def problems(self) -> list[str]:
        return super().problems() + self.at_least(0, "speed_tokens")


# ------------------------------------------------------------------------------------------------------------
# Measuring


def check(source: str, model: LM, saved: dict) -> None:
    if "int8" in saved:
        raise UserError(f"{source} is already in INT8, made from {saved['int8']['source']}")
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        raise UserError(f"{source} contains values that are not finite, in {', '.join(bad[:3])}")


def speeds(models: dict[str, LM], n: int, compile: bool, device) -> dict[str, float]:
    """Greedy tokens/s of one stream, the median of three times; the models take turns."""
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)  # (1, 1)

    def seconds(model: LM, n: int) -> float:
        return timed(lambda: list(model.generate(prompt, n, temperature=0, compile=compile)), 1, device)

    for model in models.values():
        seconds(model, n if compile else 8)  # warm-up; a compiled step is specific to the cache size
    rounds = [{name: seconds(model, n) for name, model in models.items()} for _ in range(3)]
    return {name: n / statistics.median(times[name] for times in rounds) for name in models}


def kept_bytes(model: LM) -> Counter:
    """Bytes of what is neither in INT8 nor a scale, by name, summed over layers."""
    kept = Counter()
    for name, p in model.named_parameters():
        if p.dtype != torch.int8 and not name.endswith(".scale"):
            kept[re.sub(r"\.\d+\.", ".*.", name)] += p.nbytes
    return kept


ROWS = (("weights", "weight_bytes", "{:,.0f} bytes"), ("checkpoint file", "file_bytes", "{:,.0f} bytes"),
        ("loss", "loss", "{:.4f}"), ("perplexity", "perplexity", "{:.3f}"),
        ("bits per byte", "bits_per_byte", "{:.4f}"), ("top-1", "top1", "{:.4f}"),
        ("one stream", "tokens_per_second", "{:,.1f} tok/s"),
        ("compiled", "compiled_tokens_per_second", "{:,.1f} tok/s"))


def table(result: dict[str, dict]) -> str:
    (before, model), (_, int8) = result.items()
    lines = [f"{'':<16}{before:>20}{'INT8':>20}{f'INT8 / {before}':>14}"]
    for label, key, form in ROWS:
        if key in int8:
            a, b = model[key], int8[key]
            lines.append(f"{label:<16}{form.format(a):>20}{form.format(b):>20}{b / a:>13.4f}x")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: QuantizeConfig) -> dict:
    """Write int8.pt, print the table, return the ledger row."""
    began = time.perf_counter()
    with distributed.setup(cfg.device) as dist:
        device = dist.device
        if device.type == "cpu":
            distributed.keep_freed_memory()
        source = checkpoint.find(cfg.checkpoint)
        fp32, saved = load_model(source)
        check(source, fp32, saved)
        folder = cfg.data or saved["config"]["data"]
        if not folder:
            raise UserError(f"{cfg.checkpoint} was trained on no data folder here: name one with --data,\n"
                            f"made with:  python prepare_data.py ... --tokenizer_from={cfg.checkpoint}")
        meta = data.read_meta(folder)
        checkpoint.check_tokenizer(saved["tokenizer"], cfg.checkpoint, meta["tokenizer"], folder)
        tokens, split = data.open_tokens(folder, "val", meta), meta["splits"]["val"]
        path = os.path.join(os.path.dirname(source), "int8.pt")
        if os.path.exists(path) and not cfg.overwrite:
            raise UserError(f"{path} already exists; replace it with --overwrite")

        # write the file and load it back
        checkpoint.save(path, {"model": to_int8(copy.deepcopy(fp32)).state_dict(), "config": saved["config"],
                               "tokenizer": saved["tokenizer"], "int8": {"source": source}})
        dtype, _ = distributed.choose_dtype(cfg.dtype, device)
        models = {dtype: fp32.to(device, distributed.DTYPES[dtype]), "int8": load_model(path, device)[0]}

        # size, quality, speed; shared parameters count once, as in the file
        length = fp32.cfg.max_seq_len
        result = {name: {"weight_bytes": sum(p.nbytes for p in model.parameters()),
                         "file_bytes": os.path.getsize(file),
                         **evaluate(model, tokens, split, length, max(1, 2**13 // length), dist, "fp32",
                                    by_logits=True, label=name)}
                  for (name, model), file in zip(models.items(), (source, path), strict=True)}
        n = cfg.speed_tokens if fp32.pos_embed is None else min(cfg.speed_tokens, length)
        for compile, key in ((False, "tokens_per_second"), (True, "compiled_tokens_per_second")):
            if n and (not compile or cfg.compile == "true"):
                for name, speed in speeds(models, n, compile, device).items():
                    result[name][key] = speed
        kept = kept_bytes(models["int8"])
        say(f"{table(result)}\nnot in INT8: {sum(kept.values()):,} bytes")
        say("\n".join(f"{size:>11,}  {name}" for name, size in kept.items()))
        say(f"wrote {path}; try it with:  python sample.py {path}")
        row = ledger_row("quantize", cfg, dist, counts={"parameters": fp32.count_parameters()["total"]},
                         result=result | {"path": path, "kept_bytes": dict(kept)}, dtype=dtype,
                         seconds=time.perf_counter() - began)
        append_to_ledger(cfg.out_dir or os.path.dirname(os.path.dirname(os.path.abspath(path))), row)
        return row


if __name__ == "__main__":
    launch(main, QuantizeConfig)
