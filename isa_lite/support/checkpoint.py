"""Files that a run writes and reads: its state, what it caches, its results.

A file is written under a temporary name and then takes its own, so a process that is killed at any
moment leaves either the old file or the new one. The state of a run is one safetensors file: the
tensors, and everything else as JSON in its header. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from isa_lite.support.parameters import short

if TYPE_CHECKING:  # many commands write text alone, and need not wait for torch
    import numpy as np
    import torch
    from torch import Tensor, nn

_PART = ".isa-lite-{}.part"  # a temporary name; a point first, so that nobody takes it for a result
_OLD = 3600  # seconds after which a file under such a name was left by a process that was killed


def write_bytes(path: Path, content: bytes) -> None:
    """Bytes to `path`: all, or OSError and the old file stays. Several processes may write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(_PART.format("*")):
        with suppress(OSError):  # another process may be clearing up, too
            if time.time() - left.stat().st_mtime > _OLD:
                left.unlink()
    part = path.with_name(_PART.format(secrets.token_hex(8)))
    try:
        # x: a file of our own, never one that a link leads to; its mode follows the umask
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            # the content is on the disk before the name is: a loss of power leaves one or the other
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:  # Ctrl-C, too
        part.unlink(missing_ok=True)
        # a full disk does not say what it was for
        if isinstance(error, OSError) and error.filename in (None, str(part), part):
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str) -> None:
    """Text to `path` in one step, as UTF-8."""
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping | None = None) -> None:
    """Tensors, and a JSON-able `info`, to `path` in one step.

    They are in memory twice meanwhile: safetensors' own writer lets nobody else read the file.
    """
    from safetensors.torch import save

    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_bytes(path, save(held, {"info": json.dumps(info or {})}))


class Between(NamedTuple):
    """The shape of a number, see `misfit`."""

    least: float
    most: float


def misfit(found: object, shape: object, where: str = "it") -> str:
    """What keeps a JSON value from having a shape, in words; "" if nothing. NaN is no number here.

    A shape is a type (int: of 64 bits; object: anything); a `Between`; a dict of keys with their
    shapes, which must be there (others may, too; the key `str` is all the others); a list of one
    shape, for any number of values, or [shape, ...] for at least one; or a tuple of shapes.
    """
    if isinstance(shape, dict):
        if not isinstance(found, dict):
            return f"{where} is {_told(found)}, no object"
        for key, inner in shape.items():
            for name in [key] if key is not str else sorted(set(found) - set(shape)):
                if name not in found:
                    return f"{where} has no {name!r}"
                inside = name if where == "it" else f"{where}.{name}"
                if fault := misfit(found[name], inner, inside):
                    return fault
        return ""
    if isinstance(shape, (list, tuple)) and not isinstance(shape, Between):
        fixed = isinstance(shape, tuple)
        if not isinstance(found, list) or fixed and len(found) != len(shape):
            return f"{where} is {_told(found)}, no list" + f" of {len(shape)}" * fixed
        if len(found) < len(shape) - 1:
            return f"{where} is empty"
        inner = shape if fixed else shape[:1] * len(found)
        pairs = enumerate(zip(found, inner, strict=True))
        faults = (misfit(value, kind, f"{where}[{i}]") for i, (value, kind) in pairs)
        return next(filter(None, faults), "")
    if isinstance(shape, Between) or shape in (int, float):
        least, most = (-(2.0**63), 2.0**63) if shape is int else (-1e300, 1e300)
        bound = ""
        if isinstance(shape, Between):
            (least, most), bound = shape, f" from {shape.least:g} to {shape.most:g}"
        number = isinstance(found, int if shape is int else (int, float))
        number &= not (isinstance(found, int) and abs(found) >= 2**63)  # NumPy has none as long
        if not number or isinstance(found, bool) or not least <= found <= most:
            return f"{where} is {_told(found)}, no {'whole ' if shape is int else ''}number{bound}"
        return ""
    if shape is object or type(found) is shape:
        return ""
    words = {dict: "object", list: "list", str: "text", bool: "true or false"}
    return f"{where} is {_told(found)}, no {words[shape]}"


def _told(found: object) -> str:
    words = {dict: "an object", list: "a list"}
    return words.get(type(found)) or json.dumps(found)[:60]


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def read_json(path: Path, what: str, kind: object = dict) -> Any:
    """The JSON in `path`, a `kind`: dict, list, or any shape of `misfit`.

    `what` it should hold, for the messages: "the settings of a query encoder".

    Raises FileNotFoundError, or ValueError where it is no such JSON. Both name the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; it should hold {what}")
    if not path.is_file():
        raise ValueError(f"{path} is no file; it should hold {what}")
    try:
        # with an editor's mark or without
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise ValueError(f"{path} should hold {what}, but is not JSON: {error}") from error
    if fault := misfit(found, kind):
        raise ValueError(f"{path} should hold {what}, but {fault}")
    return found


def read_info(path: Path) -> dict:
    """The `info` of `write_tensors` alone. Raises FileNotFoundError or ValueError."""
    return _read(path, with_tensors=False)[1]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `write_tensors` wrote: tensors, `info`. Raises FileNotFoundError or ValueError."""
    return _read(path, with_tensors=True)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """`read_tensors` for NumPy, without PyTorch."""
    return _read(path, with_tensors=True, library="np")


def _read(path: Path, with_tensors: bool, library: str = "pt") -> tuple[dict, dict]:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no file; a safetensors file is wanted")
    try:
        with safe_open(path, library) as file:
            info = json.loads((file.metadata() or {}).get("info", "{}"))
            # copies: what safe_open gives is mapped, and Windows replaces no such file
            names = file.keys() if with_tensors else ()
            tensors = {key: deepcopy(file.get_tensor(key)) for key in names}
    except (SafetensorError, ValueError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} is damaged: its header's info is no JSON object")
    return tensors, info


def sound(value: Tensor) -> bool:
    """Whether these can be weights: numbers, none at the end of what float32 holds."""
    # False for nan, too
    return not value.is_floating_point() or bool((value.float().abs() < 1e30).all())


def check_weights(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError, naming `what` and the tensor, unless all of `wanted` are there, alike."""
    if strange := sorted(set(wanted) ^ set(tensors)):
        how = "missing" if strange[0] in wanted else "unknown"
        raise ValueError(f"{what} holds other weights: {strange[0]} is {how}")
    for key, value in tensors.items():
        other, floats = wanted[key], value.is_floating_point()
        if value.shape != other.shape or floats != other.is_floating_point():
            there, here = (
                f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (value, other)
            )
            raise ValueError(f"{what} holds other weights: {key} is {there}, not {here}")
        if not sound(value):
            raise ValueError(f"{what} is damaged: {key} holds values that are no numbers")


def read_shard(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a finished shard; None for none, or one that a loss of power damaged."""
    try:
        return read_tensors(path)[0]
    except (FileNotFoundError, ValueError):
        return None


def _optimizer_tensors(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> Iterable[tuple[str, Tensor, str]]:
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            for slot in optimizer.state.get(parameter, {}):
                yield f"optimizer.{name}.{key}.{slot}", parameter, slot


def save_run(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, info: Mapping
) -> None:
    """Modules by name, their optimizer's moments, and `info` (identity, step, history so far)."""
    import torch

    tensors = {}
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for key, parameter, slot in _optimizer_tensors(modules, optimizer):
        tensors[key] = torch.as_tensor(optimizer.state[parameter][slot])
    write_tensors(path, tensors, {"threads": torch.get_num_threads()} | dict(info))


def resume_run(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    identity: Mapping,
    steps: int,
) -> dict | None:
    """Put back what `save_run` wrote; returns its `info`, or None where there is no run.

    Its `info` must hold `identity`, by which runs are told apart, and a "step" of at most `steps`.
    Raises ValueError, before anything is loaded, that names each setting that is different, with
    both values, or the file, where it is damaged. Warns of another number of threads than it had.
    """
    import torch

    if not path.exists():
        return None
    tensors, info = read_tensors(path)
    # tuples come back as lists
    found, wanted = info.get("identity"), json.loads(json.dumps(identity))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no state of a run; choose another file")
    if changed := list(_differences(found, wanted)):
        fault = f"{path} belongs to another run ({'; '.join(changed)})"
        raise ValueError(f"{fault}; delete it or choose another file")
    if type(info.get("step")) is not int or not 0 <= info["step"] <= steps:
        raise damaged(path, f"its step is {info.get('step')!r}")
    state, moments = _sorted_out(path, tensors, modules)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    for parameter, slots in moments.items():
        # In the parameter's own order of memory: AdamW's fused step reads both as they lie.
        for slot, value in slots.items():
            if slot != "step":
                slots[slot] = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter] = slots
    if (threads := info.get("threads")) != torch.get_num_threads():
        now = torch.get_num_threads()
        said = f"{path} was made with {threads} threads, and this process has {now}"
        said += " (OMP_NUM_THREADS sets them): the result will differ a little from that of a run"
        warnings.warn(f"{said} that was never interrupted", stacklevel=3)
    return info


def damaged(path: Path, why: str) -> ValueError:
    """The error for a state that is not whole."""
    return ValueError(f"{path} is damaged: {why}; delete it, and the run starts anew")


def _differences(found: object, wanted: object, name: str = "") -> Iterable[str]:
    """Where two sets of settings differ, as "name: theirs there, ours here"."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys((*wanted, *found)):
            inside = f"{name}.{key}" if name else key
            yield from _differences(found.get(key), wanted.get(key), inside)
    elif found != wanted:
        yield f"{name}: {short(found)} there, {short(wanted)} here"


def _sorted_out(
    path: Path, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> tuple[dict, dict]:
    """A state's tensors, by module and by parameter. Raises ValueError naming a misfit."""
    left, state, moments = dict(tensors), {}, {}
    for key, value in tensors.items():
        if not sound(value):
            raise damaged(path, f"{key} holds values that are no numbers")
    for name, module in modules.items():
        own = module.state_dict()
        state[name] = {key: left.pop(f"{name}.{key}", None) for key in own}
        for key, value in own.items():
            found = state[name][key]
            if found is None or found.shape != value.shape or found.dtype != value.dtype:
                raise damaged(path, f"{name}.{key} is missing, or of another shape or type")
        for key, parameter in module.named_parameters():
            prefix = f"optimizer.{name}.{key}."
            slots = {k.removeprefix(prefix): left.pop(k) for k in tensors if k.startswith(prefix)}
            if any(value.shape not in (parameter.shape, ()) for value in slots.values()):
                raise damaged(path, f"the moments of {name}.{key} are of another shape")
            if slots:
                moments[parameter] = slots
    if left:
        raise damaged(path, f"nobody knows its {next(iter(left))}")
    return state, moments
