"""Images from wherever they come: a folder of files of any kind, an array, a list of pictures."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


class ImageFolder(Sequence):
    """The images below a folder, as RGB pictures: any size, mode and format that Pillow reads.

    Every file is decoded once at the start, so that nothing can fail later; what cannot be read is left out and
    listed in `broken`. Pictures are turned upright (EXIF), transparent ones are laid on white, the first
    frame of an animation is taken, 16-bit grey is scaled to 8.
    Raises FileNotFoundError for a missing folder, ValueError where no image is left.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {self.folder}; images= names a folder of images")
        Image.init()
        readable = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
        found = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.suffix.lower() in readable)
        self.files: list[Path] = []
        self.broken: dict[Path, str] = {}
        digest = hashlib.sha256()
        for path in tqdm(found, desc="checking images", disable=len(found) < 500):
            try:
                data = path.read_bytes()
                decode(data)
            except Exception as error:  # whatever a decoder throws at a broken file
                self.broken[path] = f"{type(error).__name__}: {error}"
                continue
            digest.update(hashlib.sha256(data).digest())
            self.files.append(path)
        if not self.files:
            raise ValueError(
                f"{self.folder} holds no image that can be read"
                + (f"; all {len(self.broken)} files are broken, the first: {next(iter(self.broken))}" if self.broken else "")
            )
        if self.broken:
            warnings.warn(
                f"skipped {len(self.broken)} of {len(found)} files in {self.folder}: {next(iter(self.broken.items()))} ...",
                stacklevel=2,
            )
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Image.Image:
        return read_image(self.files[i])


def decode(data: bytes) -> Image.Image:
    """The bytes of an image file -> an upright RGB picture, as `ImageFolder` describes. Raises what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; a file that cannot be read still raises
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I") or image.mode == "F":  # 16-bit or floating-point grey
            values = np.asarray(image, dtype=np.float32)
            top = values.max()
            values = values / 257 if top > 255 else values * 255 if image.mode == "F" and top <= 1 else values
            image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """An image file as an upright RGB picture."""
    return decode(Path(path).read_bytes())


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
        return self.to_pixels(
            self.images[chosen] if isinstance(self.images, np.ndarray) else [self.images[int(j)] for j in chosen]
        )


def batch_loader(images: Images, batches: Sequence[np.ndarray], to_pixels: Callable, num_workers: int = 0) -> DataLoader:
    """Loads one B x 3 x H x W tensor for each array of indices in `batches`; with workers, ahead of time."""
    return DataLoader(_Batches(images, batches, to_pixels), batch_size=None, num_workers=num_workers)
