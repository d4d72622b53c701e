"""Images from a folder of files, an array or a list of pictures; and as pixels for a network.

PyTorch is imported only where a tensor is made, so that a client without it reads pictures alike.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from isa_lite.support.parameters import checked, path_name

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

#: A picture longer than this many short sides is refused: resized, it would fill the memory.
LONGEST = 1000
#: A larger file is refused unread, in bytes: MAX_IMAGE_PIXELS of four 16-bit channels take less.
LARGEST_FILE = 2**30
#: The formats that are read, by Pillow's names, whatever a file is called. Left out are those for
#: which Pillow starts another program (EPS runs Ghostscript), asks a handler of the system, or
#: opens a picture inside the file by any format (IPTC).
FORMATS = set(
    "AVIF BLP BMP CUR DCX DDS DIB FITS FLI FTEX GBR GIF ICNS ICO IM IMT JPEG JPEG2000 MCIDAS MPO"
    " MSP PCD PCX PIXAR PNG PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM XVTHUMB".split()
)
#: Kinds of pictures that are not read, and are not passed over in silence either.
UNREAD = {*".heic .heif .svg .jxl .dng .cr2 .cr3 .nef .arw .raf .eps .ps .wmf .emf".split()}


def _formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow reads, in the order in which it tries them."""
    Image.init()
    return [name for name in Image.ID if name in FORMATS and name in Image.OPEN]


def _files(folder: Path, unreadable: dict[Path, str]) -> Iterator[Path]:
    """Every file below a folder, linked sub-folders included; none that is or lies hidden.

    A link back to a folder that it lies in is not followed. What cannot be listed is put into
    `unreadable`, with the reason.
    """

    def note(error: OSError) -> None:
        unreadable[Path(error.filename)] = f"{type(error).__name__}: {error.strerror}"

    # of each folder that is still to come, the folders that it lies in, and itself
    inside = {str(folder): {folder.resolve()}}
    for path, folders, names in os.walk(folder, onerror=note, followlinks=True):
        above = inside.pop(path)
        kept = {name: (Path(path) / name).resolve() for name in folders if not name.startswith(".")}
        folders[:] = [name for name, real in kept.items() if real not in above]
        inside |= {os.path.join(path, name): above | {kept[name]} for name in folders}
        yield from (Path(path) / name for name in names if not name.startswith("."))


class ImageFolder(Sequence):
    """The images below a folder, as RGB pictures of any size, mode, and format of `FORMATS`.

    Linked sub-folders are followed; hidden files and folders (.ipynb_checkpoints, for one) are left
    out. Every file is decoded once at the start, so that nothing can fail later; what cannot be
    read is left out and listed in `broken`, with the reason. `duplicates` gives, for a file with
    the same bytes as one before it, that one. They are left out unless `keep_duplicates`: in a
    training a second copy in the batch would count as a wrong answer, and in a search the copy of a
    reference would be found first. A warning counts what was left out. Raises FileNotFoundError for
    a missing folder, ValueError where no image is left.
    """

    @checked(folder=path_name())
    def __init__(self, folder: str | Path, keep_duplicates: bool = False):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            fault = f"there is no folder {self.folder}"
            raise FileNotFoundError(f"{fault}; images= names a folder of images")
        self.files: list[Path] = []
        self.broken: dict[Path, str] = {}
        self.duplicates: dict[Path, Path] = {}
        formats = _formats()
        readable = {e for e, name in Image.registered_extensions().items() if name in formats}
        found = _files(self.folder, self.broken)
        found = sorted(p for p in found if p.suffix.lower() in readable | UNREAD)
        listed = len(found) + len(self.broken)
        seen: dict[bytes, Path] = {}
        digest = hashlib.sha256()
        for path in tqdm(found, desc="checking images", disable=len(found) < 500):
            if path.suffix.lower() not in readable:
                self.broken[path] = f"{path.suffix} is not read here; save it as PNG or JPEG"
                continue
            if not path.is_file():
                self.broken[path] = "it is no file, or a link that leads nowhere"
                continue
            try:
                data = file_bytes(path)
                own = hashlib.sha256(data).digest()
                if own not in seen:
                    with quiet():
                        decode(data)
            except Exception as error:  # whatever a decoder throws at a broken file
                self.broken[path] = reason(error)
                continue
            if own in seen:
                self.duplicates[path] = seen[own]
                if not keep_duplicates:
                    continue
            seen.setdefault(own, path)
            digest.update(own)
            self.files.append(path)
        self.key = digest.hexdigest()
        self._report(f"{len(self.broken)} of {listed}", len(found), keep_duplicates)

    def _report(self, broken: str, found: int, kept: bool) -> None:
        """Warns of what is broken or a copy. Raises ValueError where no image is left."""
        path, why = next(iter(self.broken.items()), (None, ""))
        if not self.files:
            said = f"; all {len(self.broken)} files are broken, the first: {path} ({why})"
            said = said if self.broken else ""
            raise ValueError(f"{self.folder} holds no image that can be read{said}")
        if self.broken:
            said = f"skipped {broken} files in {self.folder}, the first: {path} ({why})"
            warnings.warn(said, stacklevel=3)
        if self.duplicates:
            copy, first = next(iter(self.duplicates.items()))
            said = f"{'kept' if kept else 'left out'} {len(self.duplicates)} of {found} files in"
            said += f" {self.folder} that are copies of others, the first: {copy} is {first}"
            warnings.warn(said, stacklevel=3)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        with quiet():
            return read_image(self.files[i])


class ImageFiles(Sequence):
    """Image files as RGB pictures, each read when it is asked for."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Image.Image:
        return read_image(self.files[i])


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's remarks on odd metadata; a file that cannot be read still raises.

    To be entered in the main thread only: Python's list of warning filters belongs to all threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        # it becomes an error in `decode`
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        yield


def decode(source: bytes | Image.Image) -> Image.Image:
    """The bytes of an image file, or a PIL image, -> an upright RGB picture.

    Pictures are turned upright (EXIF), transparent ones are laid on white, palettes and CMYK become
    RGB, the first frame of an animation is taken, 16-bit grey is scaled to 8. Raises what Pillow
    raises for a file that it cannot read, and ValueError for a format that is not in `FORMATS`, for
    a picture of more pixels than PIL.Image.MAX_IMAGE_PIXELS (Pillow itself only warns up to twice
    that), or for one longer than `LONGEST` times its short side.
    """
    most = Image.MAX_IMAGE_PIXELS
    try:
        if isinstance(source, bytes):
            source = Image.open(io.BytesIO(source), formats=_formats())
        image, count = source, f"{source.width} x {source.height}"
        bomb = most is not None and image.width * image.height > most
    except Image.DecompressionBombError as error:
        bomb, count = True, str(error)
    if bomb:
        raise ValueError(
            f"too large ({count}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS, now {most}"
        )
    # of a picture that was opened elsewhere, and that would be read now
    if image.format not in {None, *FORMATS}:
        raise ValueError(f"{image.format} is not read here; save it as PNG or JPEG")
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{count} pixels is more than {LONGEST} times as long as wide; crop it")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit or floating-point grey
        # no data: black
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        top = values.max()
        wide = image.mode.startswith("I;16") or top > 255
        if wide:
            values /= 257
        elif image.mode == "F" and top <= 1:
            values *= 255
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """What a decoder says of a broken file, without the address in memory that Pillow names."""
    return f"{type(error).__name__}: " + re.sub("image file <.*?>", "the file", str(error))


def file_bytes(path: str | Path) -> bytes:
    """An image file's bytes. Raises OSError, or ValueError for more than `LARGEST_FILE`."""
    if (size := os.stat(path).st_size) > LARGEST_FILE:
        fault = f"the file has {size / 2**30:.1f} GiB, more than any picture"
        raise ValueError(f"{fault}; is it another kind of file?")
    return Path(path).read_bytes()


@checked(path=path_name())
def read_image(path: str | Path, data: bytes | None = None) -> Image.Image:
    """An image file as an upright RGB picture (`decode`). data: its bytes, where they are known.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    try:
        return decode(file_bytes(path) if data is None else data)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a decoder throws at a broken file
        raise ValueError(f"{path} cannot be read as an image ({reason(error)})") from error


#: What training and embedding take: uint8 N x H x W x 3, a folder, or pictures.
Images = np.ndarray | ImageFolder | Sequence[Image.Image]


def check_images(images: object, what: str = "images") -> None:
    """Raises ValueError, with `what`, unless these are pictures: uint8 N x H x W x 3, folder, list.

    One picture alone is refused: its rows, or the letters of its name, would be taken for pictures.
    """
    if isinstance(images, ImageFolder):
        return
    one = isinstance(images, (str, bytes, os.PathLike, Image.Image, Mapping))
    if one or not hasattr(images, "__getitem__"):
        kind = type(images).__name__
        fault = f"{what} must be a list of pictures or an array N x H x W x 3, not one {kind}"
        raise ValueError(f"{fault}; put a picture into a list")
    if len(images) == 0:
        raise ValueError(f"{what} is empty; give at least one picture")
    if isinstance(images, np.ndarray):
        _check_array(images, what)
        if images.ndim != 4 or images.shape[3] != 3:
            fault = f"{what} must have the shape N x H x W x 3, not {images.shape}"
            raise ValueError(f"{fault}; for one picture give {what}[None]")
        return
    for i, image in enumerate(images):
        if isinstance(image, np.ndarray):
            _check_array(image, f"{what}[{i}]")
            if image.ndim != 2 and (image.ndim != 3 or image.shape[2] not in (3, 4)):
                raise ValueError(f"{what}[{i}] must have the shape H x W x 3, not {image.shape}")
        elif not isinstance(image, Image.Image):
            hint = "; isa_lite.support.images.read_image opens a file"
            hint *= isinstance(image, (str, os.PathLike))
            fault = f"{what}[{i}] must be a PIL image or a uint8 array H x W x 3"
            raise ValueError(f"{fault}, not a {type(image).__name__}{hint}")


def _check_array(array: np.ndarray, what: str) -> None:
    if array.dtype != np.uint8:
        hint = "; floats from 0 to 1: (255 * array).round().astype('uint8')"
        hint *= array.dtype.kind == "f"
        raise ValueError(f"{what} must hold uint8, 0 to 255, not {array.dtype}{hint}")
    if array.size == 0:
        raise ValueError(f"{what} has no pixels: its shape is {array.shape}")


def _picture(image: Image.Image | np.ndarray) -> Image.Image:
    return decode(image if isinstance(image, Image.Image) else Image.fromarray(image))


def images_key(images: Images) -> str:
    """A digest of every pixel, or of a folder's files. Raises ValueError for no pictures."""
    if isinstance(images, ImageFolder):
        return images.key
    check_images(images)
    digest = hashlib.sha256()
    for image in [images] if isinstance(images, np.ndarray) else images:
        array = np.ascontiguousarray(decode(image) if isinstance(image, Image.Image) else image)
        digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


class _Batches:
    """Batch number i of a list of index arrays, as pixels."""

    def __init__(self, images: Images, batches: Sequence[np.ndarray], to_pixels: Callable):
        self.images, self.batches, self.to_pixels = images, batches, to_pixels

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Tensor:
        chosen = self.batches[i]
        if isinstance(self.images, np.ndarray):
            return self.to_pixels(self.images[chosen])
        import torch

        # One after the other: a hundred photographs at their full size would take gigabytes.
        return torch.cat([self.to_pixels([self.images[int(j)]]) for j in chosen])


def batch_loader(
    images: Images, batches: Sequence[np.ndarray], to_pixels: Callable, num_workers: int = 0
) -> DataLoader:
    """Loads a B x 3 x H x W tensor for each array of indices in `batches`; with workers, ahead."""
    from torch.utils.data import DataLoader

    data = _Batches(images, batches, to_pixels)
    return DataLoader(data, batch_size=None, num_workers=num_workers)


def to_pixels(
    images: np.ndarray | Sequence[Image.Image | np.ndarray],
    preprocess: Callable[[Image.Image], Tensor],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Images -> B x 3 x H x W on the CPU, by `preprocess` or, at size x size, straight.

    Every picture is taken as `decode` gives it, as a file of it would be. Raises ValueError for
    what is no list of pictures.
    """
    import torch

    check_images(images)
    if not isinstance(images, np.ndarray) or images.shape[1:] != (size, size, 3):
        images = [_picture(image) for image in images]
        if any(image.size != (size, size) for image in images):
            return torch.stack([preprocess(image) for image in images])
        images = np.stack([np.asarray(image) for image in images])
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
