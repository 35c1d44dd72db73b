"""Configuration: a dataclass's defaults, then config files, then flags, all through one door.

    python train.py config/exp6.py --lr=3e-4 --compile

A config file is plain Python, read as trusted code: it may compute, loop and import another config
(`from config.exp5 import *`). Every name it leaves behind must be an option, except modules, functions,
classes and names that begin with `_`. Nothing is ever ignored: all problems are collected and reported in one
error.
"""
from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import runpy
import sys
import traceback
import types
import typing


class UserError(Exception):
    """A mistake the user can fix: scripts print it without a traceback and exit with code 2."""


class ConfigError(UserError):
    def __init__(self, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        super().__init__(f"{count} in the configuration, nothing was run\n"
                         + "\n".join(f"  - {p}" for p in problems))


@dataclasses.dataclass
class Config:
    """Base of every script's config. Subclasses list one knob per line with its default and a trailing
    comment, which `--help` prints; `problems()` returns what contradicts itself."""

    POSITIONAL: typing.ClassVar[str] = ""  # the field that takes bare arguments which are not config files
    MAY_CHANGE: typing.ClassVar[set[str]] = set()  # options of this class that a continued run may change

    def __post_init__(self):
        problems = []
        for key, kind in option_types(type(self)).items():
            try:
                setattr(self, key, coerce(getattr(self, key), kind, key))
            except ValueError as e:
                problems.append(str(e))
        if problems := problems or self.problems():
            raise ConfigError(problems)
        self.derive()

    def problems(self) -> list[str]:
        return []

    def derive(self) -> None:
        """Fill in what follows from other options."""

    def at_least(self, least: float, *names: str) -> list[str]:
        """Problems of the options among `names` that are below `least`; of a list each item counts."""
        said = "must not be negative" if least == 0 else f"must be at least {least}"
        values = {n: getattr(self, n) for n in names}
        return [f"{n} {said}, got {v}" for n, v in values.items()
                if not all(x >= least for x in (v if isinstance(v, tuple) else (v,)))]

    @classmethod
    def default(cls, name: str):
        return next(f.default for f in dataclasses.fields(cls) if f.name == name)

    @classmethod
    def may_change(cls) -> set[str]:
        return set().union(*(vars(c).get("MAY_CHANGE", ()) for c in cls.__mro__))

    def differences(self, saved: dict, free: set[str] | None = None) -> list[str]:
        """'name: saved -> now' for each option that a continued run must not change: all but may_change(), or
        but `free`. An option that did not exist when `saved` was written had its default value."""
        free = self.may_change() if free is None else free
        now, defaults, saved = (json.loads(json.dumps(d)) for d in (  # as saved: tuples are lists in JSON
            dataclasses.asdict(self), {f.name: f.default for f in dataclasses.fields(self)}, saved))
        saved = defaults | saved
        return [f"{k}: {saved[k]} -> {now.get(k, '(no such option any more)')}"
                for k in sorted(saved) if k not in free and saved[k] != now.get(k)]


def option_types(cls) -> dict[str, type]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def is_switch(kind) -> bool:
    """Whether True, False and a flag alone make sense for it: bool, or Literal["auto", "true", "false"]."""
    return kind is bool or "true" in typing.get_args(kind)


def coerce(value, kind, where: str):
    """The value as `kind` (bool, int, float, str, Literal or tuple[item, ...]), or ValueError. 1e6 is an int
    where an int is wanted; 0.5, True and "3" are not. No number is nan, infinite, or beyond 2^62."""
    if typing.get_origin(kind) is typing.Literal:
        if isinstance(value, bool) and is_switch(kind):
            value = str(value).lower()
        if value not in typing.get_args(kind):
            near = difflib.get_close_matches(str(value), typing.get_args(kind), n=1)
            raise ValueError(f"{where}: expected one of {', '.join(typing.get_args(kind))}; got {value!r}"
                             + (f"; did you mean '{near[0]}'?" if near else ""))
        return value
    item = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
    if item:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list of {kind_name(item)}, got {value!r}")
        return tuple(coerce(v, item, where) for v in value)
    if type(value) in (int, float) and not (abs(value) <= 2**62 or kind is float and math.isfinite(value)):
        raise ValueError(f"{where}: {value} is not a number that makes sense here")
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    raise ValueError(f"{where}: expected {kind.__name__}, got {value!r} ({type(value).__name__})")


def kind_name(kind) -> str:
    return "|".join(typing.get_args(kind)) or kind.__name__


def parse(text: str, kind, where: str):
    """A flag's text as a value of `kind`."""
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        parts = [text] if item is str else [t.strip() for t in text.split(",") if t.strip()]
        return tuple(parse(t, item, where) for t in parts)
    if kind is bool and text.lower() in ("true", "1", "yes", "false", "0", "no"):
        return text.lower() in ("true", "1", "yes")
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return coerce(text, kind, where)
    number = as_number(text)
    if kind is float and number is not None or kind is int and number is not None and number % 1 == 0:
        return coerce(number, kind, where)
    raise ValueError(f"{where}: expected {kind.__name__}, got '{text}'")


def as_number(text: str) -> int | float | None:
    try:
        return int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else float(text)
    except ValueError:
        return None


def unknown(where: str, key: str, kinds) -> str:
    near = difflib.get_close_matches(key, kinds, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "; --help lists them all"
    return f"{where}: no option '{key}'{hint}"


def from_file(path: str, kinds: dict[str, type], problems: list[str]) -> dict:
    """The options that a config file sets. Adds to `problems` what it cannot take."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        others = [os.path.join(folder, n) for n in os.listdir(folder)] if os.path.isdir(folder) else []
        near = difflib.get_close_matches(path, others, n=1)
        problems.append(f"no config file '{path}'" + (f"; did you mean '{near[0]}'?" if near else ""))
        return {}
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__)
                  if f.filename.endswith(os.path.basename(path))]
        line = f":{frames[-1].lineno}" if frames else f":{getattr(e, 'lineno', None) or '?'}"
        problems.append(f"{path}{line}: {type(e).__name__}: {e}")
        return {}
    values = {}
    if "question" in kinds and (m := re.search(r"^# Question: (.+)$", open(path).read(), re.MULTILINE)):
        values["question"] = m[1]
    for key, value in names.items():
        if key.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        if key not in kinds:
            problems.append(unknown(path, key, kinds) + " (a helper's name begins with '_')")
            continue
        try:
            values[key] = coerce(value, kinds[key], f"{path}: {key}")
        except ValueError as e:
            problems.append(str(e))
    return values


def load(cls, argv: list[str] | None = None, base: dict | None = None):
    """cfg of type `cls` from its defaults (or the values in `base`), then the config files, then the flags of
    `argv` (default: sys.argv).

    Flags are --key=value or --key value; a bool alone (--compile) is true; a flag for a list of strings may
    be repeated; dashes and underscores are the same. Raises ConfigError with every problem found.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    kinds, problems = option_types(cls), []
    values, flags, bare = dict(base or {}), {}, []
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("--"):
            if arg.endswith(".py"):
                values.update(from_file(arg, kinds, problems))
                if "name" in kinds:
                    values.setdefault("name", os.path.basename(arg)[:-3])
            elif cls.POSITIONAL and (not arg.startswith("-") or arg == "-"):
                bare.append(arg)
            else:
                problems.append(f"unexpected argument '{arg}' (config files end in .py, flags begin with --)")
            continue
        key, eq, text = arg[2:].partition("=")
        key = key.replace("-", "_")
        if key not in kinds:
            problems.append(unknown("flag", key, kinds))
            if not eq and argv and not argv[0].startswith("--") and not argv[0].endswith(".py"):
                argv.pop(0)
            continue
        if not eq:
            follows = argv and not argv[0].startswith("--")
            if is_switch(kinds[key]):
                known = ("true", "false", *typing.get_args(kinds[key]))
                text = argv.pop(0) if follows and argv[0].lower() in known else "true"
            elif follows:
                text = argv.pop(0)
            else:
                problems.append(f"flag --{key}: no value given")
                continue
        try:
            value = parse(text, kinds[key], f"flag --{key}")
            flags[key] = flags[key] + value if key in flags and kinds[key] == tuple[str, ...] else value
        except ValueError as e:
            problems.append(str(e))
    if bare:
        is_list = typing.get_origin(kinds[cls.POSITIONAL]) is tuple
        if len(bare) > 1 and not is_list:
            problems.append(f"expected one {cls.POSITIONAL}, got {bare}")
        flags[cls.POSITIONAL] = tuple(bare) if is_list else bare[0]
    try:
        cfg = cls(**{**values, **flags})
    except ConfigError as e:
        raise ConfigError(problems + e.problems) from None
    if problems:
        raise ConfigError(problems)
    return cfg


def help_text(cls) -> str:
    """The script's docstring, then every option with its default and comment, grouped by the comments
    between. An option that a class redefines stands there alone."""
    doc, seen, groups = sys.modules[cls.__module__].__doc__ or "", set(), []
    for c in cls.__mro__:
        if c is Config or not vars(c).get("__annotations__"):
            continue
        lines = []
        for line in inspect.getsource(c).splitlines():
            if m := re.match(r"    # (.+)", line):
                lines += ["", f"  {m[1]}"]
            elif m := re.match(r"    (\w+): ([^=#]+?) = (.*?)(?:  # (.*))?$", line):
                if "ClassVar" not in m[2] and m[1] not in seen:
                    lines.append(f"    --{m[1] + '=' + m[3].strip():<34} {m[4] or ''}".rstrip())
        seen |= set(c.__annotations__)
        groups.insert(0, lines)
    return "\n".join([doc.strip(), "", "options (config file or --name=value):", *sum(groups, [])])


def launch(main, cls) -> None:
    """What every script ends with: load the config (of the class cls, or that cls() returns), call main(cfg),
    and print what a user can fix without a traceback."""
    try:
        main(load(cls if isinstance(cls, type) else cls()))
        return
    except UserError as e:
        text, code = f"error: {e}", 2
    except KeyboardInterrupt:
        text, code = "interrupted: all that was saved before is whole", 130
    except BrokenPipeError:  # of `| head`
        sys.stdout = open(os.devnull, "w")
        text, code = "", 141
    except OSError as e:
        text, code = f"error: {e.filename or 'a file'}: {e.strerror or e}", 2
    except (MemoryError, RuntimeError, ValueError) as e:  # torch and numpy have no error of their own for it
        if not isinstance(e, MemoryError) and not re.search(
                "(out of|enough|allocate) memory|size calculation overflowed|array is too big", str(e)):
            raise
        text, code = f"error: out of memory ({str(e):.150}); use a smaller --micro_batch_size or model", 2
    print(text, file=sys.stderr)
    sys.exit(code)
