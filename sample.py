"""Read a model: continue prompts, look at its next-token probabilities, talk to it.

    python sample.py out/demo                                            # from nothing: a new document
    python sample.py out/demo --prompt="ROMEO." --prompt="To be,"        # several prompts
    python sample.py out/demo --prompt_file=prompts.txt                  # one a line; - reads them from stdin
    python sample.py out/demo --interactive                              # type a prompt, read on; Ctrl-D ends
    python sample.py out/mini3 out/mini6 --prompt="The king" --top_tokens=5   # next-token tables side by side

A run folder means its best.pt. The folder also holds the tokenizer, so it can be copied to another machine
and sampled there.
"""
import os
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

from common import distributed, tokenizer
from common.checkpoint import check_tokenizer
from common.config import UserError, launch
from common.console import say
from common.run import MachineConfig
from common.stream import StreamDecoder
from model import load_model

import torch

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class SampleConfig(MachineConfig):
    POSITIONAL: ClassVar[str] = "checkpoints"
    # what
    checkpoints: tuple[str, ...] = ("out/demo",)  # run folders or .pt files; several are shown side by side
    tokenizer_from: str = ""  # data or run folder with the tokenizer; "" = the checkpoint's folder
    prompt: tuple[str, ...] = ()  # text to continue; repeat the flag for more
    prompt_file: str = ""  # a file with one prompt a line; - = stdin
    interactive: bool = False  # read prompts from the terminal
    top_tokens: int = 0  # print so many most probable next tokens instead of continuing
    # how
    max_new_tokens: int = 200  # length of a continuation, unless the document ends before
    num_samples: int = 1  # continuations of each prompt
    temperature: float = 0.8  # 0 = greedy
    top_k: int = 50  # draw from the k most probable tokens; 0 = all
    top_p: float = 1.0  # draw from the most probable tokens that hold this much probability together
    repetition_penalty: float = 1.0  # above 1, tokens already there become less probable
    seed: int = 1  # of the draws
    # machine, where they differ from training
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # of weights too; 16 bits read half the memory
    compile: Literal["auto", "true", "false"] = "auto"  # the decoding step: pays for long texts; auto = no

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "num_samples") + self.at_least(
            0, "top_tokens", "max_new_tokens", "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            out.append(f"top_p must be in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            out.append(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if sum((bool(self.prompt), bool(self.prompt_file), self.interactive)) > 1:
            out.append("use one of prompt, prompt_file and interactive")
        return out


# ------------------------------------------------------------------------------------------------------------
# Helpers


def load(path: str, tokenizer_from: str, device, dtype: str = "fp32"):
    """(model, tokenizer) of a checkpoint; the tokenizer must be the one the model was trained with."""
    model, saved = load_model(path, device, dtype)
    folder = tokenizer_from or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
    tok = tokenizer.load(folder)
    check_tokenizer(saved["tokenizer"], path, {"name": tok.name, "fingerprint": tok.fingerprint}, folder,
                    fix="name the folder with the model's tokenizer:  --tokenizer_from=FOLDER")
    return model, tok


def encode(prompt: str, tok, device):
    """A prompt as the beginning of a document, (1, T)."""
    return torch.tensor([[tok.eot, *tok.encode(prompt)]], device=device)


def stream(model, tok, prompt: str, cfg: SampleConfig, generator, device):
    """Yield the continuation of a prompt piece by piece, as soon as a piece is whole characters."""
    decoder = StreamDecoder(tok)
    for token in model.generate(encode(prompt, tok, device), cfg.max_new_tokens, cfg.temperature,
                                cfg.top_k, cfg.top_p, cfg.repetition_penalty, stop_tokens=[tok.eot],
                                generator=generator, compile=cfg.compile == "true"):
        if int(token) != tok.eot:
            yield decoder.push(int(token))
    yield decoder.flush()


@torch.no_grad()
def next_tokens(model, tok, prompt: str, k: int, device) -> list[tuple[str, float]]:
    """The k most probable tokens after a prompt, with their probabilities. Of a prompt that is longer than
    learned positions the end is read."""
    ids = encode(prompt, tok, device)  # (1, T)
    if model.pos_embed is not None and ids.size(1) > model.cfg.max_seq_len:
        say(f"the prompt has {ids.size(1):,} tokens, the model {model.cfg.max_seq_len:,} positions: only the "
            "end is read")
        ids = ids[:, -model.cfg.max_seq_len:]
    logits = model.step(ids, None)[0, :model.n_tokens]  # (V,)
    top = logits.softmax(dim=-1).topk(min(k, model.n_tokens))
    return [(tok.decode([int(i)]), float(p)) for p, i in zip(top.values, top.indices, strict=True)]


def print_table(prompt: str, names: list[str], columns: list[list[tuple[str, float]]]) -> None:
    width = max(24, *(len(n) + 2 for n in names))
    print(f"\n{prompt!r}\n    " + "".join(f"{n:<{width}}" for n in names))
    for rank, row in enumerate(zip(*columns, strict=False), 1):
        print(f"{rank:>2}  " + "".join(f"{p:7.2%}  {token!r:<{width - 9}}" for token, p in row))


def read_prompts(cfg: SampleConfig):
    """Prompts as they come: from flags, a file, stdin or the terminal."""
    if cfg.interactive:
        while True:
            try:
                yield input("\n> ")
            except EOFError:
                return
    if cfg.prompt_file and cfg.prompt_file != "-" and not os.path.isfile(cfg.prompt_file):
        raise UserError(f"no prompt file '{cfg.prompt_file}'")
    if cfg.prompt_file:
        try:
            with sys.stdin if cfg.prompt_file == "-" else open(cfg.prompt_file, encoding="utf-8") as f:
                yield from (line.rstrip("\n") for line in f if line.strip())
        except UnicodeDecodeError as e:
            raise UserError(f"{cfg.prompt_file} is not UTF-8 at byte {e.start:,} ({e.reason})") from None
    else:
        yield from cfg.prompt or ("",)


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: SampleConfig) -> dict:
    """Print, and return {prompt: {checkpoint: [texts]}}, or with top_tokens {prompt: {checkpoint: [(token,
    p), ...]}}."""
    device = distributed.setup(cfg.device).device
    dtype, _ = distributed.choose_dtype(cfg.dtype, device)
    models = {path: load(path, cfg.tokenizer_from, device, dtype) for path in cfg.checkpoints}
    generator = torch.Generator(device).manual_seed(cfg.seed)
    results = {}
    for prompt in read_prompts(cfg):
        if cfg.top_tokens:
            columns = {path: next_tokens(model, tok, prompt, cfg.top_tokens, device)
                       for path, (model, tok) in models.items()}
            print_table(prompt, list(columns), list(columns.values()))
            results[prompt] = columns
            continue
        texts = results[prompt] = {}
        for path, (model, tok) in models.items():
            for i in range(cfg.num_samples):
                which = f", sample {i + 1}" if cfg.num_samples > 1 else ""
                print(f"\n--- {path}{which}\n{prompt}", end="")
                pieces = []
                for piece in stream(model, tok, prompt, cfg, generator, device):
                    print(piece, end="", flush=True)
                    pieces.append(piece)
                print()
                texts.setdefault(path, []).append("".join(pieces))
    return results


if __name__ == "__main__":
    launch(main, SampleConfig)
