"""Sample from a model: continue prompts, compare next-token probabilities, or type prompts to it.

    python sample.py out/demo                                            # no prompt: a new document
    python sample.py out/demo --prompt="ROMEO." --prompt="To be,"        # several prompts
    python sample.py out/demo --prompt_file=prompts.txt                  # one prompt per line; - = stdin
    python sample.py out/demo --interactive                              # type prompts; Ctrl-D ends
    python sample.py out/chat --chat                                     # talk; /reset forgets, /quit ends
    python sample.py out/mini3 out/mini6 --prompt="The king" --top_tokens=5   # next-token tables side by side
    python sample.py out/demo --write=data/self --temperature=1 --top_k=0     # sampled text, to train on

A run folder stands for its best.pt. It holds the tokenizer too, so a copy of it on another machine is enough.
"""
import itertools
import os
import sys
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from common import distributed, tokenizer
from common.chat import Turns, format_of
from common.checkpoint import check_tokenizer
from common.config import UserError, launch
from common.files import write_json
from common.run import MachineConfig
from common.samples import next_token_table, next_tokens
from common.splits import Piece
from common.stream import StreamDecoder
from common.token_files import SplitWriter, clean_up, new_folder
from model import load_model

import numpy as np
import torch
from tqdm import tqdm

ROWS = 64  # documents sampled at once

# ------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class SampleConfig(MachineConfig):
    POSITIONAL: ClassVar[str] = "checkpoints"
    # what
    checkpoints: tuple[str, ...] = ("out/demo",)  # run folders or .pt files; several are shown side by side
    tokenizer_from: str = ""  # data or run folder with the tokenizer; "" = the checkpoint's folder
    prompt: tuple[str, ...] = ()  # text to continue; repeat the flag for more
    prompt_file: str = ""  # a file with one prompt per line; - = stdin
    interactive: bool = False  # read prompts from the terminal
    chat: bool = False  # prompts are messages to a model trained on conversations, read from the terminal
    top_tokens: int = 0  # print this many most probable next tokens; 0 = continue the prompt
    write: str = ""  # write sampled documents to this token folder, as text for train.py --replay_data
    write_tokens: int = 1_000_000  # how many tokens of it
    # how
    max_new_tokens: int = 200  # length of a continuation, unless the document ends first
    num_samples: int = 1  # continuations of each prompt
    temperature: float = 0.8  # 0 = greedy
    top_k: int = 50  # sample from the k most probable tokens; 0 = all
    top_p: float = 1.0  # sample from the most probable tokens that together have this probability
    repetition_penalty: float = 1.0  # above 1, tokens that already occurred become less probable
    seed: int = 1  # of the sampling
    # machine, where it differs from training
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # of weights too: 16 bits halve memory traffic
    compile: Literal["auto", "true", "false"] = "auto"  # compile the decoding step, for long texts; auto = no

    def problems(self) -> list[str]:
        out = super().problems() + self.at_least(1, "num_samples") + self.at_least(
            0, "top_tokens", "write_tokens", "max_new_tokens", "temperature", "top_k", "seed")
        if not 0 < self.top_p <= 1:
            out.append(f"top_p must be in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            out.append(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if bool(self.prompt) + bool(self.prompt_file) + self.interactive > 1:
            out.append("use one of prompt, prompt_file and interactive")
        if self.chat and (self.top_tokens or self.write or self.num_samples > 1 or len(self.checkpoints) > 1):
            out.append("chat talks with one checkpoint: it goes without top_tokens, write and num_samples")
        if self.write and (self.prompt or self.prompt_file or self.interactive or self.top_tokens):
            out.append("write samples whole documents: it goes without prompt, prompt_file, interactive and "
                       "top_tokens")
        if self.write and len(self.checkpoints) > 1:
            out.append(f"write takes one checkpoint, got {len(self.checkpoints)}")
        return out


# ------------------------------------------------------------------------------------------------------------
# Helpers


def load(path: str, tokenizer_from: str, device, dtype: str = "fp32"):
    """(model, tokenizer) of a checkpoint; UserError if the model was trained with another tokenizer."""
    model, saved = load_model(path, device, dtype)
    folder = tokenizer_from or (path if os.path.isdir(path) else os.path.dirname(path) or ".")
    tok = tokenizer.load(folder)
    check_tokenizer(saved["tokenizer"], path, {"name": tok.name, "fingerprint": tok.fingerprint}, folder,
                    fix="name the folder with the model's tokenizer:  --tokenizer_from=FOLDER")
    return model, tok


def stream(model, tok, ids, cfg: SampleConfig, generator, longest: int, stops):
    """Yield the continuation of the tokens `ids` (1, T) in pieces of whole characters, up to one of `stops`
    or `longest` tokens."""
    decoder = StreamDecoder(tok)
    for token in model.generate(ids, longest, cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty,
                                stop_tokens=stops, generator=generator, compile=cfg.compile == "true"):
        if int(token) not in stops:
            yield decoder.push(int(token))
    yield decoder.flush()


def chat(path: str, model, tok, cfg: SampleConfig, generator) -> Turns:
    """Talk until /quit or the end of the input; returns the turns since the last /reset. The oldest exchanges
    are forgotten as the context fills; half of it may be the answer."""
    form, turns = format_of(tok), []
    if form is None:
        raise UserError(f"{path} has no chat tokens; train it on conversations:\n"
                        f"  python prepare_data.py chitchat --chat --tokenizer_from={path}\n"
                        f"  python train.py config/chat.py --init_from={path}")
    longest, device = min(cfg.max_new_tokens, model.cfg.max_seq_len // 2), next(model.parameters()).device
    print(f"--- {path}; /reset forgets what was said, /quit or Ctrl-D ends")
    for message in map(str.strip, read_prompts(cfg)):
        if message == "/quit":
            break
        if message == "/reset":
            turns = []
            print("forgotten")
        elif message:
            turns.append(("user", message))
            said = [(role, tok.encode(text)) for role, text in turns]
            ids = form.prompt(said, model.cfg.max_seq_len - longest)
            answer, ids = "", torch.tensor([ids], device=device)  # (1, T)
            for piece in stream(model, tok, ids, cfg, generator, longest, [*tok.special_ids()]):
                print(piece, end="", flush=True)
                answer += piece
            print()
            turns.append(("assistant", answer.strip()))
    return turns


def write_documents(path: str, model, tok, cfg: SampleConfig, generator) -> dict:
    """Write sampled documents of up to max_seq_len tokens as the training split of the folder cfg.write;
    returns its counts. Ids are kept as sampled."""
    if os.path.exists(cfg.write):
        raise UserError(f"{cfg.write} already exists; remove it, or choose another --write=FOLDER")
    clean_up(cfg.write)
    start = torch.full((ROWS, 1), tok.eot, device=next(model.parameters()).device)  # (ROWS, 1)
    with new_folder(cfg.write, False) as tmp, tqdm(total=cfg.write_tokens, unit="token", disable=None) as bar:
        writer = SplitWriter(tmp, "train", tok, cfg.write_tokens)
        while writer.tokens < cfg.write_tokens and not writer.full:
            rows = torch.cat(list(model.generate(
                start, model.cfg.max_seq_len - 1, cfg.temperature, cfg.top_k, cfg.top_p,
                cfg.repetition_penalty, generator=generator, compile=cfg.compile == "true")), dim=1)
            for row in rows.tolist():  # of (ROWS, T - 1)
                for ends, ids in itertools.groupby(row, lambda i: i == tok.eot):
                    if not ends:
                        text = tok.decode(ids := list(ids))
                        writer.add(Piece("train", True, text, text.encode()), np.array(ids))
            if not writer.tokens:
                raise UserError(f"{path} samples no text, only the end of the document")
            bar.update(writer.tokens - bar.n)
        counts = writer.finish()
        tok.save(tmp)
        write_json(os.path.join(tmp, "meta.json"), {
            "name": os.path.basename(cfg.write), "source": path, "dtype": writer.dtype.name,
            "tokenizer": {k: getattr(tok, k) for k in ("name", "fingerprint", "vocab_size", "eot")},
            "splits": {"train": counts}, "settings": asdict(cfg)})
    print(f"{cfg.write}: {counts['tokens']:,} tokens in {counts['documents']:,} documents of {path}\n"
          f"next:  python train.py --init_from={path} --data=NEW --replay=0.05 --replay_data={cfg.write}")
    return counts


def read_prompts(cfg: SampleConfig):
    """Yield prompts one by one from the flags, a file, stdin or the terminal."""
    if cfg.prompt_file not in ("", "-") and not os.path.isfile(cfg.prompt_file):
        raise UserError(f"no prompt file '{cfg.prompt_file}'")
    try:
        while cfg.interactive or cfg.chat and not (cfg.prompt or cfg.prompt_file):
            yield input("\n> ")
        if cfg.prompt_file:
            with sys.stdin if cfg.prompt_file == "-" else open(cfg.prompt_file, encoding="utf-8") as f:
                yield from (line.rstrip("\n") for line in f if line.strip())
        else:
            yield from cfg.prompt or ("",)
    except EOFError:
        return
    except UnicodeDecodeError as e:
        where = cfg.prompt_file or "the input"
        raise UserError(f"{where} is not UTF-8 at byte {e.start:,} ({e.reason})") from None


# ------------------------------------------------------------------------------------------------------------
# Main


def main(cfg: SampleConfig) -> dict:
    """Print and return {prompt: {checkpoint: [text, ...]}}, or with top_tokens {prompt: {checkpoint:
    [(token, probability), ...]}}; with write {checkpoint: counts}, with chat {checkpoint: turns}."""
    device = distributed.setup(cfg.device).device
    dtype, _ = distributed.choose_dtype(cfg.dtype, device)
    models = {path: load(path, cfg.tokenizer_from, device, dtype) for path in cfg.checkpoints}
    generator = torch.Generator(device).manual_seed(cfg.seed)
    if cfg.write:
        return {path: write_documents(path, *both, cfg, generator) for path, both in models.items()}
    if cfg.chat:
        return {path: chat(path, *both, cfg, generator) for path, both in models.items()}
    results = {}
    for prompt in read_prompts(cfg):
        found = results[prompt] = {path: [] for path in models}
        for path, (model, tok) in models.items():
            ids = torch.tensor([[tok.eot, *tok.encode(prompt)]], device=device)  # (1, T), a new document
            if cfg.top_tokens:
                found[path] = next_tokens(model, tok, ids, cfg.top_tokens)
                continue
            for i in range(cfg.num_samples):
                print(f"\n--- {path}" + f", sample {i + 1}" * (cfg.num_samples > 1) + f"\n{prompt}", end="")
                found[path].append("")
                for piece in stream(model, tok, ids, cfg, generator, cfg.max_new_tokens, [tok.eot]):
                    print(piece, end="", flush=True)
                    found[path][-1] += piece
                print()
        if cfg.top_tokens:
            print(f"\n{prompt!r}\n{next_token_table(found)}")
    return results


if __name__ == "__main__":
    launch(main, SampleConfig)
