"""The client alone, on two networks of a few numbers that are made here: what it refuses, and by
which name.

That a real export answers as PyTorch does is in test_export.py.
"""

import json

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from isa_lite.commands import main
from isa_lite.deploy.client import (
    IMAGE,
    SETTINGS,
    TEXT,
    TOKENIZER,
    QueryClient,
    checksum,
    read_gallery,
)
from isa_lite.retrieval.gallery import Gallery
from isa_lite.support.checkpoint import write_tensors
from isa_lite.support.images import read_image

WIDTH, TOKENS = 4, 2


def network(nodes: list, inputs: list, output: str, constants: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    ).SerializeToString()


@pytest.fixture
def folder(tmp_path):
    """Image to sentence: the mean colour, times a matrix. Sentence to query: the sum of the tokens,
    of length 1.
    """
    where = tmp_path / "exported"
    where.mkdir()
    matrix = np.random.default_rng(0).normal(size=(3, TOKENS * WIDTH)).astype(np.float32)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["product"]),
        helper.make_node("Reshape", ["product", "shape"], ["tokens"]),
    ]
    (where / IMAGE).write_bytes(
        network(
            nodes, [pixels], "tokens", {"matrix": matrix, "shape": np.array([-1, TOKENS, WIDTH])}
        )
    )
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", TOKENS, WIDTH]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]),
    ]
    nodes = [
        helper.make_node("ReduceSum", ["tokens", "axis"], ["sum"], keepdims=0),
        helper.make_node("LpNormalization", ["sum"], ["query"], axis=-1),
    ]
    (where / TEXT).write_bytes(network(nodes, inputs, "query", {"axis": np.array([1])}))
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 1, "red": 2, "blue": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(where / TOKENIZER))
    settings = {
        "vl_model": "0123",
        "image_size": 8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "num_tokens": TOKENS,
        "context_length": 12,
        "can_cut": True,
        "pad_id": 0,
        "prompt": [[7], "sentence", [8], "modifier", [9]],
        "prompt_without_modifier": [[7], "sentence", [9]],
        "files": {name: checksum(where / name) for name in (IMAGE, TEXT, TOKENIZER)},
    }
    (where / SETTINGS).write_text(json.dumps(settings))
    return where


@pytest.fixture
def pictures():
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(3)]


def test_it_answers(folder, pictures):
    client = QueryClient(folder)
    found = client.encode(pictures, ["red", "", "blue red"])
    assert found.shape == (3, WIDTH) and np.allclose(np.linalg.norm(found, axis=1), 1)
    assert client.prompts(["red blue"]).tolist() == [[7, -1, -1, 8, 2, 3, 9]] and client.prompts(
        [" "]
    ).tolist() == [[7, -1, -1, 9]]
    arrays = [np.asarray(p) for p in pictures]
    assert np.array_equal(client.pixels(arrays), client.pixels(pictures))
    assert np.array_equal(client.pixels(np.stack(arrays)), client.pixels(pictures))


def test_a_picture_is_taken_as_its_file_is(folder, tmp_path, pictures):
    exif, client = Image.Exif(), QueryClient(folder)
    exif[0x0112] = 6
    alpha = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 20, 4), np.uint8))
    pictures[0].save(tmp_path / "turned.png", exif=exif)
    alpha.save(tmp_path / "alpha.png")
    for name in ("turned.png", "alpha.png"):
        by_file, opened = (
            client.pixels([read_image(tmp_path / name)]),
            client.pixels([Image.open(tmp_path / name)]),
        )
        assert np.array_equal(by_file, opened)


@pytest.mark.parametrize(
    "images, modifiers, named",
    [
        ("a.png", ["red"], "images"),
        (Image.new("RGB", (8, 8)), ["red"], "images"),
        (None, ["red"], "images"),
        (["a.png"], ["red"], r"images\[0\]"),
        ([None], ["red"], r"images\[0\]"),
        ([np.zeros((8, 8, 3))], ["red"], r"images\[0\]"),
        ([np.zeros((8, 8, 5), np.uint8)], ["red"], r"images\[0\]"),
        (np.zeros((8, 8, 3)), ["red"] * 8, "images"),
        ([Image.new("RGB", (8, 8))] * 3, "red", "modifiers"),
        ([Image.new("RGB", (8, 8))], [None], r"modifiers\[0\]"),
        ([Image.new("RGB", (8, 8))], [3], r"modifiers\[0\]"),
        ([Image.new("RGB", (8, 8))], None, "modifiers"),
        ([Image.new("RGB", (8, 8))], {"red": 1}, "modifiers"),
        ([Image.new("RGB", (8, 8))], ["red " * 20], "red"),
        ([Image.new("RGB", (1, 1001))], ["red"], "1 x 1001"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(folder, images, modifiers, named):
    with pytest.raises(ValueError, match=named):
        QueryClient(folder).encode(images, modifiers)


def test_one_array_is_not_taken_for_its_rows(folder):
    with pytest.raises(ValueError, match=r"images\[None\]"):
        QueryClient(folder).pixels(np.zeros((96, 96, 3), np.uint8))


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 10**9},
        {"image_size": 0},
        {"image_size": "8"},
        {"image_size": True},
        {"num_tokens": 10**9},
        {"context_length": 10**12},
        {"pad_id": -1},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"mean": [0.5, 0.5, 1e30]},
        {"std": [1, 1, 0]},
        {"std": None},
        {"can_cut": 1},
        {"prompt": ["sentence", "other"]},
        {"prompt": [[1.5]]},
        {"prompt": None},
        {"vl_model": 3},
        {"files": {}},
        {"files": {"../secret": "0"}},
    ],
)
def test_settings_that_cannot_work_are_named_before_any_memory_is_taken(folder, change):
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=rf"query\.json.*{next(iter(change))}"):
        QueryClient(folder)
    (folder / SETTINGS).write_text(
        json.dumps({k: v for k, v in settings.items() if k not in change})
    )
    with pytest.raises(ValueError, match=rf"query\.json.*{next(iter(change))}"):
        QueryClient(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"3"])
def test_settings_that_are_none_are_named(folder, content):
    (folder / SETTINGS).write_bytes(content)
    with pytest.raises(ValueError, match=r"query\.json"):
        QueryClient(folder)


@pytest.mark.parametrize("name", [IMAGE, TEXT, TOKENIZER])
def test_a_file_of_another_kind_is_named_although_its_checksum_is_right(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    settings = json.loads((folder / SETTINGS).read_text())
    settings["files"][name] = checksum(folder / name)
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"exported.{name} cannot"):
        QueryClient(folder)


@pytest.mark.parametrize("read", [{"blue red": [2, 3]}, {"red": None}, []])
def test_a_tokenizer_that_reads_otherwise_than_it_did_is_refused(folder, read):
    settings = json.loads((folder / SETTINGS).read_text())
    for content in ({"blue red": [3, 2], "": []}, read):
        (folder / SETTINGS).write_text(json.dumps(settings | {"read": content}))
        if content is not read:
            QueryClient(folder)
    with pytest.raises(ValueError, match=SETTINGS if read == [] else TOKENIZER):
        QueryClient(folder)


@pytest.mark.parametrize("value", [-1, float("nan"), 10**12, "x", None, True])
def test_numbers_of_threads_and_images_that_cannot_work_are_named(folder, pictures, value):
    with pytest.raises(ValueError, match="threads must be"):
        QueryClient(folder, value)
    with pytest.raises(ValueError, match="batch_size must be"):
        QueryClient(folder).encode(pictures, ["red"] * 3, value)


def test_networks_that_do_not_fit_the_settings_are_named(folder, pictures):
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | {"image_size": 9}))
    with pytest.raises(ValueError, match=r"query\.json"):
        QueryClient(folder).encode(pictures, ["red"] * 3)


# ------------------------------------------------------------------------------------------- the
# command


@pytest.fixture
def ask(folder, tmp_path, pictures, capsys):
    """Ask the command; what it prints, or the one line in which it refuses."""
    pictures[0].save(tmp_path / "query.png")

    def asked(gallery: Gallery | bytes, *more: str) -> str:
        path = tmp_path / "gallery.safetensors"
        path.write_bytes(gallery) if isinstance(gallery, bytes) else gallery.save(path)
        arguments = [
            str(folder),
            "--gallery",
            str(path),
            "--image",
            str(tmp_path / "query.png"),
            *more,
        ]
        try:
            main(["client", *arguments])
        except SystemExit as error:
            assert error.code == 2
            said = capsys.readouterr().err
            assert "Traceback" not in said
            return said
        return capsys.readouterr().out

    return asked


def test_of_equal_answers_the_first_in_the_gallery_is_printed_first(ask):
    place = torch.arange(40) % 2
    said = ask(Gallery(torch.eye(WIDTH)[place], range(40), "0123"), "--k", "40")
    order = [int(line.split()[1]) for line in said.splitlines()]
    best = order[0] % 2
    assert order == [i for i in range(40) if i % 2 == best] + [
        i for i in range(40) if i % 2 != best
    ]


def test_a_name_that_is_not_utf8_is_printed(ask):
    said = ask(Gallery(torch.eye(WIDTH), ["a\udcff.png", "b", "c", "d"], "0123"))
    assert "udcff" in said and len(said.splitlines()) == 4


def test_what_cannot_be_answered_is_one_line(ask):
    assert "gallery.safetensors" in ask(b"no gallery")
    assert "gallery.safetensors" in ask(Gallery(torch.eye(5), range(5), "0123"))  # of another width
    assert "0456" in ask(Gallery(torch.eye(WIDTH), range(WIDTH), "0456"))


def test_a_gallery_is_read_as_it_was_saved(tmp_path):
    Gallery(torch.eye(3), ["a", 2, "c"], "0123").save(tmp_path / "g.safetensors")
    embeddings, ids, model = read_gallery(tmp_path / "g.safetensors")
    assert np.array_equal(embeddings, np.eye(3, dtype=np.float32)) and (ids, model) == (
        ["a", 2, "c"],
        "0123",
    )


def test_a_gallery_that_does_not_know_its_model_is_damaged(tmp_path):
    write_tensors(
        tmp_path / "g.safetensors", {"embeddings": torch.eye(3)}, {"ids": ["a", "b", "c"]}
    )
    for reads in (read_gallery, Gallery.load):
        with pytest.raises(ValueError, match="g.safetensors.*vl_model"):
            reads(tmp_path / "g.safetensors")


@pytest.mark.parametrize("reads", [QueryClient, read_gallery, read_image])
def test_what_is_no_path_is_refused(reads):
    with pytest.raises(ValueError, match="must be a path, not 3"):
        reads(3)
