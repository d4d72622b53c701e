"""The query side without PyTorch: runs what `isa_lite.deploy.export` wrote, with onnxruntime.

What a small server has to do, in numpy: cut the image to size, put the prompt together, run two
networks, and search. It imports neither torch nor torchvision, nor does what it uses of this
package; a test holds it to that.

`python -m isa_lite client DIR --gallery FILE --image FILE --modifier TEXT` answers one query.

Shapes: B batch, L pseudo-words, T text positions, D word-embedding width, E embedding width.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

from isa_lite.support.checkpoint import Between, misfit, read_arrays, read_json
from isa_lite.support.images import check_images, decode
from isa_lite.support.parameters import check_texts, checked, path_name, whole

#: The files of an exported query side; the settings hold a checksum of each of the others.
SETTINGS, TOKENIZER = "query.json", "tokenizer.json"
IMAGE, TEXT = "image_to_sentence.onnx", "sentence_to_query.onnx"
#: The id that stands where a pseudo-word goes; no word has it.
PLACEHOLDER = -1
#: What the settings hold (`checkpoint.misfit`), and the limits of their whole numbers.
_LIMITS = {"image_size": (1, 2048), "num_tokens": (1, 2**16), "context_length": (1, 2**16)}
_LIMITS |= {"pad_id": (0, 2**31)}
_HELD = dict.fromkeys(_LIMITS, int) | {"vl_model": str, "can_cut": bool}
_HELD |= {"mean": (Between(-1e6, 1e6),) * 3, "std": (Between(1e-12, 1e6),) * 3}
_HELD |= {"files": dict.fromkeys((IMAGE, TEXT, TOKENIZER), str)}
_HELD |= {"prompt": [object], "prompt_without_modifier": [object]}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A network to run on the CPU, with `threads` threads (0: as many as onnxruntime likes)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads wait in a loop for more work, and would take the cores from the next network's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _read_settings(path: Path) -> dict:
    """An export's settings. Raises ValueError naming the file and the first unusable one."""
    found = read_json(path, "the settings of an export; export again", _HELD)

    def good(part: object) -> bool:
        if isinstance(part, list):
            return all(type(i) is int and 0 <= i < 2**31 for i in part)
        return part in ("sentence", "modifier")

    fits = {name: low <= found[name] <= high for name, (low, high) in _LIMITS.items()}
    fits |= {name: all(map(good, found[name])) for name in ("prompt", "prompt_without_modifier")}
    fits |= {"files": len(found["files"]) == 3, "read": isinstance(found.get("read", {}), dict)}
    for name, fit in fits.items():
        if not fit:
            raise ValueError(f"{path}: {name!r} cannot be used; export again")
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _opened(path: Path, opener: Callable, *arguments: object) -> Any:
    try:
        return opener(path, *arguments)
    except Exception as error:  # whatever the two libraries throw at a file that is none of theirs
        raise ValueError(f"{path} cannot be run ({_first_line(error)}); export again") from error


class QueryClient:
    """Images and modifiers -> query embeddings, from a folder that `isa_lite.deploy.export` wrote.

    Raises FileNotFoundError for a folder without an export, and ValueError for a file that is not
    the exported one, or for a gallery of another model (`vl_model`, its fingerprint).
    """

    # of a thousand million threads, onnxruntime would ask for the memory
    @checked(folder=path_name(), threads=whole(0, 1024))
    def __init__(self, folder: str | Path, threads: int = 0, vl_model: str | None = None):
        folder = Path(folder)
        if not (folder / SETTINGS).is_file():
            fault = f"{folder} holds no {SETTINGS}; give the folder"
            raise FileNotFoundError(f"{fault} that python -m isa_lite export wrote")
        self.settings = _read_settings(folder / SETTINGS)
        for name, expected in self.settings["files"].items():
            if not (folder / name).is_file():
                fault = f"{folder} holds no {name}, which its {SETTINGS} names"
                raise FileNotFoundError(f"{fault}; export again")
            if checksum(folder / name) != expected:
                fault = f"{folder / name} is not the file that was exported (its checksum differs)"
                raise ValueError(f"{fault}; export again")
        if vl_model is not None and vl_model != self.settings["vl_model"]:
            raise ValueError(
                f"the query side in {folder} belongs to VL model {self.settings['vl_model']}, and"
                f" the gallery to {vl_model}; their embeddings mean nothing to one another: export"
                " the query side of that model, or embed the gallery again"
            )
        self._image, self._text = (_opened(folder / n, session, threads) for n in (IMAGE, TEXT))
        self._tokenizer = _opened(folder / TOKENIZER, lambda path: Tokenizer.from_file(str(path)))
        self._settings_file = folder / SETTINGS
        # absent from files of earlier versions
        for text, ids in self.settings.get("read", {}).items():
            if self.words(text) != ids:
                fault = f"{folder / TOKENIZER} reads {text!r} otherwise than when it was exported"
                raise ValueError(f"{fault}; export again")

    def _run(
        self, network: onnxruntime.InferenceSession, output: str, inputs: dict[str, np.ndarray]
    ) -> np.ndarray:
        try:
            return network.run([output], inputs)[0]
        except Exception as error:  # onnxruntime's errors have no common kind but this
            fault = f"the networks do not fit {self._settings_file} ({_first_line(error)})"
            raise ValueError(f"{fault}; export again") from error

    def pixels(self, images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
        """PIL or uint8 H x W x 3 -> B x 3 x H x W float32: short side to size, middle, normalised.

        Raises ValueError for what is no list of pictures, and what `decode` raises.
        """
        check_images(images)
        size, rows = self.settings["image_size"], []
        for image in images:
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image = decode(image)
            short = min(image.size)
            if short != size:
                sides = [int(size * side / short) for side in image.size]
                image = image.resize(sides, Image.Resampling.BICUBIC)
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            rows.append(np.asarray(image.crop((left, top, left + size, top + size))))
        # in memory too, or all that follows is slow
        pixels = np.stack(rows).transpose(0, 3, 1, 2).astype(np.float32, order="C")
        mean, std = (np.array(self.settings[key], np.float32) for key in ("mean", "std"))
        pixels /= 255
        pixels -= mean[:, None, None]
        pixels /= std[:, None, None]
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
        """Ids of a prompt a modifier, B x T, `PLACEHOLDER` for pseudo-words; empty ones left out.

        Raises ValueError for a modifier that does not fit, or is no text.
        """
        s, rows = self.settings, []
        for modifier in check_texts(modifiers, "modifiers"):
            said, row = self.words(modifier), []
            for part in s["prompt" if modifier.strip() else "prompt_without_modifier"]:
                known = {"sentence": [PLACEHOLDER] * s["num_tokens"], "modifier": said}
                row += known[part] if isinstance(part, str) else part
            if len(row) > s["context_length"]:
                raise ValueError(
                    f"the prompt is {len(row) - s['context_length']} token(s) too long for the text"
                    f" tower's {s['context_length']}; shorten the modifier {modifier[:60]!r}"
                    f" ({len(said)} tokens)"
                )
            rows.append(row)
        # A causal tower does not see behind the end: the longest prompt sets the length.
        length = max(map(len, rows)) if s["can_cut"] else s["context_length"]
        return np.array([row + [s["pad_id"]] * (length - len(row)) for row in rows], np.int64)

    def compose(self, tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Sentences B x L x D and prompts B x T -> L2-normalised query embeddings B x E."""
        return self._run(self._text, "query", {"tokens": tokens, "ids": ids})

    @checked(batch_size=whole(1, 2**31))
    def encode(
        self, images: Sequence, modifiers: Sequence[str], batch_size: int = 128
    ) -> np.ndarray:
        """Images and one modifier each -> L2-normalised query embeddings, B x E float32."""
        check_images(images)
        if len(images) != len(check_texts(modifiers, "modifiers")):
            fault = f"{len(images)} images but {len(modifiers)} modifiers"
            raise ValueError(f"{fault}; give one for each image")
        starts = range(0, len(images), batch_size)
        # first, as it may refuse one
        prompts = [self.prompts(modifiers[s : s + batch_size]) for s in starts]
        sentences = (self.sentences(self.pixels(images[s : s + batch_size])) for s in starts)
        pairs = zip(sentences, prompts, strict=True)
        return np.concatenate([self.compose(tokens, ids) for tokens, ids in pairs])


@checked(path=path_name())
def read_gallery(path: str | Path) -> tuple[np.ndarray, list[str | int], str]:
    """What `Gallery.save` wrote: embeddings N x E, their ids, and the model's fingerprint.

    Raises FileNotFoundError, or ValueError naming the file, and the first row not of length 1.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no gallery {path}; Gallery.save writes one")
    arrays, info = read_arrays(Path(path))
    if fault := misfit(info, {"ids": [object, ...], "vl_model": str}):
        raise ValueError(f"{path} is no gallery: {fault}; Gallery.save writes one")
    ids, embeddings = info["ids"], arrays.get("embeddings", np.zeros(0))
    shape = embeddings.shape
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or len(embeddings) != len(ids):
        raise ValueError(f"{path}: embeddings of the shape {shape} do not belong to {len(ids)} ids")
    if not all(type(i) in (str, int) for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{path}: the ids must be different texts or whole numbers")
    lengths = np.linalg.norm(embeddings.astype(np.float32, copy=False), axis=1)
    if (wrong := ~(np.abs(lengths - 1) <= 0.01)).any():
        told = f"{path}: the embedding of {ids[int(wrong.argmax())]!r} is not finite"
        raise ValueError(f"{told} or has not the length 1")
    return embeddings, ids, info["vl_model"]
