"""Checks of a notebook's parameters, because papermill only warns about a name that it does not know; settings of a run.

A notebook calls `check` in the cell behind its parameters, with a rule for each:

    p = check(globals(), steps=whole(1), lar_weight=number(0), smoke=flag(), out_dir=text())

A misspelt name or a bad value raises a ValueError that names it, before any work is done.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

Rule = Callable[[Any], Any]
_PLAIN = (bool, int, float, str, list, dict, tuple, type(None))
_IPYTHON = {"In", "Out", "exit", "quit"}


def whole(least: int) -> Rule:
    """A whole number of at least `least`."""

    def rule(value):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"must be a whole number of at least {least}")
        return value

    return rule


def number(least: float, above: bool = False) -> Rule:
    """A number of at least `least`, or above it."""

    def rule(value):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not (value > least or (value == least and not above))
        ):
            raise ValueError(f"must be a number {'above' if above else 'of at least'} {least}")
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
    """None, or what `rule` allows: for a parameter that something else decides where nothing is given."""

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
            raise ValueError(f"must be one of {', '.join(map(repr, choices))}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return value

    return rule


def _parameters_cell(cells: Sequence[str], rules: Collection[str]) -> set[str]:
    """What the parameters cell assigns: of the cells that were run, it is the last that gives a parameter with its type."""
    for source in reversed(cells):
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a command of IPython's
            continue
        typed = {s.target.id for s in body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}
        if not typed.isdisjoint(rules):
            return typed | {t.id for s in body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)}
    return set()


class Parameters(SimpleNamespace):
    """What `check` returns: a parameter an attribute."""


def check(namespace: Mapping[str, Any], **rules: Rule) -> Parameters:
    """The checked parameters as attributes. Call it with `globals()` right behind the parameters cell.

    Raises ValueError naming the parameter: for a plain value in the namespace that is no parameter (a misspelt name),
    for a parameter that is missing, or for a value against its rule. Where a notebook's cells are run again in the same
    kernel, the namespace holds the notebook's own values too; then only the names in the parameters cell are looked at.
    """
    again = any(isinstance(value, Parameters) for value in namespace.values())
    suspects = _parameters_cell(namespace.get("In", ()), rules) if again else namespace
    for name, value in namespace.items():
        if name in suspects and name not in {*rules, *_IPYTHON} and not name.startswith("_") and isinstance(value, _PLAIN):
            near = difflib.get_close_matches(name, rules, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the parameters are {', '.join(rules)}"
            raise ValueError(f"unknown parameter {name!r}; {hint}")
    checked = {}
    for name, rule in rules.items():
        if name not in namespace:
            raise ValueError(f"parameter {name!r} is missing from the parameters cell")
        try:
            checked[name] = rule(namespace[name])
        except ValueError as error:
            raise ValueError(f"parameter {name!r} {error}, not {namespace[name]!r}") from None
    return Parameters(**checked)


def add_settings(parser: argparse.ArgumentParser, kind: type, names: Collection[str] = (), **choices: Sequence[str]) -> None:
    """Options for fields of the dataclass `kind`: `num_tokens` is `--num-tokens`. `settings.setting` gives them their help.

    names: of the fields, if not all that are numbers or strings; choices: by name, the values that one of them takes.
    """
    types = {"int": int, "float": float, "str": str, "int | None": int, "float | None": float}
    for f in fields(kind):
        if not f.init or (f.name not in names if names else f.type not in types):
            continue
        how: dict[str, Any] = {"help": f.metadata["help"], "default": f.default}
        how |= {"action": "store_true"} if f.type == "bool" else {"type": types[f.type], "choices": choices.get(f.name)}
        parser.add_argument("--" + f.name.replace("_", "-"), **how)


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            return whole(least)(int(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}") from None

    return read


def settings_from(args: argparse.Namespace, kind: type) -> Any:
    """The dataclass `kind` with what was given for the options of `add_settings`. Raises what it raises."""
    return kind(**{f.name: getattr(args, f.name) for f in fields(kind) if f.init and hasattr(args, f.name)})


def command_line(name: str, settings: Any) -> str:
    """The line that runs a command with these settings (of a dataclass), as far as they are not the defaults."""
    changed = {f.name: getattr(settings, f.name) for f in fields(settings) if f.init and getattr(settings, f.name) != f.default}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in changed.items()]
    return shlex.join(["python", "-m", "isa_lite", name, *options])


def check_whole(settings: Any, **least: int) -> None:
    """Raises ValueError, naming the field, where one of `settings` is not a whole number of at least that much."""
    for name, smallest in least.items():
        value = getattr(settings, name)
        if type(value) is not int or value < smallest:
            raise ValueError(f"{name} must be a whole number of at least {smallest}, not {value!r}")
