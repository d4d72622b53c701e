"""What the frozen large tower says of each training image: computed once, kept on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from isa_lite import ranks
from isa_lite.images import Images, batch_loader, images_key
from isa_lite.vl_model import VLModel


@dataclass
class Targets:
    """What the large image tower says: embeddings N x E (float32) and, for LAR, patch tokens N x P x width (float16)."""

    embeddings: np.ndarray
    patches: np.ndarray | None


def targets(images: Images, vl: VLModel, patches: bool, cache: str | Path | None = None, num_workers: int = 0) -> Targets:
    """The large tower's targets, computed once: later calls read them from `cache`.

    They are filed under a digest of the model, its preprocessing and every image, so a change of any of these is
    a new entry. The arrays are mapped from disk where there is a cache, and so need not fit into memory. Several processes
    (`ranks`) share the work; they need a cache, in a folder that all of them see (ValueError). On several machines, make it on
    one first: neighbouring rows share a page of the file, and a network's file system may lose one machine's half of it.
    """
    if ranks.count() > 1 and not cache:
        raise ValueError("several processes exchange the targets of the large tower through files: give a cache folder")
    digest = hashlib.sha256(f"{vl.fingerprint} {images_key(images)} {vl.preprocess}".encode()).hexdigest()[:24]
    folder = Path(cache) / digest if cache else None
    wanted = ["embeddings"] + (["patches"] if patches else [])
    ready = folder is not None and all((folder / f"{name}.npy").is_file() for name in wanted)
    ranks.same((digest, ready), f"their images, or in whether they see the targets of these in {cache}")
    if ready:
        return Targets(
            *(
                np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) if n in wanted else None
                for n in ("embeddings", "patches")
            )
        )
    batches = np.array_split(np.arange(len(images)), max(ranks.count(), -(-len(images) // 128)))[ranks.rank() :: ranks.count()]
    out: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        for rows, pixels in zip(
            tqdm(batches, desc="targets of the large tower", mininterval=1, disable=ranks.rank() > 0),
            batch_loader(images, batches, vl.pixels, num_workers),
            strict=True,
        ):
            pixels = pixels.to(vl.device)
            values = vl.encode_pixels_and_patches(pixels) if patches else (vl.encode_pixels(pixels),)
            for name, value, kind in zip(wanted, values, (np.float32, np.float16), strict=False):
                if name not in out:
                    out[name] = _array(folder, name, (len(images), *value.shape[1:]), kind)
                out[name][rows] = value.cpu().numpy()
    if folder:
        for name in wanted:
            out[name].flush()
        ranks.wait()  # for the rows of the others
        for name in wanted if ranks.rank() == 0 else ():
            (folder / f"{name}.part.npy").rename(folder / f"{name}.npy")
        ranks.wait()
    return Targets(out["embeddings"], out.get("patches"))


def _array(folder: Path | None, name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
    if folder is None:
        return np.empty(shape, kind)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.part.npy"
    made = np.lib.format.open_memmap(path, "w+", kind, shape) if ranks.rank() == 0 else None
    ranks.wait()  # until the file is there
    return np.lib.format.open_memmap(path, "r+") if made is None else made
