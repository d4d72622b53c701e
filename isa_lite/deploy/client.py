"""The query side without PyTorch: runs the files that `isa_lite.deploy.export` wrote, with
onnxruntime.

What a small server has to do, in numpy: cut the image to size, put the prompt together, run two
networks, and search. It imports no other module of this package, and neither torch nor torchvision;
a test holds it to that.

`python -m isa_lite client DIR --gallery FILE --image FILE --modifier TEXT` answers one query.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

#: The files of an exported query side; the settings hold a checksum of each of the others.
SETTINGS, IMAGE, TEXT, TOKENIZER = (
    "query.json",
    "image_to_sentence.onnx",
    "sentence_to_query.onnx",
    "tokenizer.json",
)
#: The id that stands where a pseudo-word goes; no word has it.
PLACEHOLDER = -1


#: As in `isa_lite.support.images`: how long and how large a picture may be, and the formats that
#: Pillow reads without another program.
LONGEST, LARGEST_FILE = 1000, 2**30
FORMATS = {
    *(
        "AVIF",
        "BLP",
        "BMP",
        "CUR",
        "DCX",
        "DDS",
        "DIB",
        "FITS",
        "FLI",
        "FTEX",
        "GBR",
        "GIF",
        "ICNS",
        "ICO",
        "IM",
        "IMT",
    ),
    *(
        "JPEG",
        "JPEG2000",
        "MCIDAS",
        "MPO",
        "MSP",
        "PCD",
        "PCX",
        "PIXAR",
        "PNG",
        "PPM",
        "PSD",
        "QOI",
        "SGI",
        "SPIDER",
        "SUN",
    ),
    *("TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
}
#: What the settings hold, and of which kind each is.
_KINDS = {
    "files": dict,
    "vl_model": str,
    "image_size": int,
    "mean": list,
    "std": list,
    "num_tokens": int,
    "context_length": int,
    "can_cut": bool,
    "pad_id": int,
    "prompt": list,
    "prompt_without_modifier": list,
}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A network to run on the CPU, with `threads` threads (0: as many as onnxruntime likes)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads wait in a loop for more work, also after a run is over, and then take the cores from
    # the next network's threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def decode(source: bytes | Image.Image) -> Image.Image:
    """A picture as `isa_lite.support.images.decode` gives it, and so as the gallery's were read:
    upright, RGB, laid on white.

    source: the bytes of a file, or a PIL image. Raises what Pillow raises, and ValueError for a
    format that is not in `FORMATS` and for a picture that is too large or too long to be resized.
    """
    most = Image.MAX_IMAGE_PIXELS
    Image.init()
    known = [name for name in Image.ID if name in FORMATS and name in Image.OPEN]
    try:
        image = (
            Image.open(io.BytesIO(source), formats=known) if isinstance(source, bytes) else source
        )
        bomb, count = (
            most is not None and image.width * image.height > most,
            f"{image.width} x {image.height}",
        )
    except Image.DecompressionBombError as error:
        bomb, count = True, str(error)
    if bomb:
        raise ValueError(
            f"too large ({count}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS, now {most}"
        )
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
        values = (
            values / 257 if wide else values * 255 if image.mode == "F" and top <= 1 else values
        )
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_image(path: str | Path) -> Image.Image:
    """An image file as `decode` gives it. Raises FileNotFoundError, or ValueError naming it."""
    path = _path("path", path)
    try:
        if (size := os.stat(path).st_size) > LARGEST_FILE:
            raise ValueError(f"the file has {size / 2**30:.1f} GiB, more than any picture")
        return decode(path.read_bytes())
    except FileNotFoundError:
        raise
    # whatever a decoder throws at a broken file; Pillow names an address in memory
    except Exception as error:
        reason = f"{type(error).__name__}: " + re.sub("image file <.*?>", "the file", str(error))
        raise ValueError(f"{path} cannot be read as an image ({reason})") from error


def _read_settings(path: Path) -> dict:
    """An export's settings. Raises ValueError naming the file and the first unusable one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); export again") from error

    def refuse(name: str) -> ValueError:
        return ValueError(f"{path}: {name!r} is missing or cannot be used; export again")

    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings of an export; export again")
    for name, kind in _KINDS.items():
        if type(found.get(name)) is not kind:
            raise refuse(name)
    for name, least, most in (
        ("image_size", 1, 2048),
        ("context_length", 1, 2**16),
        ("pad_id", 0, 2**31),
        ("num_tokens", 1, 2**16),
    ):
        if not least <= found[name] <= most:
            raise refuse(name)
    for name in ("mean", "std"):
        if len(found[name]) != 3 or not all(
            type(v) in (int, float) and abs(v) <= 1e6 for v in found[name]
        ):
            raise refuse(name)
    if min(found["std"]) <= 0:
        raise refuse("std")
    if set(found["files"]) != {IMAGE, TEXT, TOKENIZER}:
        raise refuse("files")
    if not isinstance(found.get("read", {}), dict):
        raise refuse("read")
    for name in ("prompt", "prompt_without_modifier"):
        for part in found[name]:
            ids = isinstance(part, list) and all(type(i) is int and 0 <= i < 2**31 for i in part)
            if not ids and part not in ("sentence", "modifier"):
                raise refuse(name)
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _opened(path: Path, opener: Callable, *arguments: object) -> Any:
    try:
        return opener(path, *arguments)
    except Exception as error:  # whatever the two libraries throw at a file that is none of theirs
        raise ValueError(f"{path} cannot be run ({_first_line(error)}); export again") from error


def _path(what: str, value: object) -> Path:
    if (
        not isinstance(value, (str, os.PathLike))
        or not os.fspath(value)
        or "\0" in os.fspath(value)
    ):
        raise ValueError(f"{what} must be a path, not {value!r}")
    return Path(value)


def _check_whole(what: str, value: object, least: int, most: int) -> None:
    if (
        not isinstance(value, (int, np.integer))
        or isinstance(value, bool)
        or not least <= value <= most
    ):
        raise ValueError(f"{what} must be a whole number from {least} to {most}, not {value!r}")


def _check_list(what: str, values: object) -> None:
    """Raises ValueError for one text or picture where a list of them is meant."""
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise ValueError(f"{what} must be a list, not one {type(values).__name__}")


class QueryClient:
    """Images and modifiers -> query embeddings, from a folder that `isa_lite.deploy.export` wrote.

    Raises FileNotFoundError for a folder without an export, and ValueError for a file that is not
    the one that was exported, or for a gallery's model (`vl_model`, a fingerprint) that is not the
    one of this query side.
    """

    def __init__(self, folder: str | Path, threads: int = 0, vl_model: str | None = None):
        folder = _path("folder", folder)
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {SETTINGS}; give the folder that python -m isa_lite export"
                " wrote"
            )
        # of a thousand million, onnxruntime would ask for the memory
        _check_whole("threads", threads, 0, 1024)
        self.settings = _read_settings(folder / SETTINGS)
        for name, expected in self.settings["files"].items():
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} holds no {name}, which its {SETTINGS} names; export again"
                )
            if checksum(folder / name) != expected:
                raise ValueError(
                    f"{folder / name} is not the file that was exported (its checksum differs);"
                    " export again"
                )
        if vl_model is not None and vl_model != self.settings["vl_model"]:
            raise ValueError(
                f"the query side in {folder} belongs to VL model {self.settings['vl_model']}, and"
                f" the gallery to {vl_model}; their embeddings mean nothing to one another: export"
                " the query side of that model, or embed the gallery again"
            )
        self._image, self._text = (
            _opened(folder / IMAGE, session, threads),
            _opened(folder / TEXT, session, threads),
        )
        self._tokenizer = _opened(folder / TOKENIZER, lambda path: Tokenizer.from_file(str(path)))
        self._settings_file = folder / SETTINGS
        # absent from files of earlier versions
        for text, ids in self.settings.get("read", {}).items():
            if self.words(text) != ids:
                raise ValueError(
                    f"{folder / TOKENIZER} reads {text!r} otherwise than when it was exported;"
                    " export again"
                )

    def _run(
        self, network: onnxruntime.InferenceSession, output: str, inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        try:
            return network.run([output], inputs)[0]
        except Exception as error:  # onnxruntime's errors have no common kind but this
            raise ValueError(
                f"the networks do not fit {self._settings_file} ({_first_line(error)}); export"
                " again"
            ) from error

    def pixels(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Images (PIL, or uint8 H x W x 3) -> B x 3 x H x W float32: the shorter side to size
        (bicubic), the middle, normalised.

        Raises ValueError for what is no list of pictures, and what `decode` raises.
        """
        _check_list("images", images)
        # its rows would be taken for pictures
        if isinstance(images, np.ndarray) and images.ndim != 4:
            raise ValueError(
                f"images must have the shape N x H x W x 3, not {images.shape}; give one array as"
                " array[None]"
            )
        size, rows = self.settings["image_size"], []
        for i, image in enumerate(images):
            if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
                if image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)):
                    image = Image.fromarray(image)
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"images[{i}] must be a PIL image or a uint8 array H x W x 3, not"
                    f" {_kind(image)}; isa_lite.deploy.client.read_image opens a file"
                )
            image = decode(image)
            width, height = image.size
            if min(width, height) != size:
                short = min(width, height)
                image = image.resize(
                    (int(size * width / short), int(size * height / short)),
                    Image.Resampling.BICUBIC,
                )
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            rows.append(np.asarray(image.crop((left, top, left + size, top + size))))
        # in memory too, or all that follows is slow
        pixels = np.stack(rows).transpose(0, 3, 1, 2).astype(np.float32, order="C")
        mean, std = (
            np.array(self.settings[key], np.float32)[:, None, None] for key in ("mean", "std")
        )
        pixels /= 255
        pixels -= mean
        pixels /= std
        return pixels

    def sentences(self, pixels: np.ndarray) -> np.ndarray:
        """B x 3 x H x W -> tokens B x L x D."""
        return self._run(self._image, "tokens", {"pixels": pixels})

    def words(self, text: str) -> list[int]:
        """Token ids of a piece of text, without start and end."""
        # "&amp;lt;" takes two rounds
        while (clean := " ".join(html.unescape(ftfy.fix_text(text)).split()).lower()) != text:
            text = clean
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def prompts(self, modifiers: Sequence[str]) -> np.ndarray:
        """Token ids of one prompt a modifier, B x T, with `PLACEHOLDER` where pseudo-words go; an
        empty modifier is left out.

        Raises ValueError for a modifier that does not fit, or is no text.
        """
        _check_list("modifiers", modifiers)
        s, rows = self.settings, []
        if wrong := [i for i, modifier in enumerate(modifiers) if not isinstance(modifier, str)]:
            raise ValueError(
                f"modifiers[{wrong[0]}] must be a text, not {modifiers[wrong[0]]!r}; an empty one"
                " asks for no change"
            )
        for modifier in modifiers:
            said, row = self.words(modifier), []
            for part in s["prompt" if modifier.strip() else "prompt_without_modifier"]:
                row += (
                    {"sentence": [PLACEHOLDER] * s["num_tokens"], "modifier": said}[part]
                    if isinstance(part, str)
                    else part
                )
            if len(row) > s["context_length"]:
                raise ValueError(
                    f"the prompt is {len(row) - s['context_length']} token(s) too long for the text"
                    f" tower's {s['context_length']}; shorten the modifier {modifier[:60]!r}"
                    f" ({len(said)} tokens)"
                )
            rows.append(row)
        # A causal text tower does not see what stands behind the end, so the longest prompt sets
        # the length.
        length = max(map(len, rows)) if s["can_cut"] else s["context_length"]
        return np.array([row + [s["pad_id"]] * (length - len(row)) for row in rows], np.int64)

    def compose(self, tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Sentences B x L x D and prompts B x T -> L2-normalised query embeddings B x E."""
        return self._run(self._text, "query", {"tokens": tokens, "ids": ids})

    def encode(
        self, images: Sequence, modifiers: Sequence[str], batch_size: int = 128
    ) -> np.ndarray:
        """Images and one modifier each -> L2-normalised query embeddings, B x E float32."""
        _check_list("images", images)
        _check_list("modifiers", modifiers)
        _check_whole("batch_size", batch_size, 1, 2**31)
        if len(images) != len(modifiers) or not len(images):
            raise ValueError(
                f"{len(images)} images but {len(modifiers)} modifiers; give at least one image, and"
                " as many modifiers"
            )
        starts = range(0, len(images), batch_size)
        # first, as it may refuse one
        prompts = [self.prompts(modifiers[s : s + batch_size]) for s in starts]
        sentences = (self.sentences(self.pixels(images[s : s + batch_size])) for s in starts)
        return np.concatenate(
            [self.compose(tokens, ids) for tokens, ids in zip(sentences, prompts, strict=True)]
        )


def _kind(value: object) -> str:
    """What somebody gave instead of a picture, for a message."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} with the shape {value.shape}"
    return f"a {type(value).__name__}"


def read_gallery(path: str | Path) -> tuple[np.ndarray, list[str | int], str]:
    """What `isa_lite.retrieval.gallery.Gallery.save` wrote: embeddings N x E, their ids, and the
    fingerprint of the model.

    Raises FileNotFoundError, or ValueError naming the file, and the first row that is not finite or
    has not the length 1.
    """
    path = _path("path", path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no gallery {path}; isa_lite.retrieval.gallery.Gallery.save writes one"
        )
    try:
        with safe_open(path, "np") as file:
            info = json.loads((file.metadata() or {}).get("info", "null"))
            embeddings = file.get_tensor("embeddings") if "embeddings" in file.keys() else None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or no gallery ({error}); save the Gallery again"
        ) from error
    if embeddings is None or not isinstance(info, Mapping) or not isinstance(info.get("ids"), list):
        raise ValueError(
            f"{path} is no gallery: it lacks embeddings or ids;"
            " isa_lite.retrieval.gallery.Gallery.save writes one"
        )
    ids, model = info["ids"], info.get("vl_model")
    if (
        embeddings.ndim != 2
        or len(embeddings) != len(ids)
        or not len(ids)
        or embeddings.dtype.kind != "f"
    ):
        raise ValueError(
            f"{path}: embeddings of the shape {embeddings.shape} do not belong to {len(ids)} ids"
        )
    if (
        not all(type(i) in (str, int) for i in ids)
        or len(set(ids)) < len(ids)
        or not isinstance(model, str)
    ):
        raise ValueError(
            f"{path}: the ids must be different texts or whole numbers, and vl_model a text"
        )
    lengths = np.linalg.norm(embeddings.astype(np.float32, copy=False), axis=1)
    if (wrong := ~(np.abs(lengths - 1) <= 0.01)).any():
        raise ValueError(
            f"{path}: the embedding of {ids[int(wrong.argmax())]!r} is not finite or has not the"
            " length 1"
        )
    return embeddings, ids, model
