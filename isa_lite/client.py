"""The query side without PyTorch: runs the files that `isa_lite.export` wrote, with onnxruntime.

What a small server has to do, in numpy: cut the image to size, put the prompt together, run two networks, and search.
It imports no other module of this package, and neither torch nor torchvision; a test holds it to that.

`python -m isa_lite client DIR --gallery FILE --image FILE --modifier TEXT` answers one query.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import hashlib
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from safetensors import safe_open
from tokenizers import Tokenizer

#: The files of an exported query side; the settings hold a checksum of each of the others.
SETTINGS, IMAGE, TEXT, TOKENIZER = "query.json", "image_to_sentence.onnx", "sentence_to_query.onnx", "tokenizer.json"
#: The id that stands where a pseudo-word goes; no word has it.
PLACEHOLDER = -1


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A network to run on the CPU, with `threads` threads (0: as many as onnxruntime likes)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads wait in a loop for more work, also after a run is over, and then take the cores from the next network's threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def read_image(path: str | Path) -> Image.Image:
    """An image file as `isa_lite.images.decode` gives it, and so as the gallery's were read: upright, RGB, laid on white.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a decoder throws at a broken file
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit or floating-point grey
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)  # no data: black
        wide = image.mode.startswith("I;16") or values.max() > 255
        values = values / 257 if wide else values * 255 if image.mode == "F" and values.max() <= 1 else values
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


class QueryClient:
    """Images and modifiers -> query embeddings, from a folder that `isa_lite.export` wrote.

    Raises FileNotFoundError for a folder without an export, and ValueError for a file that is not the one that was
    exported, or for a gallery's model (`vl_model`, a fingerprint) that is not the one of this query side.
    """

    def __init__(self, folder: str | Path, threads: int = 0, vl_model: str | None = None):
        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder} holds no {SETTINGS}; give the folder that python -m isa_lite export wrote")
        self.settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        for name, expected in self.settings["files"].items():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}, which its {SETTINGS} names; export again")
            if checksum(folder / name) != expected:
                raise ValueError(f"{folder / name} is not the file that was exported (its checksum differs); export again")
        if vl_model is not None and vl_model != self.settings["vl_model"]:
            raise ValueError(
                f"the query side in {folder} belongs to VL model {self.settings['vl_model']}, and the gallery to {vl_model}; "
                "their embeddings mean nothing to one another: export the query side of that model, or embed the gallery again"
            )
        self._image, self._text = session(folder / IMAGE, threads), session(folder / TEXT, threads)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))

    def pixels(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """Images -> B x 3 x H x W float32: the shorter side to size (bicubic), the middle cut out, normalised."""
        size, rows = self.settings["image_size"], []
        for image in images:
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            width, height = image.size
            if min(width, height) != size:
                short = min(width, height)
                image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            rows.append(np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB")))
        pixels = np.stack(rows).transpose(0, 3, 1, 2).astype(np.float32, order="C")  # in memory too, or all that follows is slow
        mean, std = (np.array(self.settings[key], np.float32)[:, None, None] for key in ("mean", "std"))
        pixels /= 255
        pixels -= mean
        pixels /= std
        return pixels

    def sentences(self, pixels: np.ndarray) -> np.ndarray:
        """B x 3 x H x W -> tokens B x L x D."""
        return self._image.run(["tokens"], {"pixels": pixels})[0]

    def words(self, text: str) -> list[int]:
        """Token ids of a piece of text, without start and end."""
        while (clean := " ".join(html.unescape(ftfy.fix_text(text)).split()).lower()) != text:  # "&amp;lt;" takes two rounds
            text = clean
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def prompts(self, modifiers: Sequence[str]) -> np.ndarray:
        """Token ids of one prompt a modifier, B x T, with `PLACEHOLDER` where pseudo-words go; an empty modifier is left out.

        Raises ValueError for a modifier that does not fit.
        """
        s, rows = self.settings, []
        for modifier in modifiers:
            said, row = self.words(modifier), []
            for part in s["prompt" if modifier.strip() else "prompt_without_modifier"]:
                row += {"sentence": [PLACEHOLDER] * s["num_tokens"], "modifier": said}[part] if isinstance(part, str) else part
            if len(row) > s["context_length"]:
                raise ValueError(
                    f"the prompt is {len(row) - s['context_length']} token(s) too long for the text tower's "
                    f"{s['context_length']}; shorten the modifier {modifier!r} ({len(said)} tokens)"
                )
            rows.append(row)
        # A causal text tower does not see what stands behind the end, so the longest prompt sets the length.
        length = max(map(len, rows)) if s["can_cut"] else s["context_length"]
        return np.array([row + [s["pad_id"]] * (length - len(row)) for row in rows], np.int64)

    def compose(self, tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Sentences B x L x D and prompts B x T -> L2-normalised query embeddings B x E."""
        return self._text.run(["query"], {"tokens": tokens, "ids": ids})[0]

    def encode(self, images: Sequence, modifiers: Sequence[str], batch_size: int = 128) -> np.ndarray:
        """Images and one modifier each -> L2-normalised query embeddings, B x E float32."""
        if len(images) != len(modifiers) or not len(images):
            raise ValueError(
                f"{len(images)} images but {len(modifiers)} modifiers; give at least one image, and as many modifiers"
            )
        starts = range(0, len(images), batch_size)
        prompts = [self.prompts(modifiers[s : s + batch_size]) for s in starts]  # first, as it may refuse one
        sentences = (self.sentences(self.pixels(images[s : s + batch_size])) for s in starts)
        return np.concatenate([self.compose(tokens, ids) for tokens, ids in zip(sentences, prompts, strict=True)])


def read_gallery(path: str | Path) -> tuple[np.ndarray, list[str], str]:
    """What `isa_lite.gallery.Gallery.save` wrote: embeddings N x E, their ids, and the fingerprint of the model."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no gallery {path}; isa_lite.gallery.Gallery.save writes one")
    with safe_open(path, "np") as file:
        info = json.loads(file.metadata()["info"])
        return file.get_tensor("embeddings"), info["ids"], info.get("vl_model", "")


if __name__ == "__main__":  # the old name of `python -m isa_lite client`
    from isa_lite.commands import main

    main(["client", *sys.argv[1:]])
