"""A class or a function of yours, by the name FILE.py:NAME: a mapping, a loss, a method.

The file is run, with all that your own account may do. So only what the caller names is loaded,
never what a saved file names. Ours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from isa_lite.support.parameters import Rule, text


def is_spec(name: str) -> bool:
    """Whether this is a name of the form FILE.py:NAME."""
    return name.rpartition(":")[0].endswith(".py")


def either(*names: str) -> Rule:
    """One of these names, or FILE.py:NAME: a rule for parameters and options."""

    def rule(value: object) -> str:
        if isinstance(value, str) and is_spec(value):
            return value
        if not names:
            raise ValueError("must be FILE.py:NAME")
        try:
            return text(*names)(value)
        except ValueError as error:
            raise ValueError(f"{error}, or FILE.py:NAME of your own") from None

    return rule


def load(spec: str, what: str) -> Callable:
    """What stands under NAME in the file of `spec`, FILE.py:NAME. The file is run at every call.

    what: "mapping", "loss", ..., for the messages. Raises ValueError, in one line, for another
    form, where there is no such file or name, where the file fails, and for what cannot be called.
    """
    if not isinstance(spec, str) or not is_spec(spec):
        raise ValueError(f"{what} {spec!r} must be given as FILE.py:NAME")
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{what} {spec!r}: there is no file {file} (seen from {Path.cwd().name}/)")
    private = "_isa_lite_plugin_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    found = importlib.util.spec_from_file_location(private, path)
    # where dataclasses look up the types of their fields
    sys.modules[private] = module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[private]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what} {spec!r}: {file} fails with {said}") from error
    if not hasattr(module, name):
        raise ValueError(f"{what} {spec!r}: {file} defines no {name!r}")
    if not callable(getattr(module, name)):
        raise ValueError(f"{what} {spec!r}: {name} is no class or function; it cannot be called")
    return getattr(module, name)


def find(name: str, table: Mapping[str, Any], what: str) -> Any:
    """What stands in `table` under this name, or what `load` makes of FILE.py:NAME. Raises
    ValueError for another name.
    """
    if name in table:
        return table[name]
    if is_spec(name):
        return load(name, what)
    raise ValueError(
        f"unknown {what} {name!r}; there are {', '.join(map(repr, table))}, and FILE.py:NAME for"
        " one of your own"
    )


class Loss:
    """A loss of your own, a callable or FILE.py:NAME, with the `name` that a run knows it by.

    It is called with queries B x E, the large tower's embeddings of the same images B x E and of
    others M x E, and pseudo-words B x L x D, and gives a scalar tensor, which is to fall.
    """

    def __init__(self, given: Callable | str):
        self.call = load(given, "loss") if isinstance(given, str) else given
        if not callable(self.call):
            raise ValueError(f"loss must be a function, or FILE.py:NAME, not {given!r}")
        kind = given if hasattr(given, "__qualname__") else type(given)
        own = given.name if isinstance(given, Loss) else f"{kind.__module__}:{kind.__qualname__}"
        self.name = given if isinstance(given, str) else own

    def __call__(self, *given: Tensor) -> Tensor:
        value = self.call(*given)
        if getattr(value, "shape", None) != () or not getattr(value, "requires_grad", False):
            raise ValueError(f"loss {self.name!r} must give a scalar tensor with a gradient")
        return value
