"""Embedding a gallery of image files: once, in shards that resume, with files read ahead.

A gallery may hold a hundred thousand photographs. Reading and resizing happens in threads while the
model works on the batch before (Pillow lets go of Python's lock while it decodes), and every
finished shard is a file, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from isa_lite.models.vl_model import VLModel
from isa_lite.retrieval.gallery import TOLERANCE
from isa_lite.support.checkpoint import read_shard, write_tensors
from isa_lite.support.images import file_bytes, quiet, read_image
from isa_lite.support.parameters import checked, optional, path_name, whole

In, Out = TypeVar("In"), TypeVar("Out")
SHARD = 4096  # images of a shard
SHOWN = 5  # broken files that a message lists


def ahead(function: Callable[[In], Out], items: Iterable[In], threads: int) -> Iterator[Out]:
    """`map(function, items)`, in order, with two results a thread made ahead; 0 threads: none."""
    if threads == 0:
        yield from map(function, items)
        return
    items, waiting = iter(items), deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in itertools.islice(items, 2 * threads):
                waiting.append(pool.submit(function, item))
            while waiting:
                result = waiting.popleft().result()
                for item in itertools.islice(items, 1):
                    waiting.append(pool.submit(function, item))
                yield result
        finally:  # after an error, or when the caller has had enough
            pool.shutdown(cancel_futures=True)


@checked(batch_size=whole(1), num_workers=optional(whole(0, 256)), cache=optional(path_name()))
def embed_files(
    files: Sequence[str | Path],
    vl: VLModel,
    cache: str | Path | None = None,
    batch_size: int = 128,
    num_workers: int | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> Tensor:
    """Image files -> L2-normalised embeddings, N x E float32 on the CPU, by the large image tower.

    cache: a folder; a finished shard of `SHARD` images is kept there, filed under the model, its
    preprocessing, the dtype, and the path, size and time of change of each of its files.
    num_workers: threads that read ahead; by default two for a model on a GPU, and none on a CPU,
    where they take from the model what they give (`python -m isa_lite bench embed`). dtype: float32
    or bfloat16, of the matrix products.

    Every file keeps its row. Files with the same bytes are counted in a warning: with equal
    embeddings, they rank side by side. Raises FileNotFoundError with the count and the first of the
    files that are missing, and ValueError with the count and the first of those that cannot be
    read: after the first of them, files are read but not embedded. Finished shards are kept.
    """
    files = _checked_files(files, cache)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    num_workers = (0 if vl.device.type == "cpu" else 2) if num_workers is None else num_workers
    model = f"{vl.fingerprint} {vl.preprocess} {dtype} draft=False with digests" if cache else ""
    tower = _Tower(vl, batch_size, num_workers, dtype)
    how = {"unit": "image", "mininterval": 1, "disable": not progress}
    bar = tqdm(total=len(files), desc="embedding images", **how)
    parts: list[dict[str, Tensor]] = []
    with bar, quiet():
        for start in range(0, len(files), SHARD):
            group = files[start : start + SHARD]
            stored = _filed(Path(cache), model, group) if cache else None
            part = read_shard(stored) if stored else None
            if part is not None and _fits(part, len(group)):
                bar.update(len(group))
            elif part := tower.embed(group, bar):
                if stored:
                    write_tensors(stored, part)
            parts += [part] if part else []
    if tower.broken:
        raise ValueError(_told(tower.broken, files))
    if len({part["embeddings"].shape[1] for part in parts}) > 1:
        fault = f"the shards in {cache} have embeddings of different widths"
        raise ValueError(f"{fault}; delete that folder")
    _count_copies(files, [bytes(d) for part in parts for d in part["digests"].tolist()])
    return torch.cat([part["embeddings"] for part in parts])


def _checked_files(files: object, cache: str | Path | None) -> list[Path]:
    listed = hasattr(files, "__getitem__") and not isinstance(files, (str, bytes, Mapping))
    if not listed or not all(isinstance(f, (str, os.PathLike)) for f in files):
        fault = "files must be a list of paths; isa_lite.support.images.ImageFolder(FOLDER).files"
        raise ValueError(f"{fault} lists those of a folder")
    if not files:
        raise ValueError("there are no files to embed")
    if cache and Path(cache).is_file():
        raise ValueError(f"cache= names a folder for the shards, and {cache} is a file")
    files = [Path(f) for f in files]
    if missing := [f for f in files if not f.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} image files are missing, the first: {missing[0]}"
        )
    return files


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _filed(cache: Path, model: str, group: Sequence[Path]) -> Path:
    """Where the shard of these files is kept."""
    # A name on disk need not be UTF-8; Python then keeps its bytes as what UTF-8 would refuse.
    said = "\n".join([model, *map(_stamp, group)]).encode(errors="surrogatepass")
    return cache / f"{hashlib.sha256(said).hexdigest()[:24]}.safetensors"


class _Tower:
    """The large image tower, with what it needs to read files, and those that it could not read."""

    def __init__(self, vl: VLModel, batch_size: int, num_workers: int, dtype: str):
        self.vl, self.batch_size, self.num_workers = vl, batch_size, num_workers
        self.half = dtype == "bfloat16"
        self.broken: dict[Path, str] = {}

    def read(self, batch: Sequence[Path]) -> tuple[Tensor, list[bytes]] | None:
        """b x 3 x H x W, and a digest a file; None once one is broken: others are looked for."""
        pictures, digests = [], []
        for path in batch:
            try:
                data = _contents(path)
                picture = read_image(path, data)
            except ValueError as error:
                self.broken[path] = str(error)
            if not self.broken:
                pictures.append(picture)
                digests.append(hashlib.blake2b(data, digest_size=16).digest())
        return None if self.broken else (self.vl.pixels(pictures), digests)

    def embed(self, group: Sequence[Path], bar: tqdm) -> dict[str, Tensor] | None:
        """A shard of these files; None if one of them is broken."""
        done, digests = [], []
        batches = [group[s : s + self.batch_size] for s in range(0, len(group), self.batch_size)]
        half = torch.autocast(self.vl.device.type, torch.bfloat16, enabled=self.half)
        for batch, read in zip(batches, ahead(self.read, batches, self.num_workers), strict=True):
            bar.update(len(batch))
            if read is not None:
                with torch.no_grad(), half:
                    done.append(self.vl.encode_pixels(read[0]).float().cpu())
                digests += [list(digest) for digest in read[1]]
        if len(digests) < len(group):
            return None
        return {"embeddings": torch.cat(done), "digests": torch.tensor(digests, dtype=torch.uint8)}


def _told(broken: Mapping[Path, str], files: Sequence[Path]) -> str:
    said = [broken[path] for path in files if path in broken]  # in order: threads read as they like
    more = f" ... and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    replace = f"{len(said)} of {len(files)} files are to be replaced or taken away: "
    return (replace if len(said) > 1 else "") + "; ".join(said[:SHOWN]) + more


def _contents(path: Path) -> bytes:
    """An image file's bytes. Raises ValueError naming it where it cannot be read, or has gone."""
    try:
        return file_bytes(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _fits(part: Mapping[str, Tensor], files: int) -> bool:
    """Whether a shard from disk has an embedding and a digest a file; another is made again."""
    embeddings, digests = part.get("embeddings"), part.get("digests")
    if not (isinstance(embeddings, Tensor) and isinstance(digests, Tensor)):
        return False
    kinds = (embeddings.dtype, digests.dtype) == (torch.float32, torch.uint8)
    if not kinds or embeddings.ndim != 2 or len(embeddings) != files:
        return False
    lengths = torch.linalg.vector_norm(embeddings, dim=1)  # of nan, the next line is False
    return digests.shape == (files, 16) and bool(((lengths - 1).abs() <= TOLERANCE).all())


def _count_copies(files: Sequence[Path], digests: Sequence[bytes]) -> None:
    """One warning about all files whose digest is that of a file before them."""
    first: dict[bytes, Path] = {}
    both = zip(files, digests, strict=True)
    copies = [(f, first[d]) for f, d in both if first.setdefault(d, f) != f]
    if copies:
        what = "files is a copy of another" if len(copies) == 1 else "files are copies of others"
        said = f"{len(copies)} of {len(files)} {what} and all keep their rows"
        warnings.warn(f"{said}, the first: {copies[0][0]} is {copies[0][1]}", stacklevel=3)
