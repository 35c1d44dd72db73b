"""Configuration: a dataclass's defaults, then config files, then flags.

    python train.py config/exp6.py --lr=3e-4 --compile

A config file is plain Python, run as trusted code: it may compute, loop and import another config
(`from config.exp5 import *`). Every name it leaves defined must be an option, except modules, functions,
classes and names that begin with `_`. Nothing is silently ignored: one error reports all problems.
"""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import json
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
        super().__init__("\n  - ".join([f"{count} in the configuration, nothing was run", *problems]))


@dataclasses.dataclass
class Config:
    """Base of every script's config. A subclass lists one option per line with its default and a trailing
    comment, which --help prints; its `problems()` returns the contradictions."""

    POSITIONAL: typing.ClassVar[str] = ""  # the option that takes bare arguments other than config files
    MAY_CHANGE: typing.ClassVar[set[str]] = set()  # options of this class that may change in a continued run
    given: typing.ClassVar[frozenset[str]] = frozenset()  # options named in a config file or flag, by load()

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
        """A problem for each option in `names` that is below `least`, or has an item below it."""
        said = "must not be negative" if least == 0 else f"must be at least {least}"
        values = {n: getattr(self, n) for n in names}
        return [f"{n} {said}, got {v}" for n, v in values.items()
                if min(v if isinstance(v, tuple) else (v,), default=least) < least]

    def sets(self, name: str) -> bool:
        """Whether the user set this option: in a config file or flag, or otherwise than its default."""
        return name in self.given or getattr(self, name) != type(self).__dataclass_fields__[name].default

    @classmethod
    def may_change(cls) -> set[str]:
        return set().union(*(vars(c).get("MAY_CHANGE", ()) for c in cls.__mro__))

    def differences(self, saved: dict, free: set[str] | None = None) -> list[str]:
        """'option: saved -> now' for each option that differs and is not in `free` (default: may_change()).
        An option that did not exist when `saved` was written had its default."""
        free = self.may_change() if free is None else free
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        saved, now = (json.loads(json.dumps(defaults | d))  # as saved: JSON turns tuples into lists
                      for d in (saved, dataclasses.asdict(self)))
        return [f"{k}: {saved[k]} -> {now.get(k, '(no longer an option)')}"
                for k in sorted(saved) if k not in free and saved[k] != now.get(k)]


def option_types(cls) -> dict[str, type]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def is_switch(kind) -> bool:
    """Whether the flag alone means true: bool, or Literal["auto", "true", "false"]."""
    return kind is bool or "true" in typing.get_args(kind)


def did_you_mean(word: str, known, otherwise: str = "") -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else otherwise


def coerce(value, kind, where: str):
    """`value` as `kind` (bool, int, float, str, Literal or tuple[item, ...]), or ValueError. 1e6 passes for
    an int; 0.5, True and "3" do not. Numbers must be finite, integers at most 2^62."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        if isinstance(value, bool) and is_switch(kind):
            value = str(value).lower()
        if value not in args:
            raise ValueError(f"{where}: expected one of {', '.join(args)}; got {value!r}"
                             + did_you_mean(str(value), args))
        return value
    if args:
        if not isinstance(value, (list, tuple)):
            items = "|".join(typing.get_args(args[0])) or args[0].__name__
            raise ValueError(f"{where}: expected a list of {items}, got {value!r}")
        return tuple(coerce(v, args[0], where) for v in value)
    limit = sys.float_info.max if kind is float else 2**62
    if type(value) in (int, float) and not abs(value) <= limit:
        raise ValueError(f"{where}: {value} is not a number that makes sense here")
    if type(value) is kind:
        return value
    if kind is float and type(value) is int or kind is int and type(value) is float and value.is_integer():
        return kind(value)
    type_name = "" if isinstance(value, str) else f" ({type(value).__name__})"
    raise ValueError(f"{where}: expected {kind.__name__}, got {value!r}{type_name}")


def parse(text: str, kind, where: str):
    """A flag's text as a value of `kind`."""
    value = text
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        parts = [text] if item is str else [t.strip() for t in text.split(",") if t.strip()]
        return tuple(parse(t, item, where) for t in parts)
    if kind is bool and text.lower() in ("true", "1", "yes", "false", "0", "no"):
        value = text.lower() in ("true", "1", "yes")
    for number in (float, int) if kind in (int, float) else ():
        with contextlib.suppress(ValueError):
            value = number(text)
    return coerce(value, kind, where)


def unknown(where: str, key: str, kinds) -> str:
    return f"{where}: no option '{key}'" + did_you_mean(key, kinds, "; --help lists them all")


def from_file(path: str, kinds: dict[str, type], problems: list[str]) -> dict:
    """The options that a config file sets; appends what is wrong with it to `problems`."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        others = [os.path.join(folder, n) for n in os.listdir(folder)] if os.path.isdir(folder) else []
        problems.append(f"no config file '{path}'" + did_you_mean(path, others))
        return {}
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__)
                 if f.filename.endswith(os.path.basename(path))]
        line = lines[-1] if lines else getattr(e, "lineno", None) or "?"
        problems.append(f"{path}:{line}: {type(e).__name__}: {e}")
        return {}
    values = {}
    if "question" in kinds and (m := re.search(r"^# Question: (.+)$", open(path).read(), re.MULTILINE)):
        values["question"] = m[1]
    for key, value in names.items():
        if key.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        if key not in kinds:
            problems.append(unknown(path, key, kinds) + " (names of helper variables must begin with '_')")
            continue
        try:
            values[key] = coerce(value, kinds[key], f"{path}: {key}")
        except ValueError as e:
            problems.append(str(e))
    return values


def read_flag(arg: str, argv: list[str], kinds: dict[str, type]) -> tuple[str, object]:
    """(option, value) of the flag `arg`, whose value may be the next of `argv`; or ValueError."""
    key, eq, text = arg[2:].partition("=")
    key = key.replace("-", "_")
    follows = not eq and argv and not argv[0].startswith("--")
    if key not in kinds:
        if follows and not argv[0].endswith(".py"):
            argv.pop(0)
        raise ValueError(unknown("flag", key, kinds))
    if is_switch(kinds[key]) and not eq:
        known = ("true", "false", *typing.get_args(kinds[key]))
        text = argv.pop(0) if follows and argv[0].lower() in known else "true"
    elif follows:
        text = argv.pop(0)
    elif not eq:
        raise ValueError(f"flag --{key}: no value given")
    return key, parse(text, kinds[key], f"flag --{key}")


def load(cls, argv: list[str] | None = None, base: dict | None = None):
    """The config of type `cls`: its defaults (or the values in `base`), then the config files and then the
    flags in `argv` (default: sys.argv). ConfigError with every problem found.

    Flags are --key=value or --key value; a bool alone (--compile) is true; a list of strings may be given by
    repeating the flag; dashes and underscores are interchangeable.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    kinds, problems = option_types(cls), []
    values, flags, bare = {}, {}, []
    while argv:
        arg = argv.pop(0)
        if arg.startswith("--"):
            try:
                key, value = read_flag(arg, argv, kinds)
                flags[key] = flags[key] + value if key in flags and kinds[key] == tuple[str, ...] else value
            except ValueError as e:
                problems.append(str(e))
        elif arg.endswith(".py"):
            values.update(from_file(arg, kinds, problems))
            if "name" in kinds and "name" not in (base or {}):
                values.setdefault("name", os.path.basename(arg)[:-3])
        elif cls.POSITIONAL and (not arg.startswith("-") or arg == "-"):
            bare.append(arg)
        else:
            problems.append(f"unexpected argument '{arg}' (config files end in .py, flags begin with --)")
    if bare:
        is_list = typing.get_origin(kinds[cls.POSITIONAL]) is tuple
        if len(bare) > 1 and not is_list:
            problems.append(f"expected one {cls.POSITIONAL}, got {bare}")
        flags[cls.POSITIONAL] = tuple(bare) if is_list else bare[0]
    try:
        cfg = cls(**(base or {}) | values | flags)
    except ConfigError as e:
        problems += e.problems
    if problems:
        raise ConfigError(problems)
    cfg.given = frozenset(values | flags)
    return cfg


def help_text(cls) -> str:
    """The script's docstring, then every option with its default and comment, under the comment lines that
    head each group. An option that a subclass redefines is listed there only."""
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
    """How every script starts: load the config (of class `cls`, or of the class that cls() returns), call
    main(cfg), and print mistakes that a user can fix without a traceback."""
    try:
        main(load(cls if isinstance(cls, type) else cls()))
        return
    except UserError as e:
        text, code = f"error: {e}", 2
    except KeyboardInterrupt:
        text, code = "interrupted; what was saved before is intact", 130
    except BrokenPipeError:  # as by `| head`
        sys.stdout = open(os.devnull, "w")
        text, code = "", 141
    except OSError as e:
        text, code = f"error: {e.filename or 'a file'}: {e.strerror or e}", 2
    except (MemoryError, RuntimeError, ValueError) as e:  # torch and numpy have no types for these
        if "could not create a primitive" in str(e):
            text = "error: this CPU has no kernel for a layer of this model in 16 bits; use --dtype=fp32"
        elif isinstance(e, MemoryError) or re.search(
                "(out of|enough|allocate) memory|size calculation overflowed|array is too big", str(e)):
            text = f"error: out of memory ({str(e):.150}); use a smaller --micro_batch_size or model"
        else:
            raise
        code = 2
    print(text, file=sys.stderr)
    sys.exit(code)
