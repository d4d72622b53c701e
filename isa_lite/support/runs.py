"""What every long run shares: one process at a time, a state that is saved now and then.

with Keeper(checkpoint, minutes) as keeper:
    start = ...  # the step that the checkpoint holds, or 0
    keeper.begin(save, start)  # save(n) writes the state after n steps
    for step in range(start, steps):
        ...  # the training step
        keeper.after(step + 1, last=step + 1 == steps)
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from isa_lite.support import distributed
from isa_lite.support.settings import MINUTES

_BEYOND = 1 << 30  # the byte that is locked: beyond the text, which others may read
# what this process has locked: a system's lock does not stop its own process
_held: dict[Path, object] = {}


class Lock:
    """Inside, no other process works on `path`. ValueError, naming that process, where one does.

    The system keeps the lock, on the file `.NAME.lock` beside `path`, and lets it go when the
    process ends, however it ends. Of several processes of a run (`distributed`) number 0 holds it.
    """

    def __init__(self, path: Path):
        self.path, self.file = path, None
        self.name = path.resolve().with_name(f".{path.name}.lock")

    def __enter__(self) -> Lock:
        try:
            if owner := distributed.told(self._take() if distributed.rank() == 0 else ""):
                fault = f"{self.path} is in use by {owner}"
                raise ValueError(f"{fault}: wait until that has ended, or choose another place")
        except BaseException:
            self._forget()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            if os.name == "nt":  # which removes no open file
                self.file.close()
            with suppress(OSError):
                self.name.unlink()
            self.file.close()
        self._forget()

    def _forget(self) -> None:
        if _held.get(self.name) is self:
            del _held[self.name]

    def _take(self) -> str:
        """Lock the file and write our name into it; returns whose it is, "" if ours."""
        if _held.setdefault(self.name, self) is not self:
            return f"this process ({os.getpid()}) itself"
        self.name.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(self.name, "a+", encoding="utf-8")  # open as long as the lock is held
            try:
                _lock(file)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                owner = file.read(200).strip() or "another process"
                file.close()
                return owner
            except OSError as error:  # a file system without locks
                fault = f"{self.path} cannot be locked ({error})"
                warnings.warn(f"{fault}: start no second run on it", stacklevel=4)
            with suppress(OSError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.name)):
                    break
            file.close()  # its owner has removed it meanwhile: take the next one
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self.file = file
        return ""


def _lock(file: IO) -> None:
    if os.name == "nt":
        import msvcrt

        file.seek(_BEYOND)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # not flock: a worker process would inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _BEYOND)


class Keeper:
    """Keeps the state of a run in the file `path`; without one it does nothing. See the top.

    The state is saved at the start, every `minutes` after a step, and at the end. Ctrl-C and
    SIGTERM let the step finish and save its state before KeyboardInterrupt is raised; a second one
    stops at once. No other process may work on the file meanwhile. Raises ValueError for one that
    does, and for `minutes` (by the name checkpoint_minutes) that are no number of at least 0.
    """

    def __init__(self, path: str | Path | None, minutes: float = MINUTES):
        if not isinstance(minutes, (int, float)) or not minutes >= 0:
            raise ValueError(f"checkpoint_minutes must be a number of at least 0, not {minutes!r}")
        self.path, self.minutes = Path(path) if path else None, minutes
        self._lock, self._before = Lock(self.path) if self.path else None, {}
        self._save: Callable[[int], None] | None = None
        self._saved, self._signal = 0.0, 0

    def __enter__(self) -> Keeper:
        if self._lock:
            self._lock.__enter__()
        return self

    def begin(self, save: Callable[[int], None], start: int) -> None:
        """From now on `save` is called with the number of steps done, at once where it is 0.

        So a run that is taken up again always starts from the same weights.
        """
        if not self.path:
            return
        self._save, self._saved = save, time.monotonic()
        if start == 0:
            save(0)
        if threading.current_thread() is threading.main_thread():  # only this one may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                # `nohup` ignores them, and so do we
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _) -> None:
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        with suppress(RuntimeError):  # the signal came while something was being printed
            print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def after(self, step: int, last: bool = False) -> None:
        """To be called behind every step. Raises KeyboardInterrupt if the run is to stop."""
        if not self._save:
            return
        due = time.monotonic() - self._saved >= 60 * self.minutes
        stop, due = distributed.anywhere(bool(self._signal), due)
        if stop or due or last:
            self._save(step)
            self._saved = time.monotonic()
        if last:
            self._quit()
        if stop:
            raise KeyboardInterrupt(
                f"stopped after step {step}; {self.path} holds the state, and the same call goes on"
            )

    def _quit(self) -> None:
        self._save = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        self._quit()
        if self._lock:
            self._lock.__exit__()
        # as when a worker process died of the same signal
        if self._signal and isinstance(error, Exception):
            raise KeyboardInterrupt(
                f"stopped; {self.path} holds the last state that was saved"
            ) from error
