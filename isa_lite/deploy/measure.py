"""What one call costs: its time, its multiply-adds, and the memory that it needs.

Every time that matters is one side of a ratio, so calls are timed side by side. Ours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Inside, attention is computed by PyTorch's common operations, not by one opaque one."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def multiply_adds(call: Callable[[], object]) -> float:
    """Millions of multiply-adds of one call, by torch's flop counter (which counts two for each).

    PyTorch's fast path for attention hides work from the counter, and some versions' fused kernels
    do, so both are off while counting.
    """
    counter = FlopCounterMode(display=False)
    with no_fast_path(), counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / 2e6


def side_by_side(
    calls: dict[str, Callable[[], object]], rounds: int = 30, warm_up: int = 3
) -> dict[str, float]:
    """Median milliseconds of each call. They take turns, so a noisy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for r in range(rounds + warm_up):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if r >= warm_up:
                    times[name].append(1000 * (time.perf_counter() - began))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


class _Held(TorchDispatchMode):
    """Follows the memory of the tensors that operations make: bytes alive at once at most."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: set[int] = set()  # weights and inputs, which a view may return
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        given = {t.untyped_storage()._cdata for t in self._tensors((args, kwargs))}
        self.given |= given - set(self.alive)
        out = operation(*args, **(kwargs or {}))
        for storage in (tensor.untyped_storage() for tensor in self._tensors(out)):
            if storage._cdata not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out

    @staticmethod
    def _tensors(tree: object) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_activations(call: Callable[[], object]) -> float:
    """The most MiB that one call's tensors hold at once, weights and inputs left out.

    Counted, not measured: it knows neither the machine nor a kernel's own scratch memory.
    """
    with torch.no_grad(), _Held() as held:
        call()
    return held.peak / 2**20


def peak_memory() -> float:
    """The most memory of this process so far, in GiB; nan where the system does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
