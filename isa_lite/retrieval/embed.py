"""Embedding a gallery of image files: once, in shards that resume, with reading kept ahead of the
model.

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
SHOWN = 5  # broken files that a message lists


def ahead(function: Callable[[In], Out], items: Iterable[In], threads: int) -> Iterator[Out]:
    """`map(function, items)`, with up to two results a thread made in advance; 0 threads: none.
    Order and errors stay.
    """
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


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


@checked(
    batch_size=whole(1),
    shard=whole(1),
    num_workers=optional(whole(0, 256)),
    cache=optional(path_name()),
)
def embed_files(
    files: Sequence[str | Path],
    vl: VLModel,
    cache: str | Path | None = None,
    batch_size: int = 128,
    shard: int = 4096,
    num_workers: int | None = None,
    dtype: str = "float32",
    draft: bool = False,
    progress: bool = True,
) -> Tensor:
    """Image files -> L2-normalised embeddings, N x E float32 on the CPU, by the large image tower.

    cache: a folder; a finished shard of `shard` images is kept there, filed under the model, its
    preprocessing, the dtype, and the path, size and time of change of each of its files.
    num_workers: threads that read ahead; by default two for a model on a GPU, and none on a CPU,
    where they take from the model what they give (`python -m isa_lite bench embed`). dtype: float32
    or bfloat16, of the matrix products.
    draft: decode JPEGs much larger than the model's input at a fraction of their size, at least
    twice that input: much faster for photographs of several megapixels, with slightly other
    embeddings (filed apart).

    Every file keeps its row. Files with the same bytes are counted in a warning: with equal
    embeddings, they rank side by side. Raises FileNotFoundError with the count and the first of the
    files that are missing, and ValueError with the count and the first of those that cannot be
    read: behind the first of them, files are read but not embedded. Finished shards are kept.
    """
    listed = hasattr(files, "__getitem__") and not isinstance(files, (str, bytes, Mapping))
    if not listed or not all(isinstance(f, (str, os.PathLike)) for f in files):
        raise ValueError(
            "files must be a list of paths; isa_lite.support.images.ImageFolder(FOLDER).files lists"
            " those of a folder"
        )
    files = [Path(f) for f in files]
    num_workers = (0 if vl.device.type == "cpu" else 2) if num_workers is None else num_workers
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    if not files:
        raise ValueError("there are no files to embed")
    if cache and Path(cache).is_file():
        raise ValueError(f"cache= names a folder for the shards, and {cache} is a file")
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} image files are missing, the first: {missing[0]}"
        )
    model = f"{vl.fingerprint} {vl.preprocess} {dtype} draft={draft} with digests" if cache else ""
    at_least = 2 * vl.image_size if draft else 0

    broken: dict[Path, str] = {}

    def pixels(batch: list[Path]) -> tuple[Tensor, list[bytes]] | None:
        """b x 3 x H x W, and a digest of the bytes of each file; None once a file was broken: then
        it only looks for others.
        """
        pictures, digests = [], []
        for path in batch:
            try:
                data = _contents(path)
                picture = read_image(path, data, at_least)
            except ValueError as error:
                broken[path] = str(error)
            if not broken:
                (
                    pictures.append(picture),
                    digests.append(hashlib.blake2b(data, digest_size=16).digest()),
                )
        return None if broken else (vl.pixels(pictures), digests)

    def embed(group: list[Path]) -> dict[str, Tensor] | None:
        done, digests = [], []
        batches = [group[s : s + batch_size] for s in range(0, len(group), batch_size)]
        for batch, read in zip(batches, ahead(pixels, batches, num_workers), strict=True):
            bar.update(len(batch))
            if read is not None:
                with (
                    torch.no_grad(),
                    torch.autocast(vl.device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
                ):
                    done.append(vl.encode_pixels(read[0]).float().cpu())
                digests += read[1]
        if len(digests) < len(group):
            return None
        return {
            "embeddings": torch.cat(done),
            "digests": torch.tensor([list(d) for d in digests], dtype=torch.uint8),
        }

    parts, digests = [], []
    bar = tqdm(
        total=len(files), desc="embedding images", unit="image", mininterval=1, disable=not progress
    )
    with bar, quiet():
        for start in range(0, len(files), shard):
            group = files[start : start + shard]
            stored = None
            if cache:
                # A name on disk need not be UTF-8; Python then keeps its bytes as what UTF-8 would
                # refuse.
                key = hashlib.sha256(
                    "\n".join([model, *map(_stamp, group)]).encode(errors="surrogatepass")
                ).hexdigest()[:24]
                stored = Path(cache) / f"{key}.safetensors"
            part = read_shard(stored) if stored else None
            if part is not None and _fits(part, len(group)):
                bar.update(len(group))
            else:
                part = embed(group)
                if part is None:
                    continue
                if stored:
                    write_tensors(stored, part)
            parts.append(part["embeddings"])
            digests += [bytes(d) for d in part["digests"].tolist()]
    if broken:
        # in order: threads read them as they like
        said = [broken[path] for path in files if path in broken]
        more = f" ... and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        many = (
            f"{len(said)} of {len(files)} files are to be replaced or taken away: "
            if len(said) > 1
            else ""
        )
        raise ValueError(many + "; ".join(said[:SHOWN]) + more)
    _count_copies(files, digests)
    if len({p.shape[1] for p in parts}) > 1:
        raise ValueError(
            f"the shards in {cache} have embeddings of different widths; delete that folder"
        )
    return torch.cat(parts)


def _contents(path: Path) -> bytes:
    """The bytes of an image file. Raises ValueError naming it where it cannot be read, or has gone
    since the start.
    """
    try:
        return file_bytes(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _fits(part: Mapping[str, Tensor], files: int) -> bool:
    """Whether a shard from disk holds an embedding and a digest for each of its files; another one
    is made again.
    """
    embeddings, digests = part.get("embeddings"), part.get("digests")
    return (
        isinstance(embeddings, Tensor)
        and isinstance(digests, Tensor)
        and embeddings.dtype == torch.float32
        and embeddings.ndim == 2
        and len(embeddings) == files
        # False for nan, too
        and bool(((torch.linalg.vector_norm(embeddings, dim=1) - 1).abs() <= TOLERANCE).all())
        and digests.dtype == torch.uint8
        and digests.shape == (files, 16)
    )


def _count_copies(files: Sequence[Path], digests: Sequence[bytes]) -> None:
    """One warning about all files whose digest is that of a file before them."""
    first: dict[bytes, Path] = {}
    copies = [
        (f, first[d]) for f, d in zip(files, digests, strict=True) if first.setdefault(d, f) != f
    ]
    if copies:
        what = "files is a copy of another" if len(copies) == 1 else "files are copies of others"
        message = (
            f"{len(copies)} of {len(files)} {what} and all keep their rows, the first:"
            f" {copies[0][0]} is {copies[0][1]}"
        )
        warnings.warn(message, stacklevel=3)
