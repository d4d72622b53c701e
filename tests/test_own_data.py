"""A folder of the user's own: captions and triplets as people write them, and what is said about
those that cannot be used.
"""

import difflib
import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from isa_lite.course import figures
from isa_lite.methods.baselines import UNTRAINED
from isa_lite.methods.isa import Isa
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.own_data import (
    beside,
    fingerprint,
    part,
    read_captions,
    read_triplets,
    unseen_words,
)
from isa_lite.retrieval.queries import answers
from isa_lite.support.images import ImageFolder, images_key
from isa_lite.world import icons


@pytest.fixture
def folder(tmp_path):
    """Four images (one in a subfolder, one with an accent in its name as macOS stores it), and a
    file that is no image.
    """
    names = ["a.png", "b.png", "sub/c.png", unicodedata.normalize("NFD", "é.png")]
    for i, name in enumerate(names):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (60 * i, 90, 250 - 60 * i)).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("notes")
    return ImageFolder(tmp_path / "pictures")


def csv(folder: ImageFolder, content: str | bytes):
    path = folder.folder.parent / "captions.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def captions(folder: ImageFolder, content: str | bytes) -> dict[str, list[str]]:
    said = read_captions(csv(folder, content), folder)
    return {
        f.relative_to(folder.folder).as_posix(): c
        for f, c in zip(folder.files, said, strict=True)
        if c
    }


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_usual_table_is_read(folder, mark, delimiter, end):
    rows = [
        ["image", "caption"],
        ["a.png", "a cat"],
        ["b.png", '"one, two; three|four\tfive"'],
        ["sub/c.png", "a dog"],
    ]
    table = mark + end.join(delimiter.join(row) for row in rows) + end
    assert captions(folder, table) == {
        "a.png": ["a cat"],
        "b.png": ["one, two; three|four five"],
        "sub/c.png": ["a dog"],
    }


def test_columns_go_by_their_names_and_others_are_ignored(folder):
    table = 'id, Caption ,author,IMAGE\n1,a cat,me,a.png\n\n2,"a\ndog",me,b.png\n,,,\n'
    assert captions(folder, table) == {"a.png": ["a cat"], "b.png": ["a dog"]}


@pytest.mark.parametrize(
    "caption",
    [
        "кошка на столе",
        "赤い星、白い背景",
        "नमस्ते दुनिया",
        "قطة حمراء",
        "☃ 👩🏽‍🚀 ½",
        "null",
        "NA",
        "nan",
        "3",
        'a 5" disc',
        "naïve — “café”",
    ],
)
def test_any_unicode_is_a_caption_and_so_are_words_that_tables_take_for_gaps(folder, caption):
    assert captions(folder, f"image,caption\na.png,{caption}\n") == {"a.png": [caption]}


def test_several_captions_an_image_and_a_row_twice(folder):
    table = "image,caption\na.png,a cat\na.png,a red cat\na.png,a  cat \n./b.png,a dog\nsub\\c.png,a cow\n"
    assert captions(folder, table) == {
        "a.png": ["a cat", "a red cat"],
        "b.png": ["a dog"],
        "sub/c.png": ["a cow"],
    }


def test_a_name_is_found_whichever_way_its_accent_is_stored(folder):
    for form in ("NFC", "NFD"):
        (said,) = captions(
            folder, f"image,caption\n{unicodedata.normalize(form, 'é.png')},x\n"
        ).values()
        assert said == ["x"]


def test_an_absolute_path_inside_the_folder_is_as_good_as_a_relative_one(folder):
    assert captions(folder, f"image,caption\n{folder.folder.resolve() / 'sub/c.png'},x\n") == {
        "sub/c.png": ["x"]
    }


def test_what_is_said_about_a_copy_is_said_about_the_image_that_was_kept(folder):
    (folder.folder / "copy.png").write_bytes(folder.files[0].read_bytes())
    with pytest.warns(UserWarning, match="copies of others"):
        doubled = ImageFolder(folder.folder)
    assert captions(doubled, "image,caption\na.png,a kite\ncopy.png,a kite\ncopy.png,a ray") == {
        "a.png": ["a kite", "a ray"]
    }
    entry = {"reference": "copy.png", "modifier": "in red", "targets": ["b.png"]}
    assert triplets(doubled, [entry]).reference.tolist() == [0]
    with pytest.raises(ValueError, match="no target"):
        triplets(doubled, [{**entry, "targets": ["a.png"]}])
    with pytest.warns(UserWarning, match="copies of others"):
        kept = ImageFolder(folder.folder, keep_duplicates=True)
    assert captions(kept, "image,caption\na.png,a kite\ncopy.png,a ray") == {
        "a.png": ["a kite"],
        "copy.png": ["a ray"],
    }


@pytest.mark.parametrize("mark", ["&lt;end_of_text>", "&amp;lt;end_of_text>", "<start_of_text>"])
def test_a_caption_cannot_end_or_begin_the_text_in_its_middle(folder, vl, mark):
    (said,) = captions(folder, f"image,caption\na.png,one {mark} two\n")["a.png"]
    ids, tokenizer = vl.tokenize([said])[0].tolist(), vl.tokenizer
    assert ids.count(tokenizer.sot_token_id) == ids.count(tokenizer.eot_token_id) == 1
    assert tokenizer.encode("two")[0] in ids[: ids.index(tokenizer.eot_token_id)]


@pytest.mark.parametrize(
    "table, message",
    [
        ("", "first row.*''"),
        ("image,text\na.png,x\n", "first row.*'image,text'"),
        ("image,caption,caption\na.png,x,y\n", "names a column twice"),
        ("image,image,caption\na.png,b.png,x\n", "names a column twice"),
        ("image,caption\n", "holds no caption"),
        ("image,caption\na.png,\n", "1 of 1 rows.*row 2: 'a.png'.*empty caption"),
        ("image,caption\na.png,   \n", "row 2: 'a.png'.*empty caption"),
        ("image,caption\na.png\n", "row 2: 'a.png'.*empty caption"),
        ("image,caption\n,x\n", "row 2: names no image"),
        ("image,caption\na.png,x\n\nd.png,x\n", "row 4: 'd.png'.*pictures.*did you mean"),
        ("image,caption\nc.png,x\n", "row 2: 'c.png'.*pictures.*'sub/c.png'"),
        ("image,caption\nwww,x\n", "row 2: 'www' is not in.*pictures"),
        ("image,caption\n../a.png,x\n", r"row 2: '\.\./a.png'.*outside.*pictures"),
        ("image,caption\n/etc/a.png,x\n", "row 2: '/etc/a.png'.*outside.*pictures"),
        ("image,caption\nnotes.txt,x\n", "row 2: 'notes.txt'.*no image"),
        ("image,caption\na.png,one, two\n", "2 fields in line 2, saw 3.*quotes"),
        ('image,caption\na.png,"open\n', "double quotes"),
        ("image,caption\na.png,äx\n".encode("latin-1"), "UTF-8.*byte 20"),
        ("image,caption\na.png,x\n".encode("utf-16"), "is not UTF-8"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_refused_with_its_name_the_row_and_what_to_do(
    folder, table, message
):
    with pytest.raises(ValueError, match=message) as error:
        captions(folder, table)
    assert "captions.csv" in str(error.value)


def test_all_rows_are_reported_at_once_the_first_five_in_words(folder):
    with pytest.raises(ValueError, match=r"7 of 8 rows.*row 2.*row 6.*2 more") as error:
        captions(folder, "image,caption\n" + "a.png,\n" * 7 + "a.png,x\n")
    assert "row 7" not in str(error.value)


def test_a_file_that_is_broken_or_not_there(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        images = ImageFolder(tmp_path)
    (tmp_path / "captions.csv").write_text("image,caption\nb.png,x\n")
    with pytest.raises(ValueError, match="row 2.*'b.png'.*image"):
        read_captions(tmp_path / "captions.csv", images)
    with pytest.raises(FileNotFoundError, match="nowhere.csv.*captions="):
        read_captions(tmp_path / "nowhere.csv", images)


def test_a_file_is_found_in_the_folder_before_it_is_found_beside_it(folder):
    assert beside(folder, "captions.csv") is None
    outside = csv(folder, "image,caption\n")
    assert beside(folder, "captions.csv") == outside.resolve()
    (folder.folder / "captions.csv").write_text("")
    assert beside(folder, "captions.csv") == folder.folder / "captions.csv"


# ------------------------------------------------------------------------------------------------
# triplets


def triplets(folder: ImageFolder, content):
    path = folder.folder.parent / "triplets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_triplets(path, folder)


GOOD = {
    "reference": "a.png",
    "modifier": " in  blue ",
    "targets": ["b.png", "sub/c.png", "b.png", "a.png"],
}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_queries_are_read_and_a_reference_is_never_its_own_answer(folder, mark):
    found = triplets(
        folder,
        mark + json.dumps([GOOD, GOOD | {"reference": "b.png", "targets": ["a.png"], "note": 1}]),
    )
    names = [f.relative_to(folder.folder).as_posix() for f in folder.files]
    assert len(found) == 2 and found.texts == ["in blue"] * 2
    assert [names[i] for i in found.reference] == ["a.png", "b.png"]
    assert [[names[i] for i in t] for t in found.targets] == [["b.png", "sub/c.png"], ["a.png"]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "JSON"),
        ({}, "must be a list of"),
        ([], "list.*not empty"),
        (["a"], "entry 1: is 'a'.*object"),
        ([GOOD, {"reference": "a.png"}], "1 of 2 entries.*entry 2: lacks modifier, targets"),
        ([GOOD | {"modifier": 3}], "entry 1:.*modifier.*text"),
        ([GOOD | {"targets": "b.png"}], "entry 1: targets.*list"),
        ([GOOD | {"targets": [3]}], "entry 1: targets.*list"),
        ([GOOD | {"modifier": " "}], "entry 1:.*empty modifier"),
        ([GOOD | {"targets": []}], "entry 1:.*no target"),
        ([GOOD | {"targets": ["a.png"]}], "entry 1:.*no target"),
        ([GOOD | {"reference": "x"}], "entry 1: 'x' is not in"),
        ([GOOD | {"targets": ["../b.png"]}], r"entry 1: '\.\./b.png'.*outside"),
    ],
)
def test_triplets_that_cannot_be_used_are_refused(folder, content, message):
    with pytest.raises(ValueError, match=message) as error:
        triplets(folder, content)
    assert "triplets.json" in str(error.value)


def test_the_rank_is_that_of_the_best_target_with_the_reference_left_out(folder):
    found = triplets(folder, [GOOD, GOOD | {"targets": ["sub/c.png"]}])  # files sort to a, b, é, c
    order = [f.name for f in folder.files]
    angle = {"a.png": 0.0, "b.png": 0.3, "c.png": 0.2}
    gallery = torch.tensor(
        [[np.cos(angle.get(n, 0.1)), np.sin(angle.get(n, 0.1))] for n in order], dtype=torch.float32
    )
    query = torch.tensor([[1.0, 0.0]] * 2)
    # By the angle: a (the reference), é (wrong), c, b. In the first query c is the best of two
    # targets.
    assert found.ranks(query, gallery).tolist() == [2, 2]
    assert triplets(folder, [GOOD | {"targets": ["b.png"]}]).ranks(query[:1], gallery).tolist() == [
        3
    ]


def test_simple_methods_and_ceilings_are_what_their_words_say(folder, vl):
    found = triplets(folder, [GOOD, GOOD | {"reference": "b.png", "targets": ["sub/c.png"]}])
    gallery = vl.encode_images(list(folder))
    said = read_captions(
        csv(folder, "image,caption\na.png,cat\nb.png,dog\nb.png,big dog\nsub/c.png,cow\n"), folder
    )
    vectors = answers(UNTRAINED, replace(found, said=said).embedded(vl, gallery))
    assert torch.equal(vectors["image only"], gallery[found.reference])
    assert torch.allclose(vectors["text only"], vl.encode_text(["in blue"] * 2))
    assert torch.allclose(
        vectors["image + text"],
        F.normalize(gallery[found.reference] + vl.encode_text(["in blue"] * 2), dim=-1),
    )
    assert torch.allclose(
        vectors["composition ceiling"], vl.encode_text(["cat, in blue", "dog, in blue"])
    )
    assert torch.allclose(vectors["target ceiling"], vl.encode_text(["dog", "cow"]))
    uncaptioned = read_captions(csv(folder, "image,caption\na.png,cat\nb.png,dog\n"), folder)
    assert list(answers(UNTRAINED, replace(found, said=uncaptioned).embedded(vl, gallery))) == [
        "image only",
        "text only",
        "image + text",
        "composition ceiling",
    ]
    assert list(answers(UNTRAINED, found.embedded(vl, gallery))) == [
        "image only",
        "text only",
        "image + text",
    ]
    found.reference[1] = found.targets[0][1]  # of the references a and c only one has a caption
    assert list(answers(UNTRAINED, replace(found, said=uncaptioned).embedded(vl, gallery))) == [
        "image only",
        "text only",
        "image + text",
    ]


def test_a_query_encoder_writes_the_sentence_of_each_querys_own_reference(folder, vl):
    found = triplets(
        folder,
        [GOOD | {"reference": "sub/c.png", "targets": ["a.png"]}, GOOD, GOOD | {"modifier": "red"}],
    )
    encoder = QueryEncoder.for_model(vl, width=32, num_tokens=2).eval()
    template = "{sentence} {modifier}"
    tokens = encoder.sentences([folder[int(i)] for i in found.reference]).tokens
    assert torch.allclose(
        Isa(encoder, template)(found.embedded(vl, torch.zeros(4, 1))),
        compose(vl, tokens, found.texts, template),
        atol=1e-5,
    )


def test_words_that_a_model_has_never_read_are_named(vl):
    vl.clip.token_embedding.weight.zero_()
    vl.clip.token_embedding.weight[vl.tokenizer.encode("red star")] = 1.0
    assert unseen_words(vl, ["Red, star!", "(make) it RED", ""]) == ["it", "make"]
    pieces = vl.tokenizer.encode("zebrafish")
    vl.clip.token_embedding.weight[pieces[0]] = 1.0
    assert len(pieces) > 1 and unseen_words(vl, ["zebrafish"]) == []  # a part of it is known


def test_a_part_of_a_folder_is_a_folder_with_its_own_key(folder):
    some = part(folder, [2, 0])
    assert [f for f in some.files] == [folder.files[2], folder.files[0]] and len(folder) == 4
    assert np.array_equal(some[0], folder[2])
    assert len({images_key(f) for f in (folder, some, part(folder, [0, 2]))}) == 3


def test_the_digest_changes_with_a_caption_and_with_an_image(folder):
    none = [[]] * 4
    assert (
        fingerprint(folder, none)
        == fingerprint(folder, none)
        != fingerprint(folder, [["a"], [], [], []])
    )
    assert fingerprint(folder, none) != fingerprint(part(folder, [1, 0, 2, 3]), none)


# -------------------------------------------------------------------------------------------
# example, figure


def test_the_example_folder_is_one_that_a_user_could_have_made(tmp_path):
    folder = icons.write_icons(tmp_path / "x", 120, 30, seed=3, size=32)
    images = ImageFolder(folder / "images")
    said, queries = (
        read_captions(folder / "captions.csv", images),
        read_triplets(folder / "triplets.json", images),
    )
    assert (
        len(images) == 120
        and all(said)
        and len(queries) == 30
        and max(map(len, queries.targets)) > 1
    )
    values = {v for values in icons._VALUES.values() for v in values}
    for i, text, targets in zip(queries.reference, queries.texts, queries.targets, strict=True):
        before, asked = (
            values & set(said[i][0].replace(",", "").split()),
            values & set(text.split()),
        )
        for target in targets:  # one value is exchanged for the one that the words name
            after = values & set(said[target][0].replace(",", "").split())
            assert after - before == asked and len(asked) == 1 and len(before - after) == 1
    again = ImageFolder(icons.write_icons(tmp_path / "y", 120, 30, seed=3, size=32) / "images")
    assert again.key == images.key
    with pytest.raises(ValueError, match="count.*100"):
        icons.write_icons(tmp_path, 99)


def test_a_figure_marks_every_target_of_a_query(folder):
    found = triplets(folder, [GOOD])
    shown = np.array([[i for i in range(4) if i != found.reference[0]]])
    figure = figures.retrieval(found, [0], shown)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "reference" and figure.axes[0].get_xlabel() == "“in blue”"
    assert [t.endswith("target") for t in titles[1:]] == [
        int(i) in found.targets[0] for i in shown[0]
    ]


def test_of_names_that_differ_in_one_character_the_one_that_begins_alike_is_meant(tmp_path):
    for number in (1, 300):
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(tmp_path / f"icon_{number:04d}.png")
    (tmp_path / "captions.csv").write_text("image,caption\nicon_000x.png,x\n")
    with pytest.raises(ValueError, match=r"did you mean 'icon_0001\.png'\?"):
        read_captions(tmp_path / "captions.csv", ImageFolder(tmp_path))


def test_a_name_that_differs_in_capitals_alone_is_meant_and_a_caption_in_its_place_is_no_crash(
    folder,
):
    Image.new("RGB", (8, 8), "lime").save(folder.folder / "B2.PNG")
    images = ImageFolder(folder.folder)
    with pytest.raises(ValueError, match=r"row 2.*'A\.PNG'.*'a\.png'"):
        captions(images, "image,caption\nA.PNG,x\n")
    with pytest.raises(ValueError, match="row 2.*'a red star.*folder"):  # the columns are swapped
        captions(images, f"image,caption\n{'a red star ' * 40},a.png\n")


# -------------------------------------------------------------------------------------------- large
# folders


def many(count: int) -> SimpleNamespace:
    """A folder of many images that nobody has to draw: the readers ask for its names alone."""
    files = [Path("pictures") / f"{i // 100:04d}" / f"photo_{i:07d}.jpg" for i in range(count)]
    return SimpleNamespace(folder=Path("pictures"), files=files, duplicates={}, broken={})


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name[:-4],
        lambda name: f"data/{name}",
        lambda name: name.replace("photo", "phot"),
    ],
)
def test_thousands_of_names_that_are_nearly_right_are_not_compared_with_all_others(
    tmp_path, change, monkeypatch
):
    """Five are shown with what was probably meant. Letters are compared for these alone, with a
    part of the names.
    """
    compared, close = [], difflib.get_close_matches
    monkeypatch.setattr(
        difflib,
        "get_close_matches",
        lambda word, known, **k: compared.append(len(known)) or close(word, known, **k),
    )
    images = many(5000)
    names = [change(f.relative_to("pictures").as_posix()) for f in images.files[:3000]]
    (tmp_path / "captions.csv").write_text(
        "image,caption\n" + "".join(f"{name},a cat\n" for name in names)
    )
    entries = [{"reference": name, "modifier": "in red", "targets": [name]} for name in names]
    (tmp_path / "triplets.json").write_text(json.dumps(entries))
    for read, file in ((read_captions, "captions.csv"), (read_triplets, "triplets.json")):
        with pytest.raises(ValueError, match=f"{file}: 3000 of 3000") as error:
            read(tmp_path / file, images)
        assert str(error.value).count("did you mean '0000/photo_000000") == 5
    assert len(compared) <= 10 and max(compared, default=0) <= 1000


def test_names_that_no_file_can_have_are_refused(folder):
    for name in ("x" * 5000, "a\0b.png", "/a\0b.png"):
        with pytest.raises(ValueError, match="captions.csv|triplets.json"):
            triplets(folder, [GOOD | {"reference": name}])


@pytest.mark.parametrize("content", [b"\xff\xfe[]", b"", b"3", b"null", b"[" * 100_000])
def test_triplets_that_are_none_are_named(folder, content):
    path = folder.folder.parent / "triplets.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="triplets.json"):
        read_triplets(path, folder)
