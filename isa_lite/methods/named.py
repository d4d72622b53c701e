"""Methods by their names: ISA, the baselines, late fusion, and those of your own files."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from isa_lite.methods.baselines import UNTRAINED
from isa_lite.methods.fusion import FUSIONS
from isa_lite.retrieval.queries import Method
from isa_lite.support import plugins
from isa_lite.support.settings import METHODS

#: Those that need nothing but an image and a text.
BASELINES = {name: UNTRAINED[name] for name in METHODS if name in UNTRAINED} | FUSIONS


def own(spec: str) -> Method:
    """The method FILE.py:NAME; of a class, what it makes without arguments. Raises ValueError."""
    found = plugins.load(spec, "method")
    return found() if inspect.isclass(found) else found


def named(names: Sequence[str], isa: Method | None = None) -> dict[str, Method]:
    """Methods by name: isa, one of `BASELINES`, or FILE.py:NAME, whose name is then NAME.

    Raises ValueError for another name, for one that comes twice, and for isa without an encoder.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"methods must be a list of names, not {names!r}")
    known = {"isa": isa} | BASELINES
    found = {}
    for name in names:
        short = name.rpartition(":")[2] if isinstance(name, str) and plugins.is_spec(name) else name
        if short in found:
            raise ValueError(f"the method {short!r} is named twice")
        if short == name and name not in known:
            raise ValueError(
                f"method must be one of {', '.join(map(repr, known))} or FILE.py:NAME, not {name!r}"
            )
        found[short] = known[name] if short == name else own(name)
    if "isa" in found and found["isa"] is None:
        raise ValueError(
            "method 'isa' needs a query encoder (--encoder), the folder that notebook 02 writes"
        )
    return found
