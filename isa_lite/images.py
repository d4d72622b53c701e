"""Images from wherever they come: a folder of files of any kind, an array, a list of pictures; and as pixels for a network."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

#: A picture that is longer than this many times its short side is refused: resized, it would fill the memory.
LONGEST = 1000
#: Kinds of pictures that Pillow does not read by itself (phones, cameras, drawings): not to be passed over in silence.
UNREAD = {".heic", ".heif", ".svg", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"}


class ImageFolder(Sequence):
    """The images below a folder, as RGB pictures: any size, mode and format that Pillow reads (see `decode`).

    Every file is decoded once at the start, so that nothing can fail later; what cannot be read is left out and listed in
    `broken`, with the reason. `duplicates` gives, for a file with the same bytes as one before it, that one. They are left
    out unless `keep_duplicates`: in a training a second copy in the batch would count as a wrong answer, and in a search
    the copy of a reference would be found first. A warning counts what was left out.
    Raises FileNotFoundError for a missing folder, ValueError where no image is left.
    """

    def __init__(self, folder: str | Path, keep_duplicates: bool = False):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}; images= names a folder of images")
        Image.init()
        readable = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
        found = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.suffix.lower() in readable | UNREAD)
        self.files: list[Path] = []
        self.broken: dict[Path, str] = {}
        self.duplicates: dict[Path, Path] = {}
        seen: dict[bytes, Path] = {}
        digest = hashlib.sha256()
        for path in tqdm(found, desc="checking images", disable=len(found) < 500):
            if path.suffix.lower() not in readable:
                self.broken[path] = f"Pillow does not read {path.suffix}; save it as PNG or JPEG"
                continue
            try:
                data = path.read_bytes()
                own = hashlib.sha256(data).digest()
                if own not in seen:
                    with quiet():
                        decode(data)
            except Exception as error:  # whatever a decoder throws at a broken file
                reason = re.sub("image file <.*?>", "the file", str(error))  # Pillow names an address in memory
                self.broken[path] = f"{type(error).__name__}: {reason}"
                continue
            if own in seen:
                self.duplicates[path] = seen[own]
                if not keep_duplicates:
                    continue
            seen.setdefault(own, path)
            digest.update(own)
            self.files.append(path)
        first, why = next(iter(self.broken.items()), (None, ""))
        if not self.files:
            raise ValueError(
                f"{self.folder} holds no image that can be read"
                + (f"; all {len(self.broken)} files are broken, the first: {first} ({why})" if self.broken else "")
            )
        if self.broken:
            warnings.warn(
                f"skipped {len(self.broken)} of {len(found)} files in {self.folder}, the first: {first} ({why})",
                stacklevel=2,
            )
        if self.duplicates:
            copy, first = next(iter(self.duplicates.items()))
            done = "kept" if keep_duplicates else "left out"
            warnings.warn(
                f"{done} {len(self.duplicates)} of {len(found)} files in {self.folder} that are copies of others, the first: "
                f"{copy} is {first}",
                stacklevel=2,
            )
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Image.Image:
        with quiet():
            return read_image(self.files[i])


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's remarks on odd metadata; a file that cannot be read still raises.

    To be entered in the main thread only: Python's list of warning filters belongs to all threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it becomes an error in `decode`
        yield


def decode(data: bytes, at_least: int = 0) -> Image.Image:
    """The bytes of an image file -> an upright RGB picture.

    at_least: a large JPEG may be decoded at a half, a quarter or an eighth of its size, with no side below this (0: whole).

    Pictures are turned upright (EXIF), transparent ones are laid on white, palettes and CMYK become RGB, the first frame of
    an animation is taken, 16-bit grey is scaled to 8. Raises what Pillow raises for a file that it cannot read, and ValueError
    for a picture of more pixels than PIL.Image.MAX_IMAGE_PIXELS (Pillow itself only warns up to twice that), or longer
    than `LONGEST` times its short side.
    """
    try:
        image = Image.open(io.BytesIO(data))
        most, count = Image.MAX_IMAGE_PIXELS, f"{image.width} x {image.height}"
        bomb = most is not None and image.width * image.height > most
    except Image.DecompressionBombError as error:
        bomb, count, most = True, str(error), Image.MAX_IMAGE_PIXELS
    if bomb:
        raise ValueError(f"too large ({count}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS, now {most}")
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{count} pixels is more than {LONGEST} times as long as wide; crop it")
    if at_least:
        image.draft(None, (at_least, at_least))  # only the JPEG decoder listens
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit or floating-point grey
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)  # no data: black
        top = values.max()
        wide = image.mode.startswith("I;16") or top > 255
        values = values / 257 if wide else values * 255 if image.mode == "F" and top <= 1 else values
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_image(path: str | Path, data: bytes | None = None, at_least: int = 0) -> Image.Image:
    """An image file as an upright RGB picture. data: its bytes, where they are known; at_least: see `decode`.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    data = Path(path).read_bytes() if data is None else data
    try:
        return decode(data, at_least)
    except Exception as error:  # whatever a decoder throws at a broken file
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


#: What training and embedding take: uint8 N x H x W x 3, a folder, or pictures.
Images = np.ndarray | ImageFolder | Sequence[Image.Image]


def images_key(images: Images) -> str:
    """A digest of every pixel (or, for a folder, of every file)."""
    if isinstance(images, ImageFolder):
        return images.key
    digest = hashlib.sha256()
    for image in [images] if isinstance(images, np.ndarray) else images:
        array = np.ascontiguousarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


class _Batches(Dataset):
    """Batch number i of a list of index arrays, as pixels."""

    def __init__(self, images: Images, batches: Sequence[np.ndarray], to_pixels: Callable):
        self.images, self.batches, self.to_pixels = images, batches, to_pixels

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Tensor:
        chosen = self.batches[i]
        if isinstance(self.images, np.ndarray):
            return self.to_pixels(self.images[chosen])
        # One after the other: a hundred photographs at their full size would take gigabytes.
        return torch.cat([self.to_pixels([self.images[int(j)]]) for j in chosen])


def batch_loader(images: Images, batches: Sequence[np.ndarray], to_pixels: Callable, num_workers: int = 0) -> DataLoader:
    """Loads one B x 3 x H x W tensor for each array of indices in `batches`; with workers, ahead of time."""
    return DataLoader(_Batches(images, batches, to_pixels), batch_size=None, num_workers=num_workers)


def to_pixels(
    images: np.ndarray | Sequence[Image.Image | np.ndarray],
    preprocess: Callable[[Image.Image], Tensor],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Images -> B x 3 x H x W on the CPU: by `preprocess`, or with the same result straight from pictures of size x size."""
    if not isinstance(images, np.ndarray):
        images = [i if isinstance(i, Image.Image) else Image.fromarray(i) for i in images]
        if all(i.mode == "RGB" and i.size == (size, size) for i in images):
            images = np.stack([np.asarray(i) for i in images])
    if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, 3):
        mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
    return torch.stack([preprocess(i if isinstance(i, Image.Image) else Image.fromarray(i)) for i in images])
