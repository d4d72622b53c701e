"""Arrays with a row an item, computed shard by shard and kept on disk, so that a run which is
killed loses one shard at most and a later one reads them. Ours.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from isa_lite.support.checkpoint import write_bytes


class Rows:
    """An array N x ... whose rows lie in several files, in order: `rows[indices]` reads those that
    are asked for.
    """

    def __init__(self, files: Sequence[Path]):
        parts = [_mapped(file) for file in files]
        self.files, self.dtype = list(files), parts[0].dtype
        self.starts = np.cumsum([0, *map(len, parts)])  # of each file, and the end
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])
        # a mapped file is an open file, and a process may have few hundreds
        self._open = lru_cache(64)(_mapped)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        rows = np.arange(len(self))[rows]
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        shard = np.searchsorted(self.starts, rows, "right") - 1
        for s in np.unique(shard):
            found[shard == s] = part = self._open(self.files[s])[rows[shard == s] - self.starts[s]]
            if not (np.abs(part) <= 65504).all():  # the most that float16 holds
                raise ValueError(
                    f"{self.files[s]} is damaged: it holds values that are no numbers; delete it,"
                    " to make it again"
                )
        return found

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


class Shards:
    """Arrays by name, in shards of `counts` rows each; in memory where `folder` is None.

    kinds: the dtype of each array.
    """

    def __init__(self, folder: Path | None, kinds: Mapping[str, type], counts: Sequence[int]):
        self.folder, self.kinds, self.counts = folder, kinds, counts
        self.done: dict[str, list[np.ndarray]] = {name: [] for name in kinds}

    def _file(self, name: str, shard: int) -> Path:
        return self.folder / f"{shard:06}.{name}.npy"

    def missing(self) -> list[int]:
        """The shards that are still to be computed."""
        return [
            shard
            for shard, count in enumerate(self.counts)
            if not self.folder
            or not all(
                _whole(self._file(name, shard), count, kind) for name, kind in self.kinds.items()
            )
        ]

    def put(self, shard: int, values: Sequence[np.ndarray]) -> None:
        """One shard of every array; without a folder, in order."""
        for (name, kind), value in zip(self.kinds.items(), values, strict=True):
            if not self.folder:
                self.done[name].append(value.astype(kind))
                continue
            content = io.BytesIO()
            np.save(content, value.astype(kind), allow_pickle=False)
            write_bytes(self._file(name, shard), content.getvalue())

    def rows(self, name: str) -> np.ndarray | Rows:
        """The whole of an array, N x ..."""
        if not self.folder:
            return np.concatenate(self.done[name])
        return Rows([self._file(name, shard) for shard in range(len(self.counts))])


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _whole(path: Path, count: int, kind: type) -> bool:
    """Whether a shard is there and whole; one that is cut off, or something else, is computed
    again.
    """
    try:
        array = _mapped(path)
        content = path.stat().st_size - array.offset
        fits = array.dtype == kind and array.ndim > 1 and len(array) == count
        return fits and content == array.nbytes
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            return False
        raise
    except Exception:  # whatever numpy throws at a header that is none
        return False
