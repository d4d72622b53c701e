"""The query side as files: the same answers as PyTorch, and refusals where they could not be."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from isa_lite.commands import main
from isa_lite.deploy import export as exporting
from isa_lite.deploy.client import IMAGE, SETTINGS, TEXT, QueryClient, session
from isa_lite.deploy.export import export, measured_recall, to_onnx
from isa_lite.deploy.latency import end_to_end_onnx, export_pieces, latency, search_times
from isa_lite.deploy.onnx_files import quantize
from isa_lite.deploy.query_timing import MODIFIER, PARTS, WHOLE, blank, calls, timed
from isa_lite.methods.isa import Isa
from isa_lite.models.vl_model import VLModel, load_vl_model
from isa_lite.prompt import compose, prompt_ids
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval.gallery import Gallery
from isa_lite.retrieval.metrics import KS, recall
from isa_lite.retrieval.scene_queries import make_benchmark
from isa_lite.support import images
from isa_lite.support.images import ImageFolder, read_image

ROOT = Path(__file__).resolve().parent.parent
TURNED = "{modifier}: this is {sentence} in a picture"


def fresh(vl: VLModel, **settings) -> QueryEncoder:
    """A tiny encoder whose batch norms do something."""
    torch.manual_seed(3)
    encoder = QueryEncoder.for_model(
        vl, num_tokens=4, width=32, depth=1, backbone="mobilenetv3_small_050", **settings
    )
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            (
                module.running_mean.normal_(),
                module.running_var.uniform_(0.5, 2),
                module.weight.data.uniform_(0.5, 2),
            )
    return encoder.eval()


@pytest.fixture(scope="module")
def pair(vl_folder) -> tuple[VLModel, QueryEncoder]:
    vl = load_vl_model(str(vl_folder))
    return vl, fresh(vl, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory) -> Path:
    vl, encoder = pair
    where = tmp_path_factory.mktemp("exported")
    assert export(encoder, vl, where) < 1e-4
    return where


@pytest.fixture(scope="module")
def pieces(pair, tmp_path_factory) -> Path:
    return export_pieces(*pair, tmp_path_factory.mktemp("pieces"))


@pytest.fixture
def timings(monkeypatch) -> dict:
    """The steps of every system that is timed, as calls, by its name; filled while a test runs."""
    found = {}

    def seen(systems, rounds):
        found.update({name: calls(steps) for name, steps in systems.items()})
        return timed(systems, rounds)

    monkeypatch.setattr("isa_lite.deploy.latency.timed", seen)
    return found


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (90, 151, 3), np.uint8))
    small = Image.fromarray(rng.integers(0, 256, (31, 20, 3), np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (64, 77, 4), np.uint8))
    return [
        noise,
        small,
        alpha,
        noise.convert("L"),
        noise.convert("P"),
        noise.crop((0, 0, 64, 64)),
        noise.crop((0, 0, 77, 64)),
    ]


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.slow
def test_the_files_answer_as_pytorch_in_batches_of_any_size(pair, folder, pictures):
    vl, encoder = pair
    client = QueryClient(folder, threads=1)
    modifiers = [
        "",
        "red",
        "make the small circle much bigger, please",
        "it’s <end_of_text> &amp; “blue”",
        "z " * 20,
        "é",
        "a b",
    ]
    expected = compose(vl, encoder.sentences(pictures).tokens, modifiers).numpy()
    for batch_size in (1, 3, 7):
        assert np.abs(client.encode(pictures, modifiers, batch_size) - expected).max() < 1e-5
    assert np.abs(expected - expected[0]).max() > 1e-3  # they do differ from one another


@pytest.mark.slow
def test_images_are_prepared_as_pytorch_does(pair, folder, pictures):
    _, encoder = pair
    client = QueryClient(folder)
    pictures.append(pictures[0].crop((0, 0, 101, 90)))  # its longer side becomes 71.8 pixels
    assert np.abs(client.pixels(pictures) - encoder.pixels(pictures).numpy()).max() < 1e-6
    arrays = [np.asarray(pictures[0]), np.asarray(pictures[1])]
    assert np.array_equal(client.pixels(arrays), client.pixels(pictures[:2]))


def test_maps_come_with_the_tokens(pair, folder, pictures):
    vl, encoder = pair
    pixels = encoder.pixels(pictures)
    tokens, maps = session(folder / IMAGE).run(["tokens", "maps"], {"pixels": pixels.numpy()})
    with torch.no_grad():
        expected = encoder(pixels)
    assert np.abs(tokens - expected.tokens.numpy()).max() < 1e-4 * vl.word_norm
    assert np.abs(maps - expected.maps.numpy()).max() < 1e-5 and maps.shape == tuple(
        expected.maps.shape
    )


def test_a_prompt_without_places_is_a_text_as_it_stands(pair, folder):
    vl, _ = pair
    texts = ["a red circle", "two blue stars beside a very large green moon"]
    client = QueryClient(folder)
    ids = vl.tokenize(texts).numpy()
    for length in (77, 20):  # cut where the texts have ended
        query = client.compose(np.zeros((2, 4, vl.word_width), np.float32), ids[:, :length])
        assert np.abs(query - vl.encode_text(texts).numpy()).max() < 1e-5


@pytest.mark.slow
def test_a_query_is_timed_in_both_runtimes_with_the_same_answers(
    pair, folder, pieces, pictures, timings
):
    vl, encoder = pair
    gallery, threads = (
        Gallery(vl.encode_images(pictures), range(len(pictures))),
        torch.get_num_threads(),
    )
    ms = latency(
        vl,
        encoder,
        folder,
        pieces,
        gallery,
        pictures[0],
        "make it red",
        threads=threads + 1,
        rounds=2,
    )
    assert (
        list(ms.index) == [*PARTS, WHOLE]
        and list(ms) == list(timings)
        and torch.get_num_threads() == threads
    )
    assert (ms.drop("token learner") > 0).all().all() and list(ms.loc["token learner"] > 0) == [
        True,
        False,
    ] * 2
    queries = {"light": compose(vl, encoder.sentences(pictures[:1]).tokens, ["make it red"])}
    queries["symmetric"] = F.normalize(
        vl.encode_images(pictures[:1]) + vl.encode_text(["make it red"])
    )
    for name, made in timings.items():
        assert (
            np.abs(np.asarray(made["search"].args[0]) - queries[name.split(", ")[1]].numpy()).max()
            < 1e-4
        ), name


@pytest.mark.slow
def test_a_query_in_onnxruntime_is_timed_cut_and_uncut_with_the_same_answers(
    pair, folder, pieces, timings
):
    vl, encoder = pair
    threads = torch.get_num_threads()
    ms, ratios = end_to_end_onnx(vl, folder, pieces, threads=threads + 1, rounds=2, gallery=20)
    assert torch.get_num_threads() == threads
    assert list(ms) == ["light, cut", "symmetric, cut", "light, uncut", "symmetric, uncut"]
    lengths = {name: made["text tower"].args[0][1].shape[1] for name, made in timings.items()}
    shortest = int(vl.tokenize([MODIFIER])[0].argmax()) + 1
    sentence = prompt_ids(vl, encoder.config.num_tokens, [MODIFIER])[0].shape[1]
    assert list(lengths.values()) == [sentence, shortest, vl.context_length, vl.context_length]
    picture = list(blank(vl.image_size))
    queries = {"light": compose(vl, encoder.sentences(picture).tokens, [MODIFIER])}
    queries["symmetric"] = F.normalize(vl.encode_images(picture) + vl.encode_text([MODIFIER]))
    for name, made in timings.items():
        assert np.abs(made["search"].args[0] - queries[name.split(", ")[0]].numpy()).max() < 1e-4, (
            name
        )
    expected = ms.loc[WHOLE, "symmetric, uncut"] / ms.loc[WHOLE, "light, cut"]
    assert ratios["symmetric uncut / light cut"] == pytest.approx(expected) and len(ratios) == 3


def test_a_network_at_rest_leaves_the_cores_to_the_next_one(folder):
    options = session(folder / IMAGE).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_searches_are_timed_with_the_threads_that_are_asked_for():
    asked, threads = [], torch.get_num_threads()

    class Watched(Gallery):
        def search(self, *args, **kwargs):
            asked.append(torch.get_num_threads())
            return super().search(*args, **kwargs)

    points = F.normalize(torch.randn(20, 8), dim=1)
    taken = search_times(
        {"a": Watched(points, range(20)), "b": Watched(points, range(20))},
        points,
        threads=threads + 1,
    )
    assert set(asked) == {threads + 1} and torch.get_num_threads() == threads
    assert list(taken) == ["a", "b"] and min(taken.values()) > 0


def test_a_token_goes_to_its_own_place(pair, folder):
    vl, _ = pair
    client = QueryClient(folder)
    tokens = torch.randn(1, 4, vl.word_width)
    ids = torch.tensor([[49406, -1, 320, -1, -1, 1125, -1, 49407]])
    vectors = vl.word_vectors(ids.clamp(min=1))
    for place, token in zip((1, 3, 4, 6), tokens[0], strict=True):
        vectors[0, place] = token
    expected = vl.encode_vectors(vectors, ids.clamp(min=1))
    assert np.abs(client.compose(tokens.numpy(), ids.numpy()) - expected.numpy()).max() < 1e-5
    turned = client.compose(tokens.flip(1).numpy(), ids.numpy())
    assert np.abs(turned - expected.numpy()).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "template", [TURNED, "{sentence}{modifier}", "“{sentence}” &amp; {modifier}!"]
)
def test_another_template_is_exported_with_the_files(
    pair, folder, tmp_path, pictures, template, monkeypatch
):
    vl, encoder = pair
    # The networks do not know of templates, and tracing them takes long.
    monkeypatch.setattr(
        exporting, "to_onnx", lambda *a: a[-1].write_bytes((folder / a[-1].name).read_bytes())
    )
    export(encoder, vl, tmp_path, template)
    client, modifiers = QueryClient(tmp_path), ["make it red", ""]
    expected = compose(vl, encoder.sentences(pictures[:2]).tokens, modifiers, template).numpy()
    assert np.abs(client.encode(pictures[:2], modifiers) - expected).max() < 1e-5
    assert (
        np.abs(
            expected - compose(vl, encoder.sentences(pictures[:2]).tokens, modifiers).numpy()
        ).max()
        > 1e-3
    )


@pytest.mark.slow
def test_a_text_tower_that_looks_both_ways_gets_its_padding(pair, tmp_path, pictures):
    vl, _ = pair
    text = dict(
        context_length=30, vocab_size=49408, width=32, heads=2, layers=2, no_causal_mask=True
    )
    vision = dict(image_size=32, layers=1, width=32, patch_size=16, head_width=16)
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    both_ways = VLModel(
        clip, vl.preprocess, open_clip.SimpleTokenizer(context_length=30), name="both ways"
    )
    assert not both_ways.tower.can_cut
    encoder = fresh(both_ways)
    export(encoder, both_ways, tmp_path)
    client = QueryClient(tmp_path)
    assert client.prompts(["red", ""]).shape == (2, 30)
    expected = compose(both_ways, encoder.sentences(pictures[:2]).tokens, ["red", ""]).numpy()
    assert np.abs(client.encode(pictures[:2], ["red", ""]) - expected).max() < 1e-5


def test_a_place_of_a_pseudo_word_is_no_padding_to_a_tower_that_hides_it(pair):
    vl, _ = pair
    text = dict(
        context_length=30, vocab_size=49408, width=32, heads=2, layers=2, embed_cls=True, pad_id=0
    )
    vision = dict(image_size=32, layers=1, width=32, patch_size=16, head_width=16)
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    hiding = VLModel(
        clip, vl.preprocess, open_clip.SimpleTokenizer(context_length=30), name="hides its padding"
    )
    ids, places = prompt_ids(hiding, 4, ["red"])
    tokens = torch.randn(1, 4, hiding.word_width)
    found = exporting.SentenceToQuery(hiding)(tokens, ids.masked_fill(places, -1))
    assert torch.allclose(found, compose(hiding, tokens, ["red"]), atol=1e-5)


def test_a_difference_between_sentences_is_told_in_lengths_of_a_word(pair, folder, monkeypatch):
    vl, encoder = pair
    client = QueryClient(folder)
    sentences, said = client.sentences, client.compose
    monkeypatch.setattr(
        client, "sentences", lambda pixels: sentences(pixels) + np.float32(0.05 * vl.word_norm)
    )
    monkeypatch.setattr(
        client, "compose", lambda tokens, ids: said(tokens - np.float32(0.05 * vl.word_norm), ids)
    )
    template = client.settings["template"]
    assert exporting.difference(client, encoder, vl, template) == pytest.approx(0.05, abs=1e-3)


def test_the_tokenizer_gives_open_clips_ids(pair, folder):
    vl, _ = pair
    rng = np.random.default_rng(0)
    letters = list("abcdeghilmnoprstuxyzABXY 0123456789 .,;:!?'’\"“”-_()&<>/ éÄßçñ日本 🙂\t\n") + [
        "'s ",
        "n't ",
        "&lt;",
        "&amp;amp;",
        "  ",
    ]
    texts = ["".join(rng.choice(letters, rng.integers(1, 40))) for _ in range(400)]
    words = [vl.tokenizer.decode([int(i)]) for i in rng.integers(300, 49000, 300)]
    client, template = QueryClient(folder), "{sentence} {modifier}"
    for text in texts + words:
        (ids,) = prompt_ids(vl, 1, [text], template, truncate=True)[0].tolist()
        said = client.words(text)[: vl.context_length - 3] if text.strip() else []
        assert [49406, 1, *said, 49407] == ids[: ids.index(49407) + 1], text


def test_what_is_too_long_is_refused_with_its_words(pair, folder, pictures):
    vl, _ = pair
    client = QueryClient(folder)
    most = vl.context_length - len(prompt_ids(vl, 4, ["red"])[0][0]) + 1
    assert client.prompts(["red " * most]).shape == (1, vl.context_length)
    for function in (
        lambda text: client.encode(pictures[:1], [text]),
        lambda text: prompt_ids(vl, 4, [text]),
    ):
        with pytest.raises(ValueError, match=r"prompt.*too long.*77.*modifier 'red"):
            function("red " * (most + 1))


def test_a_prompt_that_does_not_fit_is_refused_before_any_network_runs(
    folder, pictures, monkeypatch
):
    client = QueryClient(folder)
    monkeypatch.setattr(client, "sentences", lambda pixels: pytest.fail("a network has run"))
    with pytest.raises(ValueError, match="too long for the text tower"):
        client.encode(pictures[:2], ["red", "red " * 100], batch_size=1)


def test_the_networks_take_as_many_threads_as_they_are_given(folder):
    client = QueryClient(folder, threads=3)
    assert [
        n.get_session_options().intra_op_num_threads for n in (client._image, client._text)
    ] == [3, 3]


@pytest.mark.parametrize("images, modifiers", [(2, 1), (0, 0), (1, 2)])
def test_every_image_wants_its_modifier(folder, pictures, images, modifiers):
    named = f"{images} images.*{modifiers} modifiers" if images else "images is empty"
    with pytest.raises(ValueError, match=named):
        QueryClient(folder).encode(pictures[:images], ["red"] * modifiers)


def test_an_encoder_of_another_model_is_refused_before_anything_is_written(pair, tmp_path):
    vl, encoder = pair
    other = fresh(vl)
    other.config.vl_model = "0123456789abcdef"
    with pytest.raises(ValueError, match=f"0123456789abcdef, not {vl.fingerprint}"):
        export(other, vl, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="a template holds"):
        export(encoder, vl, tmp_path / "new", "{sentence}")
    assert not (tmp_path / "new").exists()


def test_a_gallery_of_another_model_is_refused(pair, folder):
    vl, _ = pair
    QueryClient(folder, vl_model=vl.fingerprint)
    with pytest.raises(ValueError, match=f"{vl.fingerprint}.*gallery.*0123456789abcdef"):
        QueryClient(folder, vl_model="0123456789abcdef")


@pytest.mark.parametrize("name", [IMAGE, TEXT, "tokenizer.json"])
def test_a_changed_or_missing_file_is_refused(folder, tmp_path, name):
    again = copy(folder, tmp_path / "again")
    QueryClient(again)
    data = bytearray((again / name).read_bytes())
    data[len(data) // 2] ^= 1
    (again / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*exported"):
        QueryClient(again)
    (again / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
        QueryClient(again)


def test_a_folder_without_an_export_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"query.json.*folder"):
        QueryClient(tmp_path)


@pytest.mark.slow
def test_files_that_differ_from_pytorch_are_not_written(pair, folder, tmp_path, monkeypatch):
    vl, encoder = pair
    again = copy(folder, tmp_path / "again")
    before = {path.name: path.read_bytes() for path in again.iterdir()}

    def nudged(module, inputs, outputs, dynamic, path):
        if path.name == IMAGE:
            module = exporting.ImageToSentence(fresh(vl))
            # as if the exporter had made a mistake
            module.encoder.mapping.to_word.direction.bias.data += 0.05
            to_onnx(module, inputs, outputs, dynamic, path)
        else:
            path.write_bytes((folder / TEXT).read_bytes())

    monkeypatch.setattr(exporting, "to_onnx", nudged)
    with pytest.raises(ValueError, match=r"differ from PyTorch by 0\.\d+.*0\.001"):
        export(encoder, vl, again)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("difference", lambda *a: float("nan"), "differ from PyTorch by nan"),
        ("prompt_of", lambda vl, template: ["sentence", "modifier"], "tokenizer.*other ids"),
    ],
)
def test_what_is_not_a_number_or_says_another_prompt_is_not_written(
    pair, folder, tmp_path, monkeypatch, name, value, message
):
    vl, encoder = pair
    monkeypatch.setattr(
        exporting, "to_onnx", lambda *a: a[-1].write_bytes((folder / a[-1].name).read_bytes())
    )
    monkeypatch.setattr(exporting, name, value)
    with pytest.raises(ValueError, match=message):
        export(encoder, vl, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_the_client_cannot_imitate_is_refused_before_a_network_is_made(
    pair, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="mine.*tokenizer.*object"):
        exporting.tokenizer_of(SimpleNamespace(name="mine", tokenizer=object()))
    other = open_clip.SimpleTokenizer(clean="canonicalize")
    with pytest.raises(ValueError, match="mine.*tokenizer"):
        exporting.tokenizer_of(SimpleNamespace(name="mine", tokenizer=other))
    vl, encoder = pair
    monkeypatch.setattr(exporting, "to_onnx", lambda *_: pytest.fail("a network was made first"))
    monkeypatch.setattr(vl.tokenizer, "clean_fn", other.clean_fn)
    with pytest.raises(ValueError, match="tokenizer.*cleans"):
        export(encoder, vl, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exporting_leaves_pytorch_and_the_logs_as_they_were(folder):
    assert torch.backends.mha.get_fastpath_enabled()
    assert logging.getLogger("onnxscript.optimizer._constant_folding").level == logging.NOTSET


def test_the_files_hold_no_path_of_the_machine_that_made_them(folder):
    for name in (IMAGE, TEXT):
        data = (folder / name).read_bytes()
        assert (
            b"site-packages" not in data and str(ROOT).encode() not in data and b".py" not in data
        )
        onnx.checker.check_model(onnx.load(folder / name))


def test_eight_bits_keep_the_answers_nearly(pair, folder, tmp_path, pictures, caplog):
    out = quantize(folder, tmp_path / "int8")
    assert not caplog.records  # onnxruntime has no advice to give
    assert (out / TEXT).stat().st_size < 0.4 * (folder / TEXT).stat().st_size
    for name in (IMAGE, TEXT):  # no product with a float matrix is left, nor with a part of one
        graph = onnx.load(out / name).graph
        matrices = {
            i.name
            for i in graph.initializer
            if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2
        }
        assert matrices and not [
            n
            for n in graph.node
            if n.op_type in ("MatMul", "Gemm", "Gather", "Split", "Transpose")
            and matrices & set(n.input)
        ]
    exact, rough = (
        QueryClient(f).encode(pictures, ["make it red"] * len(pictures)) for f in (folder, out)
    )
    cosine = (exact * rough).sum(1)
    assert 0.98 < cosine.min() < 1 and np.allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-5)
    assert json.loads((out / SETTINGS).read_text())["made"]["weights"] == "int8"
    with pytest.raises(ValueError, match="quantised"):
        quantize(folder, folder)
    changed = copy(folder, tmp_path / "changed")
    (changed / TEXT).write_bytes((folder / IMAGE).read_bytes())
    with pytest.raises(ValueError, match=f"{TEXT}.*exported"):
        quantize(changed, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_recall_of_the_files_is_recall_of_pytorch(pair, folder):
    vl, encoder = pair
    bench = make_benchmark(12, 60, seed=1, size=vl.image_size)
    bench = bench.embedded(vl)
    rank = bench.ranks(Isa(encoder)(bench))
    assert measured_recall(QueryClient(folder), bench) == {f"R@{k}": recall(rank, k) for k in KS}
    # A client that knows which target belongs to a reference is always right.
    points = torch.nn.functional.normalize(torch.randn(60, 8), dim=1)
    right = {
        bench.images[r].tobytes(): points[t]
        for r, t in zip(bench.reference, bench.target, strict=True)
    }
    knows = SimpleNamespace(
        encode=lambda images, texts: np.stack([right[image.tobytes()] for image in images])
    )
    assert measured_recall(knows, bench.embedded(vl, points))["R@1"] == 100


BLOCKED = """
import sys
for name in ("torch", "torchvision", "open_clip", "timm", "onnx"):
    sys.modules[name] = None  # whoever imports it now gets an ImportError
from isa_lite.commands import main
main(["client", *sys.argv[1:]])
"""


def test_a_query_is_answered_where_there_is_no_pytorch(pair, folder, tmp_path, pictures):
    vl, encoder = pair
    gallery = Gallery(
        vl.encode_images([p.convert("RGB") for p in pictures]),
        [f"picture {i}" for i in range(7)],
        vl.fingerprint,
    )
    gallery.save(tmp_path / "gallery.safetensors")
    pictures[0].save(tmp_path / "query.png")
    arguments = [
        str(folder),
        "--gallery",
        "gallery.safetensors",
        "--image",
        "query.png",
        "--modifier",
        "make it red",
        "--k",
        "3",
    ]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores, found = gallery.search(
        compose(vl, encoder.sentences(pictures[:1]).tokens, ["make it red"]), 3
    )
    printed = [line.split("  ") for line in done.stdout.splitlines()]
    assert [name for _, name in printed] == [gallery.ids[i] for i in found[0]]
    assert [float(score) for score, _ in printed] == pytest.approx(scores[0].tolist(), abs=1e-4)


def test_the_client_reads_a_file_as_the_gallery_was_read(pair, folder, tmp_path, pictures, capsys):
    """A photograph on its side, transparency, 16 bits: the picture as it is seen, not as it is
    stored.
    """
    vl, encoder = pair
    noise, _, alpha = pictures[:3]
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.save(tmp_path / "turned.jpg", exif=exif)
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise.convert("P").save(tmp_path / "palette.png", transparency=3)
    noise.save(tmp_path / "animated.gif", save_all=True, append_images=[noise.rotate(90)])
    alpha.save(tmp_path / "alpha.png")
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    for name, values in (
        ("16.png", ramp),
        ("32.tif", ramp.astype(np.int32)),
        ("float.tif", (ramp / 65535).astype(np.float32)),
    ):
        Image.fromarray(values).save(tmp_path / name)
    files = ImageFolder(tmp_path).files
    assert len(files) == 8
    for path in files:
        assert np.array_equal(read_image(path), images.read_image(path)), path.name
    gallery = Gallery(
        vl.encode_images(list(ImageFolder(tmp_path))), [f.name for f in files], vl.fingerprint
    )
    gallery.save(tmp_path / "gallery.safetensors")
    turned = images.read_image(tmp_path / "turned.jpg")
    expected, _ = gallery.search(compose(vl, encoder.sentences([turned]).tokens, ["red"]), 1)
    query = ["--image", str(tmp_path / "turned.jpg"), "--modifier", "red", "--k", "1"]
    main(["client", str(folder), "--gallery", str(tmp_path / "gallery.safetensors"), *query])
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(float(expected[0]), abs=1e-4)


def test_the_client_names_a_picture_that_it_cannot_read(tmp_path, monkeypatch):
    Image.effect_noise((64, 64), 99).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut.png.*OSError"):
        read_image(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="whole.png"):
        read_image(tmp_path / "whole.png")
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        read_image(tmp_path / "nowhere.png")


def test_the_client_says_what_it_lacks_in_a_line(folder, tmp_path, pictures, capsys):
    query, stored = tmp_path / "query.png", tmp_path / "gallery.safetensors"
    pictures[0].save(query)
    (tmp_path / "page.jpg").write_text("404")

    def refused(
        message: str, image: str | Path = query, folder: str | Path = folder, modifier: str = "red"
    ) -> None:
        with pytest.raises(SystemExit):
            main(
                [
                    "client",
                    str(folder),
                    "--gallery",
                    str(stored),
                    "--image",
                    str(image),
                    "--modifier",
                    modifier,
                ]
            )
        assert message in capsys.readouterr().err

    refused("there is no gallery")
    Gallery(torch.eye(3), ["a", "b", "c"]).save(stored)
    refused("does not say which model embedded it")
    Gallery(torch.eye(3), ["a", "b", "c"], "0123456789abcdef").save(stored)
    refused("and the gallery to 0123456789abcdef")
    refused("holds no query.json", folder=tmp_path)
    with pytest.raises(SystemExit):
        main(["client", str(folder), "--gallery", str(stored), "--image", str(query), "--k", "0"])
    assert "--k" in capsys.readouterr().err
    Gallery(torch.eye(3), ["a", "b", "c"], QueryClient(folder).settings["vl_model"]).save(stored)
    refused("nowhere.png", image="nowhere.png")
    refused("page.jpg", image=tmp_path / "page.jpg")
    refused("too long for the text tower", modifier="red " * 90)


@pytest.mark.slow
def test_the_command_exports_an_encoder_and_names_what_is_wrong(
    pair, vl_folder, tmp_path, capsys, monkeypatch
):
    vl, encoder = pair
    encoder.save(tmp_path / "encoder")
    out = tmp_path / "out"
    monkeypatch.setattr(
        "isa_lite.retrieval.scene_queries.make_benchmark",
        lambda size: make_benchmark(12, 60, seed=1, size=size),
    )
    arguments = [
        "--encoder",
        str(tmp_path / "encoder"),
        "--vl-model",
        str(vl_folder),
        "--template",
        TURNED,
        "--int8",
    ]
    main(["export", *arguments, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "largest difference from PyTorch: " in printed and str(out / "int8" / TEXT) in printed
    assert float(printed.split("PyTorch: ")[1].split()[0]) < 1e-4
    assert "12 queries, gallery of 60" in printed and printed.splitlines()[-1].startswith(
        str(out / "int8")
    )
    assert QueryClient(out).settings["template"] == TURNED
    for arguments, message in (
        (["--encoder", str(tmp_path)], "holds no query_encoder.json"),
        (["--encoder", str(tmp_path / "encoder")], f"belongs to VL model {vl.fingerprint}"),
        (["--encoder", str(tmp_path / "encoder"), "--template", "a"], "a template holds"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *arguments, "--out", str(tmp_path / "new")])
        assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
