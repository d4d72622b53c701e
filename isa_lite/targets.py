"""What the frozen large tower says of each training image: computed once, kept on disk in shards,
and read from there.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from isa_lite.models.vl_model import VLModel
from isa_lite.support import distributed
from isa_lite.support.checkpoint import write_bytes
from isa_lite.support.images import Images, batch_loader, images_key

SHARD = 128  # images at most: a batch of the large tower, and what is lost when a run is killed
_KINDS = {"embeddings": np.float32, "patches": np.float16}


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
        found, shard = (
            np.empty((len(rows), *self.shape[1:]), self.dtype),
            np.searchsorted(self.starts, rows, "right") - 1,
        )
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


@dataclass
class Targets:
    """What the large image tower says: embeddings N x E (float32) and, for LAR, patch tokens N x P
    x width (float16).
    """

    embeddings: np.ndarray
    patches: np.ndarray | Rows | None


def targets(
    images: Images,
    vl: VLModel,
    patches: bool,
    cache: str | Path | None = None,
    num_workers: int = 0,
) -> Targets:
    """The large tower's targets, computed once: later calls read them from `cache`, which also
    holds what a killed run had done.

    They are filed under a digest of the model, its preprocessing and every image, so a change of
    any of these is a new entry. With a cache, patches are read from the disk when they are asked
    for, and so need not fit into memory. Several runs may share a cache, and several processes of
    one run (`distributed`) share the work; these need one, in a folder that all see. Raises
    ValueError where they have none, or `cache` is a file; OSError for a full disk.
    """
    if distributed.count() > 1 and not cache:
        raise ValueError(
            "several processes exchange the targets of the large tower through files: give a cache"
            " folder"
        )
    if cache and Path(cache).exists() and not Path(cache).is_dir():
        raise ValueError(f"cache= names a folder, and {cache} is a file")
    digest = hashlib.sha256(
        f"{vl.fingerprint} {images_key(images)} {vl.preprocess}".encode()
    ).hexdigest()[:24]
    kinds = {name: _KINDS[name] for name in ("embeddings", "patches")[: 1 + patches]}
    batches = np.array_split(np.arange(len(images)), -(-len(images) // SHARD))

    def file(name: str, shard: int) -> Path:
        return Path(cache) / digest / f"{shard:06}.{name}.npy"

    def whole(shard: int) -> bool:
        return all(
            _whole(file(name, shard), len(batches[shard]), kind) for name, kind in kinds.items()
        )

    missing = [shard for shard in range(len(batches)) if not (cache and whole(shard))]
    distributed.same(
        (digest, len(missing)),
        f"their images, or in whether they see the targets of these in {cache}",
    )
    own = distributed.told(missing)[distributed.rank() :: distributed.count()]
    done: dict[str, list[np.ndarray]] = {name: [] for name in kinds}  # without a cache
    bar = tqdm(
        own,
        desc="targets of the large tower",
        mininterval=1,
        disable=distributed.rank() > 0 or not own,
    )
    loader = batch_loader(images, [batches[shard] for shard in own], vl.pixels, num_workers)
    with torch.inference_mode():
        for shard, pixels in zip(bar, loader, strict=True):
            pixels = pixels.to(vl.device)
            values = (
                vl.encode_pixels_and_patches(pixels) if patches else (vl.encode_pixels(pixels),)
            )
            for (name, kind), value in zip(kinds.items(), values, strict=True):
                array = value.cpu().numpy().astype(kind)
                if cache:
                    write_bytes(file(name, shard), _as_npy(array))
                else:
                    done[name].append(array)
    if not cache:
        return Targets(*(np.concatenate(done[name]) if name in done else None for name in _KINDS))
    if missing:
        distributed.wait()  # for the shards of the others
    known = {name: Rows([file(name, shard) for shard in range(len(batches))]) for name in kinds}
    return Targets(np.asarray(known["embeddings"]), known.get("patches"))


def _as_npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


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
