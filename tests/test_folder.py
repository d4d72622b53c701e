"""Pre-training on a folder of captioned images: relatives, the language of change, batches, and a
model that comes out of it.
"""

import json
import re
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from isa_lite.commands import main
from isa_lite.models.vl_model import load_vl_model
from isa_lite.pretraining.folder import _may_say, pretrain_folder
from isa_lite.pretraining.folder_batches import (
    CHANGES,
    LOSSES,
    FolderBatches,
    FolderConfig,
    Relatives,
    clauses_of,
    jitter,
    say_change,
    split,
)
from isa_lite.retrieval.own_data import read_captions
from isa_lite.support import training
from isa_lite.support.images import ImageFolder
from isa_lite.world import icons

TINY = dict(
    image_size=32,
    embed_dim=16,
    vision_width=4,
    text_width=32,
    text_layers=1,
    steps=4,
    matching_steps=2,
    batch_size=16,
    warmup=1,
)


def tiny(**settings) -> FolderConfig:
    return FolderConfig(**TINY | settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return icons.write_icons(tmp_path_factory.mktemp("icons"), 120, 20, size=32)


@pytest.fixture(scope="module")
def data(folder):
    images = ImageFolder(folder / "images")
    return images, read_captions(folder / "captions.csv", images)


def batches(data, **settings) -> FolderBatches:
    config = tiny(**settings)
    return FolderBatches(*data, split(data[1], config.held_out, config.seed)[0], config)


# ------------------------------------------------------------------------------------------------
# captions


def test_a_caption_falls_into_clauses_at_its_punctuation():
    assert clauses_of("Man: white hair, medium-light skin (tone) 4:30 o'clock.") == [
        ["man"], ["white", "hair"], ["medium-light", "skin"], ["tone"], ["4:30", "o'clock"],
    ]  # fmt: skip
    assert clauses_of("नमस्ते दुनिया") == [["नमस्ते", "दुनिया"]] and clauses_of("... !") == []


def test_relatives_differ_in_one_run_of_words_of_one_clause():
    captions = [
        "man student, dark skin tone",
        "woman student, dark skin tone",
        "man student, light skin tone",
        "man student",
        "boat",
    ]
    found, relatives = {}, Relatives(captions)
    for i in range(5):
        rng = np.random.default_rng(i)
        for _ in range(200 if relatives.places[i] else 1):
            drawn = relatives.draw(i, rng)
            if drawn:
                found.setdefault((i, drawn[0]), set()).add(drawn[1:])
    # the shortest run, and what it may take along
    swap = {("man", "woman"), ("man student", "woman student")}
    assert found[0, 1] == swap and found[1, 0] == {(b, a) for a, b in swap}
    assert found[0, 2] == {
        ("dark", "light"),
        ("dark skin", "light skin"),
        ("dark skin tone", "light skin tone"),
    }
    assert found[0, 3] == {("dark skin tone", "")} and found[3, 2] == {("", "light skin tone")}
    assert (1, 2) not in found  # two differences
    assert relatives.draw(4, np.random.default_rng(0)) is None


def test_captions_that_differ_in_punctuation_or_in_everything_are_no_relatives():
    four = ["a b c d end", "e f g h end"]  # one word more than relatives may differ in
    relatives = Relatives(
        ["red star", "Red, star!", "boat", "cat", "", "word " * 40, "word " * 39 + "other", *four]
    )
    assert not any(relatives.places)


def test_a_change_says_what_is_new_and_never_what_nothing_has_replaced():
    rng = np.random.default_rng(0)
    gains = {say_change("a man", "man", "woman", rng) for _ in range(300)}
    assert len(gains) == len(CHANGES) and all(
        t.startswith("a man, ") and "woman" in t for t in gains
    )
    added = {say_change("a man", "", "tall", rng) for _ in range(300)}
    assert len(added) == sum("{old}" not in c for c in CHANGES) and all(
        t.startswith("a man, ") and "tall" in t for t in added
    )
    lost = {say_change("a tall man", "tall", "", rng) for _ in range(300)}
    assert len(lost) == len(LOSSES) and all(
        re.search(r"(without|no|not|remove)( the)? tall$", t) for t in lost
    )


# -------------------------------------------------------------------------------------------------
# batches


def test_a_batch_shows_each_caption_once_and_describes_a_change_from_one_image_of_it_to_another(
    data,
):
    made = batches(data, batch_size=24)
    seen = 0
    for number in range(5):
        shown, texts, owner = made.source(1, 0, 9).chosen(number)
        first = [texts[owner.index(i)].removeprefix("a photo of ") for i in range(len(shown))]
        assert len(set(shown)) == len(shown) <= 25 and sorted(set(owner)) == list(range(len(shown)))
        assert len({" ".join(sorted(t.replace(",", "").split())) for t in first}) > 10
        for i, text in zip(shown, first, strict=True):
            assert text in data[1][i]
        for k in range(1, len(owner)):
            if owner[k] != owner[k - 1]:
                continue
            change = texts[k].removeprefix("a photo of ")
            origin = next(c for i in range(120) for c in data[1][i] if change.startswith(c + ", "))
            added = set(change.removeprefix(origin).replace(",", "").split())
            mine, theirs = (set(c.replace(",", "").split()) for c in (first[owner[k]], origin))
            # says something that only the new image has
            assert added & (mine - theirs), (change, first[owner[k]])
            seen += 1
    assert seen > 20


def test_a_batch_depends_on_seed_purpose_and_number_alone(data):
    made = batches(data)
    pixels, texts, owner = made.source(1, 4, 9)[2]
    again = batches(data).source(1, 6, 9)[0]
    assert pixels.shape[1:] == (32, 32, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, again[0]) and (texts, owner) == again[1:]
    for other in (
        made.source(1, 5, 9)[2],
        made.source(3, 4, 9)[2],
        batches(data, seed=1).source(1, 4, 9)[2],
    ):
        assert other[1] != texts
    # of about 16: other images too
    assert len({*made.chosen(0)[0]} & {*batches(data, seed=1).chosen(0)[0]}) < 8
    # asking for batches leaves the asked one alone
    assert len(made.source(1, 4, 9)) == 5 and len(made) == 0


def test_without_the_language_of_change_the_same_images_are_shown(data):
    with_change, without = batches(data), batches(data, change=0.0)
    for number in range(3):
        a, b = with_change.chosen(number), without.chosen(number)
        assert a[0] == b[0] and len(a[1]) > len(b[1]) == len(b[0])


def test_images_with_the_same_caption_never_share_a_batch(data):
    alike = [["A star"], ["a star."]] * 60
    assert len(FolderBatches(data[0], alike, np.arange(120), tiny()).chosen(0)[0]) == 1


def test_any_caption_of_an_image_is_drawn_and_its_share_stands_behind_the_prompt(data):
    two = [[f"a thing {i}", f"an object {i}"] for i in range(120)]
    made = batches((data[0], two), related=0.0)
    texts = [text for number in range(30) for text in made.chosen(number)[1]]
    assert len(texts) == 30 * 16  # one a picture: without relatives nothing is a change
    assert 0.4 < sum("thing" in text for text in texts) / len(texts) < 0.6
    # prompted: 0.25
    assert 0.15 < sum(text.startswith("a photo of ") for text in texts) / len(texts) < 0.35


def test_held_out_images_are_in_no_batch(data):
    config = tiny(held_out=0.25)
    rows, unseen = split(data[1], 0.25, 0)
    assert len(unseen) == 30 and sorted([*rows, *unseen]) == list(range(120))
    assert len({*unseen, *split(data[1], 0.25, 1)[1]}) > 40  # drawn by the seed, not the first ones
    made = FolderBatches(*data, rows, config)
    shown = {i for number in range(40) for i in made.chosen(number)[0]}
    assert shown == set(rows.tolist())
    # an image without a caption is not trained on
    assert set(split([["x"], [], ["y"], ["z"]], 0.0, 0)[0]) == {0, 2, 3}
    assert len(split([["x"], []] * 8, 0.5, 0)[1]) == 4  # half of those with a caption


def test_every_word_of_a_batch_has_a_vector_that_is_trained(data, vl):
    images, captions = data
    odd = [
        *captions[:-4],
        ["a (red) star!"],
        ["кошка ♥", "4:30 o'clock"],
        ["赤い星、白い"],
        ["½ – “x”!"],
    ]
    made = FolderBatches(images, odd, np.arange(120), tiny(change=1.0, related=1.0))
    known = set(vl.tokenizer(_may_say(made.texts, made.config)).unique().tolist())
    said = [t for number in range(60) for t in made.chosen(number)[1]]
    assert set(vl.tokenizer(said).unique().tolist()) <= known


def test_jitter_moves_pictures_by_a_little_and_knows_how_to_keep_still():
    picture = np.full((6, 40, 40, 3), 255, np.uint8)
    picture[:, 10:30, 10:30] = (10, 200, 30)
    moved = jitter(picture, 0.15, np.random.default_rng(0))
    assert np.array_equal(jitter(picture, 0, np.random.default_rng(0)), picture)
    assert (
        moved.shape == picture.shape
        and (moved[:, 20, 20] == (10, 200, 30)).all()
        and (moved[:, 0, 0] == 255).all()
    )
    # rows and columns from the middle
    centres = np.array([np.argwhere(m[..., 0] < 128).mean(0) for m in moved]) - 19.5
    assert (abs(centres) < 0.15 * 20 / 0.85 + 0.5).all() and (centres.std(0) > 0.5).all()
    covered = (moved[..., 0] < 128).mean((1, 2))
    assert (
        len(set(covered.round(3))) > 3
        and ((covered > 0.25 / 1.15**2 * 0.95) & (covered < 0.25 / 0.85**2 * 1.05)).all()
    )
    # the border goes on
    assert set(np.unique(jitter(picture[:, 12:28, 12:28], 0.15, np.random.default_rng(0)))) == {
        10,
        30,
        200,
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "^steps must be"),
        ({"batch_size": 7}, "^batch_size must be"),
        ({"change": 1.5}, "^change must be"),
        ({"held_out": 0.6}, "^held_out must be"),
        ({"image_size": 48}, "^image_size must be.* 32"),
        ({"zoom": float("nan")}, "^zoom must be"),
        ({"related": "x"}, "^related must be"),
        ({"device": "cuda:99"}, "^device"),
        ({"text_width": 40}, "^text_width must be.* 32"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


# ------------------------------------------------------------------------------------------------
# training


def quiet(_line: str) -> None:
    pass


def test_what_comes_out_is_a_model_of_open_clip_that_sees_as_training_did(data, tmp_path):
    vl = pretrain_folder(*data, tiny(held_out=0.1), tmp_path, log=quiet)
    assert vl.matcher is not None and vl.image_size == 32
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    theirs = torch.nn.functional.normalize(
        clip.eval().encode_image(preprocess(data[0][0])[None]), dim=-1
    )
    assert torch.allclose(vl.encode_images([data[0][0]]), theirs, atol=1e-5)
    table = clip.token_embedding.weight
    assert (
        table[vl.tokenizer.encode("star")].norm() > 0
        and table[vl.tokenizer.encode("but")].norm() > 0
    )
    assert table[vl.tokenizer.encode("zebra")].norm() == 0
    record = json.loads((tmp_path / "training.json").read_text())["data"]
    assert (
        record["images"] == 120
        and record["held out"] == 12
        and record["captions with a relative"] > 60
    )
    # of the others
    assert record["captions"] == sum(map(len, data[1])) - sum(
        len(data[1][i]) for i in split(data[1], 0.1, 0)[1]
    )


def test_a_picture_that_is_no_square_is_cut_as_open_clip_cuts_it(data, vl, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    made = FolderBatches(ImageFolder(tmp_path), [["x"]], np.array([0]), tiny(image_size=64))
    straight = torch.from_numpy(made.square(0).copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(vl.preprocess(made.images[0]), straight, atol=1e-6)


def test_a_run_resumes_and_refuses_other_data_and_other_settings(data, tmp_path, monkeypatch):
    whole = pretrain_folder(*data, tiny(), tmp_path / "a", log=quiet)

    class Stop(Exception):
        pass

    def stop(path, modules, optimizer, info):
        save_run(path, modules, optimizer, info)
        if info["step"] == 2:
            raise Stop

    save_run = training.save_run
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_run", stop)
        with pytest.raises(Stop):
            pretrain_folder(*data, tiny(), tmp_path / "b", tmp_path / "run", quiet, 0)
    assert (
        pretrain_folder(*data, tiny(), tmp_path / "b", tmp_path / "run", quiet).fingerprint
        == whole.fingerprint
    )
    images, captions = data
    with pytest.raises(ValueError, match="another run.*data"):
        pretrain_folder(
            images, [["another"], *captions[1:]], tiny(), tmp_path / "b", tmp_path / "run", quiet
        )
    with pytest.raises(ValueError, match="another run.*change.*0.7.*0.5"):
        pretrain_folder(
            images, captions, replace(tiny(), change=0.5), tmp_path / "b", tmp_path / "run", quiet
        )


def test_without_a_matching_encoder_none_of_an_earlier_model_stays(data, tmp_path):
    pretrain_folder(*data, tiny(steps=1), tmp_path, log=quiet)
    assert (tmp_path / "matching_encoder.safetensors").is_file()
    assert (
        pretrain_folder(*data, tiny(steps=1, matching_steps=0), tmp_path, log=quiet).matcher is None
    )
    assert load_vl_model(str(tmp_path)).matcher is None


def test_too_little_said_is_refused_and_what_is_cut_is_said(data, tmp_path):
    images, captions = data
    with pytest.raises(ValueError, match="1 different captions.*8"):
        pretrain_folder(images, [["A star"], ["a star."]] * 60, tiny(), tmp_path, log=quiet)
    with pytest.warns(UserWarning, match="1 captions.*77 tokens"):
        pretrain_folder(
            images,
            [["red star " * 50], *captions[1:]],
            tiny(steps=1, matching_steps=0),
            tmp_path,
            log=quiet,
        )


def test_the_command_trains_and_exports_or_says_what_is_wrong(folder, tmp_path, capsys):
    settings = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in (TINY | {"steps": 1, "matching_steps": 0}).items()
    ]
    command = ["--images", str(folder / "images"), "--out", str(tmp_path / "vl"), *settings]
    main(["pretrain_folder", *command, "--captions", str(folder / "captions.csv")])
    assert (
        load_vl_model(str(tmp_path / "vl")).image_size == 32
        and "local-dir:" in capsys.readouterr().out
    )
    assert (tmp_path / "vl" / "run" / "towers.safetensors").is_file()
    (tmp_path / "bad.csv").write_text("image,caption\nnowhere.png,x\n")
    with pytest.raises(SystemExit, match="2"):
        main(["pretrain_folder", *command, "--captions", str(tmp_path / "bad.csv")])
    assert re.search(
        "error: .*bad.csv.*row 2: 'nowhere.png' is not in the folder", capsys.readouterr().err
    )


@pytest.mark.slow
def test_training_learns_which_caption_belongs_to_which_icon(data, tmp_path):
    config = tiny(
        steps=60,
        matching_steps=0,
        batch_size=32,
        text_width=64,
        vision_width=8,
        embed_dim=32,
        lr=3e-3,
        related=0.2,
    )
    vl = pretrain_folder(*data, config, tmp_path, log=quiet)
    image, text = vl.encode_images(list(data[0])), vl.encode_text([c[0] for c in data[1]])
    place = ((text @ image.T) > (text * image).sum(1, keepdim=True)).sum(1).float().mean()
    assert place < 35  # of 120; blind guessing gives 60
