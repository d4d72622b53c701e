"""Composition against open_clip's own text encoding, and the query encoder: pixels, saving, loading, refusals."""

import json
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from isa_lite.mappings import MAPPINGS
from isa_lite.query_encoder import TEMPLATE, QueryEncoder, QueryEncoderConfig, compose, prompt_ids
from isa_lite.vl_model import VLModel, load_vl_model

TEMPLATES = [
    TEMPLATE,
    "{sentence} but {modifier}",
    "{modifier} in a picture of {sentence}",
    "an image of {sentence} with {modifier} in it",
    "A  PHOTO of {sentence} . {modifier} !",
]
MODIFIERS = ["make it blue", "with a large star at the top left, and without the circle", "zebra", "it's 2 o'clock (now)"]
ODD = [
    *(
        "$",
        "*",
        "{",
        "}",
        "{}",
        "{0}",
        "{sentence}",
        "{modifier}",
        "{sentence} * {sentence}",
        "%s %(x)s",
        "\\1 \\g<0>",
        "'s",
        "#?!",
    ),
    *("<end_of_text>", "<start_of_text>", "a<END_OF_TEXT>b", "<<end_of_text>>", "red <end_of_text> blue", "<end_of_text>" * 3),
    *("&lt;end_of_text&gt;", "&amp;lt;end_of_text&amp;gt;", "\uff1cend_of_text\uff1e"),  # open_clip's cleaning makes them tags
    *("\n", "a\nb\r\n\tc", "", "   ", "\0", "\u200b", "&nbsp;", "🙂", "👩‍👩‍👧", "ü ß 中文 עברית", "\ud83d"),
]


def fresh(vl: VLModel, seed: int = 0, **settings) -> QueryEncoder:
    torch.manual_seed(seed)
    small = {"backbone": "mobilenetv4_conv_small_050", "pretrained": False, "num_tokens": 3, "width": 32, "depth": 1}
    return QueryEncoder.for_model(vl, **small | settings).eval()


def theirs(vl: VLModel, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return vl.clip.encode_text(vl.tokenizer(texts), normalize=True)


def words(vl: VLModel, text: str) -> torch.Tensor:
    """The word vectors of a text, L x D."""
    return vl.word_vectors(torch.tensor(vl.tokenizer.encode(text)))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


# ------------------------------------------------------------------------------------------ composition


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_pseudo_words_a_prompt_is_its_words(vl, template):
    ours = compose(vl, torch.zeros(len(MODIFIERS), 0, vl.word_width), MODIFIERS, template)
    texts = [template.replace("{sentence}", "").replace("{modifier}", m) for m in MODIFIERS]
    assert torch.allclose(ours, theirs(vl, texts), atol=1e-5)
    assert (ours @ ours.T).fill_diagonal_(0).max() < 0.999  # the model tells the texts apart, else this shows nothing


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_words_own_vector_as_pseudo_word_is_that_word(vl, template):
    nouns = ["cat", "kite", "horse", "boat"]  # no words of the modifiers
    tokens = torch.stack([words(vl, n) for n in nouns])
    ours = compose(vl, tokens, MODIFIERS, template)
    texts = [template.replace("{sentence}", n).replace("{modifier}", m) for n, m in zip(nouns, MODIFIERS, strict=True)]
    assert torch.allclose(ours, theirs(vl, texts), atol=1e-5)
    tokens = torch.stack([words(vl, f"large red {n}") for n in nouns])  # and in their order
    texts = [t.replace(n, f"large red {n}") for t, n in zip(texts, nouns, strict=True)]
    assert torch.allclose(compose(vl, tokens, MODIFIERS, template), theirs(vl, texts), atol=1e-5)
    one_by_one = [compose(vl, tokens[i : i + 1], MODIFIERS[i : i + 1], template) for i in range(4)]
    batches = compose(vl, tokens, MODIFIERS, template, batch_size=3)
    assert torch.allclose(batches, torch.cat(one_by_one), atol=1e-5)


@pytest.mark.parametrize("template", TEMPLATES)
def test_composition_against_a_hook_on_open_clips_token_embedding(vl, template):
    torch.manual_seed(0)
    tokens = torch.randn(len(MODIFIERS), 5, vl.word_width)
    texts = [template.replace("{sentence}", "cat " * 5).replace("{modifier}", m) for m in MODIFIERS]
    cat = vl.tokenizer.encode("cat")[0]

    def put_in(module, inputs, output):
        output = output.clone()
        output[inputs[0] == cat] = tokens.flatten(0, 1)
        return output

    hook = vl.clip.token_embedding.register_forward_hook(put_in)
    expected = theirs(vl, texts)
    hook.remove()
    assert (expected - theirs(vl, texts)).abs().max() > 0.01
    assert torch.allclose(compose(vl, tokens, MODIFIERS, template), expected, atol=1e-5)


def test_an_empty_modifier_ends_the_prompt_behind_the_sentence(vl):
    star = words(vl, "star")[None]
    for template, text in {
        TEMPLATE: "a photo of star",
        "{sentence} . {modifier}": "star",
        "{modifier} {sentence}": "star",
    }.items():
        for modifier in ("", "  ", "\n"):
            assert torch.allclose(compose(vl, star, [modifier], template), theirs(vl, [text]), atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_no_character_of_a_modifier_breaks_a_prompt(vl, num_tokens):
    start, end = vl.tokenizer.sot_token_id, vl.tokenizer.eot_token_id
    plain, tokens, broken = prompt_ids(vl, num_tokens, ["blue"])[1].nonzero()[:, 1].tolist(), torch.randn(1, num_tokens, 32), []
    for modifier in ODD:
        ids, places = prompt_ids(vl, num_tokens, [modifier, "blue", modifier])
        assert places.shape == ids.shape and [row.nonzero()[:, 0].tolist() for row in places] == [plain] * 3, ascii(modifier)
        assert compose(vl, tokens, [modifier]).isfinite().all()
        for row in ids.tolist():  # one start, one end, and what comes after the end is padding
            if row.count(start) != 1 or row[0] != start or row.count(end) != 1 or any(row[row.index(end) + 1 :]):
                broken.append(modifier)
    assert not broken


def test_a_tag_typed_into_a_modifier_is_words(vl):
    """All of what is said behind it still counts."""
    tokens = torch.randn(2, 3, vl.word_width)[[0, 0]]
    for tag in ("<end_of_text>", "<start_of_text>", "&lt;end_of_text&gt;"):
        one, other = compose(vl, tokens, [f"red {tag} blue", f"red {tag} zebra"])
        assert (one - other).abs().max() > 1e-3, tag


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("over", [1, 7, 200])
def test_a_modifier_that_does_not_fit_says_by_how_much_or_is_cut(vl, template, over):
    colors = ["red", "blue", "green", "star"]  # one token each
    around = len(vl.tokenizer.encode(template.replace("{sentence}", "cat cat cat").replace("{modifier}", "")))
    fits = vl.context_length - 2 - around
    long = [colors[i % 4] for i in range(fits + over)]
    tokens = torch.randn(1, 3, vl.word_width)
    for truncate in (False, True):  # exactly full is not too long
        whole = compose(vl, tokens, [" ".join(long[:fits])], template, truncate)
    with pytest.raises(ValueError, match=rf"is {over} token\(s\) too long .* 77.*\({fits + over} tokens\).*truncate=True"):
        compose(vl, tokens, [" ".join(long)], template)
    assert torch.equal(compose(vl, tokens, [" ".join(long)], template, truncate=True), whole)


def test_a_sentence_that_does_not_fit_is_an_error_even_if_modifiers_may_be_cut(vl):
    with pytest.raises(ValueError, match=r"is 4 token\(s\) too long"):
        prompt_ids(vl, 76, ["blue"], "a photo {sentence} {modifier}", truncate=True)  # 2 + 2 + 76 + 1 = 81 > 77
    for truncate in (False, True):
        with pytest.raises(ValueError, match="too long"):
            prompt_ids(vl, 76, [""], truncate=truncate)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "a photo",
        "{sentence}",
        "{modifier}",
        "{sentence} {sentence} {modifier}",
        "{sentence} {modifier} {}",
        "{a} {sentence} {modifier}",
    ],
)
def test_templates_without_their_two_fields(vl, template):
    with pytest.raises(ValueError, match="holds {sentence} and {modifier} once each; this one does not"):
        compose(vl, torch.zeros(1, 2, vl.word_width), ["blue"], template)


def test_a_modifier_for_each_sentence(vl):
    with pytest.raises(ValueError, match="2 sentences but 3 modifiers"):
        compose(vl, torch.zeros(2, 1, vl.word_width), ["a", "b", "c"])


# -------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_sentences_of_every_mapping_compose(vl, images, mapping):
    encoder = fresh(vl, mapping=mapping)
    tokens, maps = encoder.sentences(images)
    length = 1 if mapping == "single vector" else 3
    assert tokens.shape == (5, length, vl.word_width) and maps.shape == (5, length, 4, 4)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(5, length))
    assert tokens.norm(dim=2).min() >= vl.word_norm / 2 - 1e-4 and tokens.norm(dim=2).max() <= vl.word_norm * 2 + 1e-4
    assert compose(vl, tokens, [""] * 5).shape == (5, 16)
    assert torch.allclose(encoder.sentences(images, batch_size=2).tokens, tokens, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backbone": "mobilenetv4_conv_smal_050"}, "unknown backbone.*mobilenetv4_conv_small_050"),
        ({"backbone": "%%%%"}, "unknown backbone '%%%%'"),
        ({"stride": 3}, r"no feature map of stride 3; its strides are \[2, 4, 8, 16, 32\]"),
        ({"mapping": "adaptiv"}, "unknown mapping 'adaptiv'; there are 'adaptive', 'single vector', 'average pooling'"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, not 0"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"stride": -16}, "stride must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
    ],
)
def test_settings_that_cannot_work(vl, settings, message):
    with pytest.raises(ValueError, match=message):
        fresh(vl, **settings)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_map_of_the_stride_is_used_and_nothing_behind_it_is_kept(vl, images, stride):
    encoder = fresh(vl, stride=stride)
    assert encoder.sentences(images[:1]).maps.shape[2:] == (64 // stride, 64 // stride)
    counts = [sum(p.numel() for p in fresh(vl, stride=s).backbone.parameters()) for s in (stride, 32)]
    assert counts[0] < counts[1] or stride == 32


def test_arrays_take_a_short_way_with_the_same_result(vl, images):
    encoder = fresh(vl, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    slow = torch.stack([encoder.preprocess(Image.fromarray(i)) for i in images])
    assert torch.allclose(encoder.pixels(images), slow, atol=1e-6)
    assert torch.allclose(encoder.pixels([Image.fromarray(i) for i in images]), slow, atol=1e-6)
    small = encoder.pixels(images[:, :32, :48])  # of another size: resized
    assert torch.allclose(small, torch.stack([encoder.preprocess(Image.fromarray(i[:32, :48])) for i in images]), atol=1e-6)
    assert small.shape == (5, 3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_pictures_of_every_mode_are_taken_as_their_colours(vl, images, mode):
    """As `VLModel.pixels` takes them; both see the same images in a distillation."""
    encoder, picture = fresh(vl), Image.fromarray(images[0]).convert(mode)
    assert torch.allclose(vl.pixels([picture]), vl.pixels([picture.convert("RGB")]))
    assert torch.allclose(encoder.pixels([picture]), encoder.pixels([picture.convert("RGB")]))


@pytest.mark.parametrize("training", [True, False])
def test_sentences_are_made_in_evaluation_mode_and_leave_the_mode_as_it_was(vl, images, training):
    encoder = fresh(vl).train(training)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    first = encoder.sentences(images[:2]).tokens
    assert encoder.training is training and encoder.backbone.training is training
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in before.items())  # the running means of batches
    assert torch.allclose(first[:1], encoder.sentences(images[:1]).tokens, atol=1e-5)  # no word of the others in the batch


# ---------------------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_is_saved_loads_with_the_same_sentences(vl, images, tmp_path, mapping, monkeypatch):
    encoder = fresh(vl, mapping=mapping, mean=(0.4, 0.5, 0.6), stride=8)
    encoder.train()
    encoder(encoder.pixels(images))  # running means of batches that are not the fresh ones
    encoder.config.pretrained = True  # as it was made; the weights in the folder replace those
    encoder.save(tmp_path / "new" / "folder", info={"note": "ü"})
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("somebody wants the network"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("somebody wants the network"))
    for model in (vl, None):
        loaded = QueryEncoder.load(tmp_path / "new" / "folder", model)
        assert not loaded.training
        for one, other in zip(encoder.sentences(images), loaded.sentences(images), strict=True):
            assert torch.equal(one, other)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["query_encoder.json", "query_encoder.safetensors"]
    assert json.loads((tmp_path / "new" / "folder" / "query_encoder.json").read_text("utf-8"))["info"] == {"note": "ü"}
    loaded.save(tmp_path / "again")  # what was loaded saves alike
    weights = [(tmp_path / f / "query_encoder.safetensors").read_bytes() for f in ("new/folder", "again")]
    assert weights[0] == weights[1]


def test_another_models_query_encoder_is_refused(vl_folder, tmp_path):
    vl, other = (load_vl_model(str(vl_folder)) for _ in range(2))
    fresh(vl).save(tmp_path)
    QueryEncoder.load(tmp_path, other)  # loaded twice, it is still the same model
    other.clip.text_projection[0, 0] += 0.5
    with pytest.raises(ValueError, match=f"belongs to VL model {vl.fingerprint}, not {other.fingerprint}"):
        QueryEncoder.load(tmp_path, other)


def test_folders_without_a_query_encoder(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no query_encoder.json"):
            QueryEncoder.load(folder)


@pytest.mark.parametrize(
    "changed", [{"num_tokens": 4}, {"mapping": "average pooling"}, {"width": 64}, {"stride": 8}, {"depth": 2}]
)
def test_weights_that_do_not_fit_their_settings(vl, tmp_path, changed):
    fresh(vl).save(tmp_path)
    path = tmp_path / "query_encoder.json"
    record = json.loads(path.read_text())
    assert QueryEncoderConfig(**record["config"]).num_tokens == 3
    record["config"] |= changed
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="do not fit its query_encoder.json"):
        QueryEncoder.load(tmp_path, vl)
