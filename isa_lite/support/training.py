"""One training loop, for distillation, both pre-trainings, the light backbone, inversion. Ours."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from tqdm.auto import tqdm

from isa_lite.support import distributed
from isa_lite.support.checkpoint import damaged, misfit, resume_run, save_run
from isa_lite.support.runs import Keeper


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for its next step; on Linux with glibc only.

    By default glibc gives large blocks back to the system, and every step gets them anew, page by
    page: that is a tenth of a step on a CPU (`python -m isa_lite bench step`).
    """
    trim_threshold, mmap_max = -1, -4  # of mallopt, by glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def _taken_up(
    path: Path | None, modules: Mapping, optimizer: Optimizer, identity: Mapping | None, steps: int
) -> dict | None:
    """What `resume_run` finds, with its seconds. Raises what it raises."""
    info = resume_run(path, modules, optimizer, identity or {}, steps) if path else None
    if info and misfit(info.get("seconds"), float):
        raise damaged(path, "its seconds are no number")
    return info


def _descend(loss: Tensor, modules: Mapping, optimizer: Optimizer, clip: float | None) -> None:
    """One step of the optimizer, the same in all processes."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for module in modules.values():
        distributed.add_gradients(module)
    if clip:
        clip_grad_norm_([p for module in modules.values() for p in module.parameters()], clip)
    optimizer.step()


def fit(
    name: str,
    steps: int,
    loss_of: Callable[[Any, int], Tensor],
    batches: Callable[[int], Iterable],
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer,
    rate: Callable[[int], float] | None = None,
    keeper: Keeper | None = None,
    identity: Mapping | None = None,
    state: Callable[[float], Mapping] = lambda seconds: {},
    restore: Callable[[dict], None] = lambda info: None,
    after: Callable[[int, tqdm], object] = lambda done, bar: None,
    clip: float | None = None,
    spent: float = 0.0,
    progress: bool = True,
) -> float:
    """Train for so many steps, or those that are left. Returns the seconds of all, and `spent`.

    loss_of: a batch and its step -> the loss that is to fall; batches: those from a step on; rate:
    of a step, the learning rate (None: the optimizer's); clip: the largest norm of all gradients
    together; after: called with the number of steps done.

    keeper: of the file that the run is saved in and taken up from; identity: what tells one run
    from another; state: of the seconds so far, what else to save; restore: takes it back, and
    raises ValueError where it is damaged. spent: seconds of this process before the call. Several
    processes (`distributed`) take every step together. Raises what `resume_run` raises.
    """
    keep_freed_memory()
    keeper, began, start = keeper or Keeper(None), time.perf_counter() - spent, 0
    if info := _taken_up(keeper.path, modules, optimizer, identity, steps):
        restore(info)
        start, began = info["step"], began - info["seconds"]
    distributed.same(start, f"the step that they go on from, by what they see of {keeper.path}")

    def save(step: int) -> None:
        seconds = time.perf_counter() - began
        if distributed.rank() == 0:
            info = {"identity": identity, "step": step, "seconds": seconds, **state(seconds)}
            save_run(keeper.path, modules, optimizer, info)

    for module in modules.values():
        distributed.agree(module.state_dict().values())
    if start < steps:
        keeper.begin(save, start)
    hidden = not progress or distributed.rank() > 0
    bar = tqdm(batches(start), desc=name, total=steps, initial=start, mininterval=2, disable=hidden)
    for step, batch in enumerate(bar, start):
        for group in optimizer.param_groups if rate else ():
            group["lr"] = rate(step)
        _descend(loss_of(batch, step), modules, optimizer, clip)
        after(step + 1, bar)
        keeper.after(step + 1, last=step + 1 == steps)
    return time.perf_counter() - began
