"""A class or a function of yours, by the name FILE.py:NAME: a mapping, a loss, a method.

The file is run, with all that your own account may do. So only what the caller names is loaded,
never what a saved file names. Ours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path


def is_spec(name: str) -> bool:
    """Whether this is a name of the form FILE.py:NAME."""
    return name.rpartition(":")[0].endswith(".py")


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
