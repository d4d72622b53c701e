"""Checks of a notebook's parameters (papermill only warns of unknown names); commands' options.

A notebook calls `check` in the cell behind its parameters, with a rule for each:

    p = check(globals(), steps=whole(1), lar_weight=number(0), smoke=flag(), out_dir=folder(),
    device=device_name())
    with naming("vl_model"):
        vl = load_vl_model(p.vl_model)

A misspelt name or a bad value raises a ValueError that names it, before any work is done. Nothing
here imports PyTorch, unless a device other than cpu is to be looked at.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import math
import numbers
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Rule = Callable[[Any], Any]
_PLAIN = (bool, int, float, str, list, dict, tuple, type(None))
_IPYTHON = {"In", "Out", "exit", "quit"}
# about what one rendered scene takes in memory, with its picture and what is computed of it
_SCENE_BYTES = 50_000


def whole(least: int, most: int | None = None, each: int = 0, multiple: int = 1) -> Rule:
    """A whole number of at least `least` and at most `most`, a multiple of `multiple`.

    each: bytes of memory that one takes; all must fit.
    """

    def rule(value):
        number = isinstance(value, int) and not isinstance(value, bool)
        if not number or value < least or (most is not None and value > most):
            above = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"must be a whole number {above}")
        if value % multiple:
            raise ValueError(f"must be a multiple of {multiple}")
        if each and value * each > memory():
            most_here = memory() // each
            raise ValueError(f"must be at most {most_here}, for which this machine has the memory")
        return value

    return rule


def scene_count(least: int, each: int = 1) -> Rule:
    """A number of scenes, at least `least`, that memory holds. each: scenes made for one."""
    return whole(least, each=each * _SCENE_BYTES)


def number(least: float, above: bool = False, most: float = math.inf) -> Rule:
    """A finite number of at least `least`, or above it, and at most `most`."""

    def rule(value):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = good and math.isfinite(value) and least <= value <= most
        if not good or (above and value == least):
            end = "" if most == math.inf else f" and at most {most:g}"
            raise ValueError(f"must be a number {'above' if above else 'of at least'} {least}{end}")
        return float(value)

    return rule


def flag() -> Rule:
    """True or False; also the words, since papermill's `-p name false` passes a string."""

    def rule(value):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value

    return rule


def optional(rule: Rule) -> Rule:
    """None, or what `rule` allows: for what something else decides where nothing is given."""

    def allowed(value):
        return None if value is None else rule(value)

    return allowed


def text(*choices: str) -> Rule:
    """A string; one of `choices`, where there are any."""

    def rule(value):
        if not isinstance(value, str):
            raise ValueError("must be a string")
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}{hint}")
        return value

    return rule


def folder() -> Rule:
    """The path of a folder to write into, which is there or can be made."""

    def rule(value):
        _check_folder(Path(text()(value)))
        return value

    return rule


def file() -> Rule:
    """The path of a file to write, in a folder that is there or can be made."""

    def rule(value):
        path = Path(text()(value))
        _check_folder(path.parent)
        if path.is_dir():
            raise ValueError("must be the path of a file, and there is a folder of that name")
        return value

    return rule


def _check_folder(path: Path) -> None:
    """Raises ValueError unless one can write into the folder, or make it."""
    for nearest in (path, *path.absolute().parents):
        try:
            os.lstat(nearest)
            break
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # a name that is too long, or that no system takes
            raise ValueError(
                f"must be the path of a folder: {getattr(error, 'strerror', None) or error}"
            ) from None
    if not nearest.is_dir():
        raise ValueError(f"must be the path of a folder, and {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"must be where you may write, and {nearest} cannot be written to")


def path_name() -> Rule:
    """A path, as text or a Path, that this system can have; nothing need be there."""

    def rule(value):
        try:
            if not value or "\0" in os.fsdecode(os.fsencode(value)):
                raise ValueError
        except (TypeError, ValueError):  # UnicodeEncodeError is a ValueError
            raise ValueError("must be a path") from None
        return value

    return rule


def device_name() -> Rule:
    """A device as PyTorch names them, cpu, cuda, cuda:1, mps, ..., that this machine has."""

    def rule(value):
        check_device(text()(value))
        return value

    return rule


def check_texts(texts: object, what: str = "texts") -> list[str]:
    """The texts as a list. Raises ValueError, with `what`, for one alone, none, and no text.

    A text alone would be taken for a list of its letters.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not hasattr(texts, "__getitem__"):
        fault = f"{what} must be a list of texts, not one {type(texts).__name__}"
        raise ValueError(f"{fault}; put a text into a list")
    if len(texts) == 0:
        raise ValueError(f"{what} is empty; give at least one text")
    for i, one in enumerate(texts):
        if not isinstance(one, str):
            raise ValueError(f"{what}[{i}] must be a text, not {one!r}")
    return list(texts)


def check_device(name: str) -> None:
    """Raises ValueError for a device that cannot be used. For cpu PyTorch is not imported."""
    if name == "cpu":
        return
    import torch

    try:
        found = torch.device(name)
        if found.type == "meta":
            raise RuntimeError("it computes nothing")
        if found.type != "cuda":
            torch.empty(0, device=found)
        # asked without starting CUDA in this process
        elif (found.index or 0) >= (count := torch.cuda.device_count()):
            raise RuntimeError(f"CUDA devices here: {count}")
    # no such device, or a build that knows none
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fault = f"device {name!r} cannot be used: {str(error).splitlines()[0]}"
        raise ValueError(f"{fault}; take 'cpu'") from None


def memory() -> float:
    """Bytes of memory of this machine or container; infinite where nothing says."""
    found = [math.inf]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(limit).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no container, or no limit
            continue
    return min(found)


@contextmanager
def naming(*parameters: str) -> Iterator[None]:
    """Inside, an error in what a user gave is raised again with the parameters' names."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        kinds = (FileNotFoundError, ConnectionError, ImportError)
        names = ", ".join(map(repr, parameters))
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        raise kind(f"parameter{'s'[: len(parameters) > 1]} {names}: {error}") from None


def _assigned(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell assigns, and those of them that it gives a type."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a command of IPython's
        return set(), set()
    typed = {s.target for s in body if isinstance(s, ast.AnnAssign)}
    plain = {t for s in body if isinstance(s, ast.Assign) for t in s.targets}
    found, typed = ({t.id for t in ts if isinstance(t, ast.Name)} for ts in (typed | plain, typed))
    return found, typed


def _given(cells: Sequence[str], rules: Collection[str]) -> set[str] | None:
    """What the parameters cell and papermill's behind it assign; None where neither was run.

    Of the cells that were run, it is the last that gives a parameter with its type.
    """
    for at in reversed(range(len(cells))):
        found, typed = _assigned(cells[at])
        if not typed.isdisjoint(rules):
            # as papermill begins
            behind = cells[at + 1 : at + 2]
            injected = [source for source in behind if source.startswith("# Parameters")]
            return found.union(*(_assigned(source)[0] for source in injected))
    return None


def short(value: object) -> str:
    """A value for a message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _obey(rule: Rule, value: Any, name: str) -> Any:
    """What the rule makes of a value. Raises ValueError that begins with `name`."""
    try:
        return rule(value)
    except ValueError as error:
        said = str(error)
        told = said if said.startswith(name) else f"{name} {said}, not {short(value)}"
        raise ValueError(told) from None


def check(namespace: Mapping[str, Any], **rules: Rule) -> SimpleNamespace:
    """The checked parameters as attributes. Call it with `globals()` behind the parameters cell.

    Raises ValueError naming the parameter: for one that the parameters cell, or papermill's behind
    it, gives and that the notebook does not have (a misspelt name), for one that is missing, or for
    a value against its rule. What else is in the namespace (from a startup file of IPython, or from
    the notebook's own cells when they are run again) is not looked at, unless nothing tells which
    cells were run. Nor are the paths that `papermill --inject-paths` adds.
    """
    given = _given(namespace.get("In", ()), rules)
    for name, value in namespace.items():
        if not isinstance(value, _PLAIN) or name in rules or name in _IPYTHON:
            continue
        if not name.startswith(("_", "PAPERMILL_")) and (given is None or name in given):
            near = difflib.get_close_matches(name, rules, n=1)
            names = f"the parameters are {', '.join(rules)}"
            hint = f"did you mean {near[0]!r}?" if near else names
            raise ValueError(f"unknown parameter {name!r}; {hint}")
    checked = {}
    for name, rule in rules.items():
        if name not in namespace:
            raise ValueError(f"parameter {name!r} is missing from the parameters cell")
        checked[name] = _obey(rule, namespace[name], f"parameter {name!r}")
    return SimpleNamespace(**checked)


def option(rule: Rule, kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """The type of a command's option from a rule; what is given is read as `kind` first."""

    def read(given: str):
        try:
            try:
                value = kind(given)
            except ValueError:  # not even a number
                value = given
            return rule(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}, not {given!r}") from None

    return read


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least` and at most `most`."""
    return option(whole(least, most), int)


def output(rule: Rule) -> Callable[[str], Path]:
    """The type of an option that names where results go: `folder()` or `file()`."""
    return lambda given: Path(option(rule)(given))


def add_settings(
    parser: argparse.ArgumentParser, kind: type, names: Collection[str] = (), **choices: Sequence
) -> None:
    """Options for fields of the dataclass `kind`: `num_tokens` is `--num-tokens`.

    names: of the fields, if not all that are numbers, strings, or true by default, which `--no-...`
    switches off;
    choices: by name, the values that one of them takes.
    """
    types = {"int": int, "float": float, "str": str, "int | None": int, "float | None": float}
    for f in fields(kind):
        taken = f.name in names if names else f.type in types or f.default is True
        if not f.init or not taken:
            continue
        how: dict[str, Any] = {"help": f.metadata["help"], "default": f.default}
        if f.type == "bool":
            how["action"] = argparse.BooleanOptionalAction if f.default is True else "store_true"
        else:
            how |= {"type": types[f.type], "choices": choices.get(f.name)}
        parser.add_argument("--" + f.name.replace("_", "-"), **how)


def settings_from(args: argparse.Namespace, kind: type) -> Any:
    """The dataclass `kind` from the options of `add_settings`. Raises what it raises."""
    given = vars(args)
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.init and f.name in given})


def command_line(name: str, settings: Any) -> str:
    """The line that runs a command with a dataclass of settings, without the defaults."""
    changed = {f.name: getattr(settings, f.name) for f in fields(settings) if f.init}
    defaults = {f.name: f.default for f in fields(settings)}
    given = {name: value for name, value in changed.items() if value != defaults[name]}
    options = [f"--{option.replace('_', '-')}={value}" for option, value in given.items()]
    return shlex.join(["python", "-m", "isa_lite", name, *options])


def checked(**rules: Rule) -> Callable[[Callable], Callable]:
    """A decorator: what is given for these parameters of a function must keep their rules.

    Otherwise ValueError names function and parameter. Whole numbers may be NumPy's.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*arguments, **named):
            # TypeError, naming it, for one too many or too few
            given = signature.bind(*arguments, **named)
            for name, rule in rules.items():
                value = given.arguments.get(name, signature.parameters[name].default)
                if isinstance(value, numbers.Integral) and not isinstance(value, bool):
                    value = int(value)
                _obey(rule, value, f"{function.__qualname__}: {name}")
            return function(*arguments, **named)

        return call

    return decorate


def check_settings(settings: Any, **rules: Rule) -> None:
    """Raises ValueError, naming the field, where one of `settings` is against its rule."""
    for name, rule in rules.items():
        _obey(rule, getattr(settings, name), name)
