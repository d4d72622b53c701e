"""In which dtype a training multiplies: float32 on a CPU, bfloat16 on a GPU that has it, or yours.

A CPU without instructions for bfloat16 (AVX2 alone, which is most laptops) emulates it, and takes
many times as long. The weights stay float32 in any case, and so does evaluation. Ours.
"""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from isa_lite.support.checkpoint import misfit, read_info
from isa_lite.support.settings import DTYPES, DistillConfig, PretrainConfig, check_dtype

Config = TypeVar("Config", DistillConfig, PretrainConfig)


def training_dtype(wanted: str, device: torch.device | str, recorded: str | None = None) -> str:
    """ "float32" or "bfloat16": `wanted`; for "auto" what the run `recorded`, or the device's.

    An explicit bfloat16 on a CPU is obeyed; where it is slower, a warning gives the ratio.
    """
    check_dtype(wanted)
    device = torch.device(device)
    if wanted == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return recorded or ("bfloat16" if fast else "float32")
    if wanted == "bfloat16" and device.type == "cpu" and (ratio := bfloat16_cost()) > 1:
        fault = f"dtype='bfloat16': a matrix product on this CPU takes {ratio:.1f} times as long as"
        warnings.warn(f"{fault} in float32; 'auto' takes float32", stacklevel=4)
    return wanted


def with_dtype(config: Config, checkpoint: Path | None = None) -> Config:
    """Settings without "auto" as `dtype`: that of the run in `checkpoint`, else the device's."""
    recorded = None
    if checkpoint is not None and checkpoint.is_file():
        info = read_info(checkpoint)
        run = info.get("identity", info)
        if not misfit(run, {"config": {"dtype": str}}):  # damage is named by who resumes
            recorded = run["config"]["dtype"]
            recorded = recorded if recorded in DTYPES[1:] else None
    config = copy(config)  # `replace` would forget the fields that are filled in later
    config.dtype = training_dtype(config.dtype, config.device, recorded)
    return config


def bfloat16_cost(size: int = 256, rounds: int = 5) -> float:
    """How many times float32's time a matrix product takes in bfloat16 on the CPU; medians."""
    medians = []
    for dtype in (torch.bfloat16, torch.float32):
        a, times = torch.ones(size, size, dtype=dtype), []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - began)
        medians.append(median(times[1:]))
    return medians[0] / medians[1]


def mixed(device: torch.device | str, dtype: str) -> AbstractContextManager:
    """Inside, products of a training are computed in `dtype`."""
    kind, reduced = torch.device(device).type, dtype != "float32"
    return torch.autocast(kind, getattr(torch, dtype), enabled=reduced)
