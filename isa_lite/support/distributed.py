"""One training run on several GPUs or processes, and what they exchange.

`torchrun --nproc-per-node 4 -m isa_lite distill ...` starts the processes. Each works on its part
of every batch, the loss is that of the whole batch, and all take the same step. A contrastive loss
compares across the parts, so embeddings are gathered: gradients flow into a process's own rows, and
adding up all processes' gradients gives that of the whole. Only batch normalisation, which looks at
a process's own images, and LAR on a share of its images make this differ from one process. Ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

Rows = TypeVar("Rows", Tensor, np.ndarray)
Value = TypeVar("Value")


def count() -> int:
    """How many processes there are: 1, unless torchrun started more."""
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


def rank() -> int:
    """Which of them this one is; number 0 writes the files."""
    return distributed.get_rank() if count() > 1 else 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, this process is one of torchrun's, with a GPU of its own if `device` is "cuda".

    Raises ValueError where there is no such GPU, or `device` names one. After an error inside there
    is no farewell, which would wait for the others, as they for this one: torchrun ends them all.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device not in ("cpu", "cuda"):
        fault = f"several processes share no {device!r}"
        raise ValueError(f"{fault}: give device cuda, and each takes a GPU of its own, or cpu")
    if device == "cuda":
        own = int(os.environ["LOCAL_RANK"])
        if own >= torch.cuda.device_count():
            fault = f"process {own} has no GPU of its own, as there are {torch.cuda.device_count()}"
            raise ValueError(f"{fault}: start fewer")
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    yield
    distributed.destroy_process_group()


def part(rows: Rows, own: int | None = None, of: int | None = None) -> Rows:
    """The rows of this process in a batch, or of process `own` of so many; equally many each."""
    own, of = rank() if own is None else own, of or count()
    size = len(rows) // of
    return rows[own * size : (own + 1) * size]


def gather(rows: Tensor) -> Tensor:
    """b x ... of this process -> B x ... of all, in order. Gradients flow into its own rows."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count())]
    distributed.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def total(value: Tensor) -> Tensor:
    """The sum of every process's `value`, without gradients."""
    value = value.detach().clone()
    if count() > 1:
        distributed.all_reduce(value)
    return value


def add_gradients(module: nn.Module) -> None:
    """Put the sum of all processes' gradients in the place of each one's own."""
    if count() == 1:
        return
    known = [p.grad for p in module.parameters() if p.grad is not None]
    _put(known, total(torch.cat([g.flatten() for g in known])))


def _put(tensors: list[Tensor], flat: Tensor) -> None:
    """One long row of numbers back into the tensors that it was made of."""
    for tensor, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(new.view_as(tensor))


def agree(tensors: Iterable[Tensor]) -> None:
    """Give every process the values of number 0."""
    for tensor in tensors if count() > 1 else ():
        distributed.broadcast(tensor, 0)


def average(tensors: Iterable[Tensor]) -> None:
    """Give every process the mean of all processes' values, which all tensors have of one type."""
    known = list(tensors) if count() > 1 else []
    if known:
        # one exchange for all of them
        _put(known, total(torch.cat([t.flatten() for t in known])) / count())


def same(value: object, what: str) -> None:
    """Raises ValueError in all processes where they differ in `value`: they would wait forever."""
    values: list[object] = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    if any(other != value for other in values):
        fault = f"the {count()} processes differ in {what}: {values}"
        raise ValueError(f"{fault}; give all of them the same files")


def told(value: Value) -> Value:
    """Number 0's `value`, in every process."""
    values: list[Value] = [value]
    if count() > 1:
        distributed.broadcast_object_list(values, 0)
    return values[0]


def anywhere(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether any process has it set."""
    if count() == 1:
        return flags
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    found = torch.tensor(flags, dtype=torch.uint8, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return tuple(map(bool, found.tolist()))


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        distributed.barrier()
