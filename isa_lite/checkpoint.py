"""The state of a training run on disk: tensors in one safetensors file, everything else in its header as JSON.

Nothing is unpickled. A file is written under a temporary name and then renamed, so a run that is killed at any
moment leaves either the old state or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping | None = None) -> None:
    """Tensors, and a JSON-able `info`, to `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, {"info": json.dumps(info or {})})
    os.replace(part, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Bytes to `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Text to `path` in one step, as UTF-8."""
    write_bytes(path, text.encode())


def read_info(path: Path) -> dict:
    """The `info` that `write_tensors` wrote; no tensor is read."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("info", "{}"))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `write_tensors` wrote: the tensors by name, and `info`."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, read_info(path)


def read_shard(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a finished shard; None where there is none, or one damaged, as a loss of power may leave it."""
    try:
        return read_tensors(path)[0]
    except (FileNotFoundError, SafetensorError):
        return None


def _optimizer_tensors(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor, str]]:
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            for slot in optimizer.state.get(parameter, {}):
                yield f"optimizer.{name}.{key}.{slot}", parameter, slot


def save_run(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, info: Mapping) -> None:
    """Modules by name, their optimizer's moments, and `info` (the step, the settings, the history so far)."""
    tensors = {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    tensors |= {key: torch.as_tensor(optimizer.state[p][slot]) for key, p, slot in _optimizer_tensors(modules, optimizer)}
    write_tensors(path, tensors, info)


def resume_run(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, identity: Mapping) -> dict | None:
    """`load_run`, if there is a run in `path`; its `info` must hold `identity`, by which runs are told apart.

    Raises ValueError, before anything is loaded, that names what is different; returns None where there is no run.
    """
    if not path.is_file():
        return None
    found, wanted = read_info(path)["identity"], json.loads(json.dumps(identity))  # tuples come back as lists
    if found != wanted:
        changed = [k for k in wanted if found.get(k) != wanted[k]]
        raise ValueError(f"{path} belongs to another run (different {', '.join(changed)}); delete it or choose another file")
    return load_run(path, modules, optimizer)


def load_run(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict:
    """Put back what `save_run` wrote; returns its `info`."""
    tensors, info = read_tensors(path)
    for name, module in modules.items():
        module.load_state_dict({k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")})
        for key, parameter in module.named_parameters():
            prefix = f"optimizer.{name}.{key}."
            slots = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if slots:
                optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in slots.items()}
    return info
