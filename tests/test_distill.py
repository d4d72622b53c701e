"""Distillation: it repeats, resumes, learns, sees images alone, and reads whatever images there
are.
"""

import ast
import inspect
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import isa_lite
from isa_lite.distill import DistillConfig, distill
from isa_lite.models.vl_model import VLModel, load_vl_model
from isa_lite.prompt import Prompt, read_sentences
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support import checkpoint as checkpoint_module
from isa_lite.support import draws
from isa_lite.support.draws import Batches, batch_indices, blur, other_indices
from isa_lite.support.history import own_image_recall
from isa_lite.support.images import ImageFolder, images_key
from isa_lite.support.learning_rate import learning_rate
from isa_lite.targets import targets
from isa_lite.world.scenes import render_many, sample_scenes


def fresh(vl: VLModel, seed: int = 0, **settings) -> QueryEncoder:
    torch.manual_seed(seed)
    small = {"backbone": "mobilenetv4_conv_small_050", "num_tokens": 3, "width": 32, "depth": 1}
    return QueryEncoder.for_model(vl, **small | settings)


def tiny(**settings) -> DistillConfig:
    small = {
        "steps": 3,
        "batch_size": 4,
        "validation": 4,
        "validate_every": 2,
        "warmup": 2,
        "dtype": "float32",
    }
    return DistillConfig(**small | settings)


def trained(
    images,
    vl: VLModel,
    encoder: QueryEncoder | None = None,
    cache=None,
    checkpoint=None,
    minutes=100,
    **settings,
):
    """The weights at the end, and the history."""
    encoder = encoder or fresh(vl)
    history = distill(
        images, vl, encoder, tiny(**settings), cache, checkpoint, minutes, progress=False
    )
    return {k: v.clone() for k, v in encoder.state_dict().items()}, history


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def without_time(history) -> dict:
    return {k: v for k, v in asdict(history).items() if k != "seconds"}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return render_many(sample_scenes(20, 0), range(20), 64)


def told_apart(vl: VLModel, images: np.ndarray) -> VLModel:
    """A random image tower says nearly the same of every image; without what is common to all there
    is much to learn.
    """
    with torch.inference_mode():
        common = vl.clip.encode_image(vl.pixels(images)).mean(0)
        vl.clip.visual.attnpool.c_proj.bias -= common
    return vl


@pytest.fixture
def vl(vl_folder, images) -> VLModel:
    return told_apart(load_vl_model(str(vl_folder)), images)


@pytest.fixture
def no_model(monkeypatch):
    """Call it, and from then on the large image tower must not run."""

    def switch():
        for name in ("encode_pixels", "encode_pixels_and_patches"):
            monkeypatch.setattr(VLModel, name, lambda *args: pytest.fail("the large tower ran"))

    return switch


# --------------------------------------------------------------------------------------------
# repetition


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(vl, images):
    weights, history = trained(images, vl)
    again, history_again = trained(images, vl)
    assert same(weights, again) and without_time(history) == without_time(history_again)
    assert not same(weights, trained(images, vl, seed=1)[0])
    assert not same(weights, fresh(vl).state_dict())
    assert [step for step, _ in history.recall] == [2, 3] and len(history.gcd) == len(
        history.lar
    ) == len(history.matched) == 3
    assert all(0 <= value <= 100 for _, value in history.recall) and history.seconds > 0


def test_workers_and_the_form_of_the_images_change_nothing(vl, images, tmp_path):
    weights = trained(images, vl)[0]
    assert same(weights, trained(images, vl, num_workers=1)[0])
    pictures = [Image.fromarray(i) for i in images]
    assert same(weights, trained(pictures, vl)[0])
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i:02}.png")
    assert same(weights, trained(ImageFolder(tmp_path), vl, num_workers=1)[0])


@pytest.mark.parametrize(
    "change",
    [{"gcd": [True, 1.0, 1.0]}, {"gcd": [1.0]}, {"lar": [float("nan")] * 3}, {"seconds": "long"}]
    + [{"recall": [[2, 50.0, 1]]}, {"nobody": 1}, {"matched": None}],
    ids=str,
)
def test_a_history_that_is_none_of_a_run_is_named(vl, images, tmp_path, change):
    trained(images, vl, checkpoint=tmp_path / "run")
    tensors, info = checkpoint_module.read_tensors(tmp_path / "run")
    info["history"] |= change
    checkpoint_module.write_tensors(tmp_path / "run", tensors, info)
    with pytest.raises(ValueError, match="run is damaged.*history"):
        trained(images, vl, checkpoint=tmp_path / "run")


def test_lower_precision_works_and_is_another_run(vl, images):
    weights, history = trained(images, vl, dtype="bfloat16")
    assert all(v.isfinite().all() for v in weights.values()) and np.isfinite(history.gcd).all()
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights.values())
    assert not same(weights, trained(images, vl)[0])


@pytest.mark.parametrize(
    "weights, freeze, stays", [("scenes", True, True), ("scenes", False, False), ("", True, False)]
)
def test_the_stem_of_learned_weights_stays_as_it_is_if_asked_to(vl, images, weights, freeze, stays):
    encoder = fresh(vl)
    # the record of a start: the weights do not matter here
    encoder.config.backbone_weights = weights
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    after, _ = trained(images, vl, encoder, freeze_stem=freeze)
    same_ones = {k for k in after if torch.equal(after[k], before[k])}
    stem = {k for k in after if k.startswith(("backbone.model.conv_stem.", "backbone.model.bn1."))}
    assert len(stem) == 6 and (stem <= same_ones) == stays
    assert not {k for k in same_ones - stem if ".weight" in k}
    assert trained(images, vl, encoder, freeze_stem=False) and not torch.equal(
        encoder.state_dict()[min(stem)], before[min(stem)]
    )


def test_the_vl_model_stays_as_it_is(vl, images):
    before, key = {k: v.clone() for k, v in vl.state_dict().items()}, vl.fingerprint
    encoder = fresh(vl)
    trained(images, vl, encoder)
    assert same(before, vl.state_dict()) and vl.fingerprint == key
    assert (
        not any(p.requires_grad or p.grad is not None for p in vl.parameters()) and not vl.training
    )
    # ready for use; all of it learned
    assert not encoder.training and all(p.grad is not None for p in encoder.parameters())


# -------------------------------------------------------------------------------------------------
# resuming


def child(vl_folder: str, folder: str, stop_at: str) -> None:
    """In a process of its own: distill, slowly, with a state of each step; die just before number
    `stop_at` is in place.
    """
    torch.set_num_threads(int(os.environ["THREADS"]))
    vl, written, replace = load_vl_model(vl_folder), [], os.replace

    def replace_or_die(part, path):
        written.extend([path] * (path.name == "run.safetensors"))
        if len(written) == int(stop_at):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)

    checkpoint_module.os.replace = replace_or_die
    # on resuming, what is saved replaces it
    encoder = fresh(vl, seed=9 if Path(folder, "run.safetensors").exists() else 0)
    pixels = encoder.pixels
    encoder.pixels = lambda images: time.sleep(0.2) or pixels(images)
    trained(
        np.load(Path(folder) / "images.npy"),
        vl,
        encoder,
        Path(folder) / "cache",
        Path(folder) / "run.safetensors",
        0,
        steps=12,
    )


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_with_the_same_weights(vl_folder, images, tmp_path):
    vl = load_vl_model(str(vl_folder))
    whole, history = trained(images, vl, steps=12)
    np.save(tmp_path / "images.npy", images)
    run = tmp_path / "run.safetensors"
    paths = [str(Path(isa_lite.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "THREADS": str(torch.get_num_threads()),
    }

    def start(stop_at: int) -> subprocess.Popen:
        call = f"import test_distill; test_distill.child({str(vl_folder)!r}, {str(tmp_path)!r}, {stop_at})"
        return subprocess.Popen([sys.executable, "-c", call], env=environment, cwd=tmp_path)

    process = start(100)  # killed from outside, at any moment after the first state
    deadline = time.monotonic() + 120
    while not run.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 1.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL and run.exists()
    first = checkpoint_module.read_tensors(run)[1]["step"]
    assert first in range(12)
    if 0 < first < 10:
        # killed at the worst moment: the next state but one is written and not yet in place
        process = start(2)
        assert process.wait(timeout=120) == -signal.SIGKILL
        assert checkpoint_module.read_tensors(run)[1]["step"] == first + 1
    resumed, history_resumed = trained(
        images, vl, fresh(vl, seed=5), tmp_path / "cache", run, steps=12
    )
    assert same(whole, resumed)
    assert (history_resumed.gcd, history_resumed.lar, history_resumed.matched) == (
        history.gcd,
        history.lar,
        history.matched,
    )


def test_a_finished_run_is_only_read(vl, images, tmp_path, no_model):
    weights, history = trained(images, vl, None, tmp_path, tmp_path / "run")
    no_model()
    again, history_again = trained(images, vl, fresh(vl, seed=3), tmp_path, tmp_path / "run")
    assert same(weights, again) and without_time(history_again) == without_time(history)
    stored = checkpoint_module.read_tensors(tmp_path / "run")[1]["history"]["seconds"]
    # a run that is only read counts on from the time that training took
    assert 0 < stored <= history_again.seconds


@pytest.mark.slow
@pytest.mark.parametrize("what", ["config", "images", "vl_model", "encoder"])
def test_a_checkpoint_of_another_run_is_refused_and_not_taken_over(
    vl, vl_folder, images, tmp_path, what
):
    trained(images, vl, checkpoint=tmp_path / "run")
    written = (tmp_path / "run").read_bytes()
    settings = {"seed": 1} if what == "config" else {}
    others = images[::-1].copy() if what == "images" else images
    other = told_apart(load_vl_model(str(vl_folder)), images)
    if what == "vl_model":
        other.clip.text_projection[0, 0] += 1
    # the encoder of another length does not even fit the weights
    encoder = fresh(other, seed=2, num_tokens=4 if what == "encoder" else 3)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=f"run belongs to another run.*{what}"):
        trained(others, other, encoder, checkpoint=tmp_path / "run", **settings)
    assert (tmp_path / "run").read_bytes() == written
    assert same(before, encoder.state_dict())


# ------------------------------------------------------------------------------------- what it
# learns from


def test_images_are_all_that_comes_in():
    """No argument for captions or triplets, and no module within reach that makes or reads any."""
    assert list(inspect.signature(distill).parameters) == [
        *(
            "images",
            "vl",
            "encoder",
            "config",
            "cache",
            "checkpoint",
            "checkpoint_minutes",
            "progress",
            "loss",
        )
    ]
    root, seen, todo = Path(isa_lite.__file__).parents[1], set(), ["isa_lite.distill"]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(
            ast.parse(root.joinpath(*name.split(".")).with_suffix(".py").read_text())
        ):
            assert not (isinstance(node, ast.ImportFrom) and node.level), (
                "the search below takes imports for absolute ones"
            )
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            else:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            todo += [n for n in names if root.joinpath(*n.split(".")).with_suffix(".py").is_file()]
    places = {name.split(".")[1] for name in seen}
    assert {
        "distill",
        "losses",
        "prompt",
        "query_encoder",
        "token_learner",
        "models",
        "support",
    } == places - {
        "mappings",
        "targets",
    }
    assert {"isa_lite.models.vl_model", "isa_lite.support.checkpoint"} <= seen


def test_training_lowers_the_loss_below_chance(vl, images):
    plain = {"word_noise": 0.0, "negatives": 0}
    # the same eight images at every step
    gcd = trained(images, vl, steps=12, batch_size=8, validation=12, **plain)[1].gcd
    assert gcd[-1] < gcd[0] and gcd[-1] < np.log(8) - 0.2


def test_noise_is_as_long_as_said_and_belongs_to_its_step(vl, images):
    tokens = torch.randn(50, 4, 64) * 3
    noisy = blur(tokens, 0.5, step=7, seed=1)
    assert ((noisy - tokens).norm(dim=-1) / tokens.norm(dim=-1)).mean() == pytest.approx(
        0.5, rel=0.03
    )
    assert (noisy - tokens).mean().abs() < 0.02
    assert torch.equal(noisy, blur(tokens, 0.5, step=7, seed=1)) and torch.equal(
        tokens, blur(tokens, 0, step=7, seed=1)
    )
    assert not torch.equal(noisy, blur(tokens, 0.5, step=8, seed=1)) and not torch.equal(
        noisy, blur(tokens, 0.5, step=7, seed=2)
    )
    assert not same(trained(images, vl, word_noise=0)[0], trained(images, vl, word_noise=0.5)[0])


def test_lar_counts_with_and_without_a_matching_encoder(vl, images):
    runs = {}
    for matcher in (vl.matcher, None):
        vl.matcher = matcher
        for weight in (0, 0.1, 1.0):
            runs[matcher is None, weight], history = trained(images, vl, lar_weight=weight)
            assert len(history.lar) == (3 if weight else 0) and np.isfinite(history.lar).all()
            if weight:
                assert len(history.matched) == (0 if matcher is None else 3) and all(
                    0 <= m <= 1 for m in history.matched
                )
    # without LAR nobody asks for the matching encoder
    assert same(runs.pop((True, 0)), runs[False, 0])
    states = list(runs.values())
    assert not any(same(a, b) for i, a in enumerate(states) for b in states[:i])


def test_images_held_back_are_not_trained_on(vl, images, monkeypatch):
    encoder = fresh(vl)
    seen, pixels = [], encoder.pixels

    def watch(batch):
        if encoder.training:
            seen.extend(b.tobytes() for b in batch)
        return pixels(batch)

    encoder.pixels = watch
    trained(images, vl, encoder, steps=8)
    assert len(set(seen)) == 16 and len(seen) == 8 * 4  # all but the four, and each of them twice


@pytest.mark.parametrize("count, batch_size", [(10, 4), (16, 8), (7, 7), (5, 100), (9, 2)])
def test_batches_are_a_new_permutation_every_epoch_and_a_function_of_seed_and_step(
    count, batch_size
):
    per_epoch = max(1, count // batch_size)
    epochs = []
    for epoch in range(4):
        batches = [
            batch_indices(count, batch_size, epoch * per_epoch + i, seed=7)
            for i in range(per_epoch)
        ]
        epochs.append(np.concatenate(batches).tolist())
        assert all(len(b) == min(batch_size, count) for b in batches)
        assert len(set(epochs[-1])) == len(epochs[-1]) and set(epochs[-1]) <= set(range(count))
    assert len({tuple(e) for e in epochs}) == 4
    last = 4 * per_epoch - 1
    # whatever was asked before
    assert np.array_equal(batch_indices(count, batch_size, last, 7), batches[-1])
    assert not np.array_equal(batch_indices(count, batch_size, last, 8), batches[-1])


def test_batches_are_drawn_when_asked_for_and_an_epoch_once(monkeypatch):
    rows, drawn = np.arange(100, 140), []
    real = np.random.default_rng
    monkeypatch.setattr(draws.np.random, "default_rng", lambda key: drawn.append(key) or real(key))
    batches = Batches(rows, 8, 1234, 3, 1_000_000)
    assert len(batches) == 999_997 and not drawn
    found = [batches[i] for i in range(12)]  # steps 3 to 14, of epochs 0 to 2
    assert len(drawn) == 3
    for step, batch in enumerate(found, 3):
        assert np.array_equal(batch, rows[batch_indices(40, 8, step, 1234)])
    assert np.array_equal(Batches(rows, 8, 1234, 3, 9, in_order=True)[0], np.sort(found[0]))


def test_pictures_of_a_validation_and_of_a_batch_come_and_go(vl):
    """Not all at their full size at once: the memory holds a few, however many there are."""
    alive, most = set(), []

    class Pictures(Sequence):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Image.Image:
            picture = Image.new("RGB", (90, 70), (i, 2 * i, 3 * i))
            alive.add(i)
            weakref.finalize(picture, alive.discard, i)
            most.append(len(alive))
            return picture

    known = np.eye(40, vl.word_width, dtype=np.float32)
    known = known[:, : vl.encode_text(["a"]).shape[1]]
    prompt = Prompt.of(vl, 3)
    queries = lambda tokens: read_sentences(vl, tokens, prompt)[0]  # noqa: E731
    own_image_recall(Pictures(), np.arange(40), known, fresh(vl), queries)
    assert len(most) == 40 and max(most) <= 3


def test_negatives_are_other_images_and_a_function_of_seed_and_step():
    batch = np.array([3, 0, 17])
    assert other_indices(20, batch, 8192, 0, 0).tolist() == [i for i in range(20) if i not in batch]
    drawn = [
        other_indices(20, batch, 5, step, seed) for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert all(len(set(d)) == 5 and not set(d) & set(batch) for d in drawn)
    assert (
        (drawn[0] == drawn[1]).all()
        and (drawn[0] != drawn[2]).any()
        and (drawn[0] != drawn[3]).any()
    )
    assert len(other_indices(20, batch, 0, 0, 0)) == 0


def test_negatives_outside_the_batch_count(vl, images):
    gcd = {n: trained(images, vl, negatives=n, steps=1)[1].gcd[0] for n in (0, 12)}
    assert gcd[12] > gcd[0]  # 16 images to choose among, not 4


def test_learning_rate_warms_up_and_ends_at_a_hundredth():
    config = tiny(steps=1000, warmup=100, lr=2e-3)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-3 / 100) and rates[9] == pytest.approx(2e-3 / 10, rel=1e-3)
    assert rates[:99] == sorted(rates[:99]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert max(rates) == pytest.approx(2e-3, rel=0.03) and max(rates) <= 2e-3
    assert rates[500] == pytest.approx(2e-3 * 0.505) and rates[-1] == pytest.approx(2e-5, rel=0.01)
    assert learning_rate(0, tiny(warmup=0, lr=1.0)) == pytest.approx(1)


@pytest.mark.parametrize(
    "field, value",
    [
        *(
            (f, v)
            for f in ("steps", "validate_every", "batch_size", "validation")
            for v in (0, -3, 1.5, "3", None)
        ),
        *(
            ("batch_size", 1),
            ("validation", 1),
            ("warmup", -1),
            ("num_workers", -1),
            ("seed", -1),
            ("seed", 0.5),
            ("seed", None),
        ),
        *(
            ("lr", 0),
            ("lr", -1e-3),
            ("lr", "fast"),
            ("lr", None),
            ("lr", True),
            ("temperature", 0),
            ("temperature", -0.1),
        ),
        *(("word_noise", -0.1), ("word_noise", math.inf)),
        *(
            ("gcd_weight", -1),
            ("gcd_weight", math.inf),
            ("lar_weight", -0.1),
            ("lar_weight", None),
            ("weight_decay", -1),
            ("weight_decay", "0"),
        ),
        *(("dtype", "int8"), ("dtype", "float16"), ("dtype", "float64"), ("dtype", None)),
        *(
            ("lr", math.nan),
            ("lr", math.inf),
            ("temperature", math.nan),
            ("lar_weight", math.nan),
            ("steps", True),
        ),
        *(("template", "a photo of {sentence}"), ("template", "")),
    ],
)
def test_settings_that_cannot_work_are_named(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        DistillConfig(**{field: value})


def test_too_few_images(vl, images):
    with pytest.raises(ValueError, match="20 images.*19.*validation"):
        trained(images, vl, validation=19)
    # two to train on are enough, in a batch that is smaller than asked for
    trained(images[:6], vl, validation=4, steps=1)


# --------------------------------------------------------------------------------------------------
# targets


def test_targets_are_what_the_large_tower_says(vl, images, tmp_path):
    many = np.concatenate([images] * 7)  # 140: more than one batch
    with torch.no_grad():
        expected, patches = vl.encode_pixels_and_patches(vl.pixels(many))
    assert (expected[:20] @ expected[:20].T).min() < 0.5  # the order matters
    for cache in (None, tmp_path):
        for workers in (0, 1):
            known = targets(many, vl, True, cache, workers)
            # `told_apart` magnifies what a batch of another size rounds otherwise.
            assert np.allclose(known.embeddings, vl.encode_images(many), atol=5e-3)
            assert np.allclose(known.embeddings, expected, atol=5e-3)
            assert (
                np.allclose(known.patches, patches, atol=1e-5) and known.patches.dtype == np.float16
            )
    assert targets(images, vl, False).patches is None
    assert np.allclose(targets(images, vl, False).embeddings, vl.encode_images(images), atol=1e-5)


def test_targets_are_computed_once(vl, images, tmp_path, no_model):
    first = targets(images, vl, True, tmp_path)
    no_model()
    for patches in (True, False):
        again = targets(images.copy(), vl, patches, tmp_path)
        assert np.array_equal(again.embeddings, first.embeddings)
        assert np.array_equal(again.patches, first.patches) if patches else again.patches is None


def test_targets_with_patches_are_not_taken_from_a_cache_without(vl, images, tmp_path):
    targets(images, vl, False, tmp_path)
    known = targets(images, vl, True, tmp_path)
    assert np.array_equal(known.patches, targets(images, vl, True).patches)


def test_any_change_is_a_new_entry(vl, images, tmp_path):
    def entries() -> int:
        targets(images, vl, False, tmp_path)
        return len(list(tmp_path.iterdir()))

    assert entries() == 1 and entries() == 1
    images = images.copy()
    images[3, 5, 7, 1] ^= 1
    assert entries() == 2
    vl.clip.visual.conv1.weight[0, 0, 0, 0] += 1e-3
    assert entries() == 3
    vl.preprocess.transforms[-1].mean = [0.5, 0.5, 0.4]
    assert entries() == 4
    known = targets(images, vl, False, tmp_path)
    assert np.array_equal(known.embeddings, targets(images, vl, False).embeddings)


def test_a_digest_of_images_is_of_what_they_look_like(tmp_path):
    one = Image.new("P", (4, 4))
    one.putpalette([255, 0, 0])
    other = one.copy()
    other.putpalette([0, 0, 255])
    keys = {
        images_key([one]),
        images_key([other]),
        images_key([one, other]),
        images_key([other, one]),
    }
    assert len(keys) == 4
    array = np.zeros((2, 4, 6, 3), np.uint8)
    assert images_key(array) != images_key(array.reshape(2, 6, 4, 3)) != images_key(array[:1])


@pytest.mark.parametrize("patches", [True, False])
def test_half_computed_targets_are_not_taken_for_whole(vl, images, tmp_path, patches):
    many = np.concatenate([images] * 7)
    expected = targets(many, vl, patches)
    name, calls = ("encode_pixels_and_patches" if patches else "encode_pixels"), []

    def fail_the_second_time(self, pixels):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, pixels)

    encode = getattr(VLModel, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLModel, name, fail_the_second_time)
        with pytest.raises(KeyboardInterrupt):
            targets(many, vl, patches, tmp_path)
    # half of the work is kept
    assert sorted(p.name for p in tmp_path.rglob("*.embeddings.npy")) == ["000000.embeddings.npy"]
    calls.append(1)  # only what is missing is computed, and never more than that
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLModel, name, lambda self, pixels: calls.append(1) or encode(self, pixels))
        for _ in range(2):
            known = targets(many, vl, patches, tmp_path)
            assert np.array_equal(known.embeddings, expected.embeddings)
            assert not patches or np.array_equal(known.patches, expected.patches)
    assert len(calls) == 4
    for spoil in (
        Path.unlink,
        lambda p: p.write_bytes(p.read_bytes()[:-7]),
        lambda p: p.write_bytes(b""),
    ):
        for file in list(tmp_path.rglob("*.npy")):
            spoil(file)
            known = targets(many, vl, patches, tmp_path)
            assert np.array_equal(known.embeddings, expected.embeddings)
            assert not patches or np.array_equal(known.patches, expected.patches)


def test_rows_of_several_files_are_read_as_from_one_array(vl, images, tmp_path):
    many = np.concatenate([images] * 14)  # 280: three files
    one, shards = targets(many, vl, True).patches, targets(many, vl, True, tmp_path).patches
    assert len(shards.files) == 3 and shards.shape == one.shape
    for rows in (
        np.array([279, 0, 93, 94, 0, 187]),
        slice(0, 100),
        np.arange(280)[::-7],
        np.array([], dtype=int),
    ):
        assert np.array_equal(shards[rows], one[rows])


def test_two_runs_that_fill_one_cache_at_once_both_get_every_row(vl, images, tmp_path):
    many = np.concatenate([images] * 14)
    expected = targets(many, vl, True)
    with ThreadPoolExecutor(2) as pool:  # each writes what the other also writes
        runs = [pool.submit(targets, many, vl, True, tmp_path) for _ in range(2)]
        for found in (run.result() for run in runs):
            assert np.array_equal(found.embeddings, expected.embeddings) and np.array_equal(
                found.patches, expected.patches
            )


def test_what_are_no_images_is_refused(vl):
    for images in (3, None, {"a": 1}):
        with pytest.raises(ValueError, match="images must be"):
            distill(images, vl, fresh(vl), DistillConfig())


def test_targets_on_disk_that_are_no_numbers_are_named(vl, images, tmp_path):
    targets(images, vl, True, tmp_path)
    path = next(tmp_path.rglob("*.patches.npy"))
    content = np.load(path)
    content[1, 0] = np.nan
    np.save(path, content)
    known = targets(images, vl, True, tmp_path)
    assert (
        np.isfinite(known.patches[np.array([0, 2])]).all() and np.isfinite(known.embeddings).all()
    )
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        known.patches[np.array([0, 1])]
    path.write_bytes(path.read_bytes() + b"x")  # longer than it says
    assert np.isfinite(targets(images, vl, True, tmp_path).patches[:]).all()
    # numpy takes it for Python, and fails in its own way
    path.write_bytes(path.read_bytes().replace(b"'shape'", b"'shape\\", 1))
    assert np.isfinite(targets(images, vl, True, tmp_path).patches[:]).all()


def test_a_cache_that_is_a_file_is_refused_before_any_work(vl, images, tmp_path, no_model):
    (tmp_path / "cache").write_text("")
    no_model()
    with pytest.raises(ValueError, match="cache"):
        targets(images, vl, False, tmp_path / "cache")


# ------------------------------------------------------------------------------------------- image
# folders


def zoo(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Images of every kind, and what should be seen of each: H x W x 3 and by how much it may
    differ.
    """
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (9, 13, 3), np.uint8)
    grey, alpha = (rng.integers(0, 256, (9, 13), np.uint8) for _ in range(2))
    rgb[0, 0], alpha[0, :3] = (12, 34, 56), (0, 255, 128)
    picture, expected = Image.fromarray(rgb), {}

    def add(name: str, image: Image.Image, seen, off: int = 0, **options) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
        expected[name] = np.asarray(seen), off

    def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        share = alpha[..., None] / 255
        return np.round(color * share + 255 * (1 - share))

    three = np.repeat(grey[..., None], 3, 2)  # grey as RGB
    add("rgb.png", picture, rgb)
    # other bytes than rgb.png: copies are left out
    add("sub/UPPER.PNG", picture, rgb, compress_level=0)
    add("rgb.bmp", picture, rgb)
    add("rgb.tiff", picture, rgb)
    add("rgb.jpg", picture.resize((64, 64)), picture.resize((64, 64)), 90)
    add("rgba.png", Image.fromarray(np.dstack([rgb, alpha])), on_white(rgb, alpha), 1)
    add(
        "rgb with a transparent colour.png",
        picture,
        np.where((rgb == rgb[0, 0]).all(2, keepdims=True), 255, rgb),
        transparency=(12, 34, 56),
    )
    palette = picture.quantize(16)
    add("p.png", palette, palette.convert("RGB"))
    hole = np.asarray(palette) == 3
    add(
        "p with a transparent colour.png",
        palette,
        np.where(hole[..., None], 255, palette.convert("RGB")),
        transparency=3,
    )
    add("p.gif", palette, palette.convert("RGB"))
    add("l.png", Image.fromarray(grey), three)
    add("la.png", Image.fromarray(np.dstack([grey, alpha]), "LA"), on_white(three, alpha), 1)
    add("1.png", Image.fromarray(grey > 127), np.where(three > 127, 255, 0))
    cmyk = picture.convert("CMYK")
    add("cmyk.tiff", cmyk, cmyk.convert("RGB"))
    add("16 bits.png", Image.fromarray(grey.astype(np.uint16) * 257), three)
    add("32 bits.tiff", Image.fromarray(grey.astype(np.int32) * 257), three)
    add("float.tiff", Image.fromarray(grey.astype(np.float32)), three)
    add(
        "animated.gif",
        palette,
        palette.convert("RGB"),
        save_all=True,
        append_images=[palette.rotate(180)] * 3,
    )
    add("tiny.png", Image.new("RGB", (1, 1), "red"), [[[255, 0, 0]]])
    add("long.png", Image.new("RGB", (200, 1), "red"), np.full((1, 200, 3), (255, 0, 0)))
    for orientation, upright in {
        3: rgb[::-1, ::-1],
        6: np.rot90(rgb, -1),
        8: np.rot90(rgb),
        2: rgb[:, ::-1],
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"turned {orientation}.png", picture, upright, exif=exif)
    if features.check("webp"):
        add("rgb.webp", picture, rgb, lossless=True)
        add(
            "rgba.webp",
            Image.fromarray(np.dstack([rgb, alpha])),
            on_white(rgb, alpha),
            1,
            lossless=True,
            exact=True,
        )
    return expected


def test_images_of_every_kind(tmp_path):
    expected = zoo(tmp_path)
    for name in (
        "notes.txt",
        "captions.json",
        ".DS_Store",
        "LICENSE",
        "archive.tar.gz",
        "weights.safetensors",
    ):
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder.png").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = ImageFolder(tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in folder.files} == set(
        expected
    ) and folder.broken == {}
    assert len(folder) == len(expected)
    for i, path in enumerate(folder.files):
        seen, off = expected[str(path.relative_to(tmp_path))]
        assert folder[i].mode == "RGB"
        assert np.abs(np.asarray(folder[i], int) - seen.astype(int)).max() <= off, path.name


def test_distillation_takes_images_of_every_kind(vl, tmp_path):
    zoo(tmp_path / "images")
    weights, history = trained(ImageFolder(tmp_path / "images"), vl, cache=tmp_path / "cache")
    assert all(v.isfinite().all() for v in weights.values()) and np.isfinite(history.gcd).all()


def test_files_that_cannot_be_read_are_left_out_and_counted(tmp_path, images):
    for i in range(3):
        Image.fromarray(images[i]).save(tmp_path / f"{i}.png")
    Image.fromarray(images[3]).save(tmp_path / "cut.jpg")
    for name, data in {
        "cut.png": (tmp_path / "0.png").read_bytes()[:-200],
        "cut.jpg": (tmp_path / "cut.jpg").read_bytes()[:400],
        "text.jpg": b"no image at all",
        "empty.png": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
    with pytest.warns(UserWarning, match="skipped 4 of 7 files"):
        folder = ImageFolder(tmp_path)
    assert [p.name for p in folder.files] == ["0.png", "1.png", "2.png"]
    assert sorted(p.name for p in folder.broken) == [
        "cut.jpg",
        "cut.png",
        "empty.png",
        "text.jpg",
    ] and all(folder.broken.values())
    assert np.array_equal(np.asarray(folder[1]), images[1])


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no image"):
        ImageFolder(tmp_path)
    (tmp_path / "a.png").write_text("no image")
    (tmp_path / "b.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"no image.*2 files.*a\.png"):
        ImageFolder(tmp_path)


def test_the_key_of_a_folder_is_of_its_images(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    key = ImageFolder(tmp_path).key
    assert images_key(ImageFolder(tmp_path)) == key
    (tmp_path / "notes.txt").write_text("no image")
    assert ImageFolder(tmp_path).key == key
    Image.fromarray(images[1]).save(tmp_path / "b.png")
    two = ImageFolder(tmp_path).key
    Image.fromarray(images[2]).save(tmp_path / "b.png")
    assert len({key, two, ImageFolder(tmp_path).key}) == 3


def test_each_loss_can_be_switched_off_and_without_both_nothing_is_trained(images, vl):
    start = {k: v.clone() for k, v in fresh(vl).state_dict().items()}
    runs = {
        w: trained(images, vl, gcd_weight=w[0], lar_weight=w[1])
        for w in ((1.0, 0.0), (0.0, 0.3), (1.0, 0.3), (0.0, 0.0))
    }
    weights, history = runs.pop((0.0, 0.0))
    assert same(weights, start) and not history.gcd and [step for step, _ in history.recall] == [0]
    for weights, history in runs.values():
        assert len(history.gcd) == 3 and not same(weights, start)
    assert runs[1.0, 0.0][1].lar == [] and len(runs[0.0, 0.3][1].lar) == 3
    a, b, both = (runs[w][0] for w in ((1.0, 0.0), (0.0, 0.3), (1.0, 0.3)))
    assert not same(a, b) and not same(a, both) and not same(b, both)
