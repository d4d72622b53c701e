import json
import os

# With `-n`, the processes of pytest-xdist share the cores; set before torch is imported, and passed
# on to what a test starts.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import stand_in_tokenizer
from torch import nn

from isa_lite.models.matching_encoder import MatchingEncoder
from isa_lite.models.vl_model import VLModel, load_vl_model
from isa_lite.pretraining.towers import PretrainConfig, export, fresh_model


def write_vl_model(folder: Path) -> Path:
    """A tiny random VL model with a matching encoder, in open_clip's local-dir layout; also for
    fuzz.py.
    """
    config = PretrainConfig(
        image_size=64, embed_dim=16, vision_width=4, text_width=32, text_layers=1
    )
    vl = fresh_model(config)
    patches = vl.encode_pixels_and_patches(torch.zeros(1, 3, 64, 64))[1]  # 1 x N x width
    vl.matcher = MatchingEncoder(
        config.text_width, patches.shape[2], patches.shape[1], width=16, depth=1, heads=2
    )
    export(vl, config, folder)
    return folder


def write_blip(folder: Path, kind: str = "BlipForImageTextRetrieval") -> Path:
    """A tiny random BLIP of one of the kinds of transformers, with a tokenizer; also for
    fuzz.py.
    """
    import transformers

    text = dict(
        vocab_size=1100,
        hidden_size=32,
        encoder_hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    text |= dict(
        intermediate_size=64,
        max_position_embeddings=90,
        pad_token_id=0,
        bos_token_id=101,
        sep_token_id=102,
    )
    vision = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, image_text_hidden_size=16, projection_dim=16
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():  # large enough for texts and images to differ
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    stand_in_tokenizer(folder, [101], [102], 0)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]})
    )
    return folder


def nbval(folder: Path, *files: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    """What nbval says of notebooks, run strictly in `folder`."""
    options = ["-q", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)


def pytest_collection_modifyitems(items):
    """Slow tests first: a long one that begins last would keep a single process busy."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """Ctrl-C stops what a test starts, even where the tests run in the background of a shell, which
    ignores it for them.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def vl_folder(tmp_path_factory):
    return write_vl_model(tmp_path_factory.mktemp("vl_model"))


@pytest.fixture
def vl(vl_folder) -> VLModel:
    return load_vl_model(str(vl_folder))
