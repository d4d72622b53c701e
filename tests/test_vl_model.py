"""The vision-language model: open_clip's own results, loading, and what is refused."""

import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from isa_lite.deploy.measure import multiply_adds
from isa_lite.models.open_clip_models import check_settings
from isa_lite.models.vl_model import DATA, SCENES_CLIP, VLModel, load_vl_model
from isa_lite.pretraining import towers as pretrain
from isa_lite.pretraining.towers import PretrainConfig, export
from isa_lite.support.checkpoint import read_tensors, write_tensors

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4}
TIMM = {
    "image_size": 64,
    "timm_model_name": "convnext_atto",
    "timm_pool": "",
    "timm_proj": "linear",
}
TEXT = {"context_length": 20, "width": 32, "heads": 2, "layers": 2}
TEXTS = [
    "a red circle",
    "",
    "make the large circle at the top left blue, and take away the star!",
    "zebra " * 40,
    "$ * {x} \n ü 🙂",
]
#: class and text settings: what ViT-B-32, OpenAI's models, SigLIP and less common towers look like,
#: in small
TOWERS = {
    "plain": (open_clip.CLIP, {}),
    "quick gelu": (open_clip.CLIP, {"quick_gelu": True}),
    "custom": (open_clip.CustomTextCLIP, {}),
    "custom, end by its id": (open_clip.CustomTextCLIP, {"pool_type": "eos", "eos_id": 49407}),
    "plain, end by its id": (open_clip.CLIP, {"pool_type": "eos", "eos_id": 49407}),
    "last, both ways, bias": (
        open_clip.CustomTextCLIP,
        {"pool_type": "last", "no_causal_mask": True, "proj_bias": True},
    ),
    "plain, both ways": (open_clip.CLIP, {"no_causal_mask": True}),
    "both ways, padding masked": (
        open_clip.CustomTextCLIP,
        {"no_causal_mask": True, "use_pad_mask": True},
    ),
    "no projection": (open_clip.CustomTextCLIP, {"proj_type": "none"}),
    "class token behind the text": (open_clip.CustomTextCLIP, {"embed_cls": True}),
    "layers of another kind": (open_clip.CLIP, {"qk_norm": True}),
}


def build(
    kind=open_clip.CLIP, vision=VISION, quick_gelu=False, use_pad_mask=False, **text
) -> VLModel:
    """A random model of open_clip, with weights large enough for texts to differ, as `VLModel`."""
    torch.manual_seed(0)
    clip = kind(32, vision, TEXT | text, quick_gelu=quick_gelu)
    tower = getattr(clip, "text", clip)
    nn.init.normal_(tower.token_embedding.weight)
    nn.init.normal_(tower.positional_embedding)
    if use_pad_mask:
        tower.use_pad_mask = True
    clip.visual.image_mean, clip.visual.image_std = MEAN, STD
    preprocess = open_clip.image_transform(vision["image_size"], is_train=False, mean=MEAN, std=STD)
    return VLModel(
        clip,
        preprocess,
        open_clip.SimpleTokenizer(context_length=TEXT["context_length"]),
        name="built",
    )


def theirs(vl: VLModel, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return vl.clip.encode_text(vl.tokenizer(texts), normalize=True)


@pytest.fixture
def images() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3))
    # of three colours
    return (noise * np.array([[1, 0.1, 0.1], [0.1, 1, 0.1], [0.1, 0.1, 1]])[:, None, None]).astype(
        np.uint8
    )


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"somebody wants the network: {args}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


# -------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize("tower", TOWERS)
def test_texts_are_encoded_as_open_clip_does_it(tower):
    kind, settings = TOWERS[tower]
    vl = build(kind, **settings)
    ours = vl.encode_text(TEXTS)
    assert torch.allclose(ours, theirs(vl, TEXTS), atol=1e-5)
    assert torch.allclose(ours.norm(dim=1), torch.ones(len(TEXTS)))
    # the model tells texts apart, else this shows nothing
    assert (ours @ ours.T).fill_diagonal_(0).max() < 0.999
    assert torch.allclose(vl.encode_text(TEXTS, batch_size=2), ours, atol=1e-6)


def test_texts_are_encoded_as_open_clip_does_it_by_the_fixture(vl):
    assert torch.allclose(vl.encode_text(TEXTS), theirs(vl, TEXTS), atol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_cut_changes_nothing(tower):
    kind, settings = TOWERS[tower]
    vl = build(kind, **settings)
    ids = vl.tokenize(TEXTS[:3])
    short = vl.cut(ids)
    with torch.no_grad():
        whole, cut = (vl.encode_vectors(vl.word_vectors(i), i) for i in (ids, short))
    assert torch.allclose(whole, cut, atol=1e-6)
    end = max(len(vl.tokenizer.encode(t)) for t in TEXTS[:3]) + 2  # with start and end
    waiting = (
        "last, both ways, bias",
        "plain, both ways",
        "both ways, padding masked",
        "class token behind the text",
    )
    assert short.shape[1] == (20 if tower in waiting else end)
    assert vl.cut(vl.tokenize(TEXTS)).shape[1] == 20  # a text that fills the tower


def test_project_tokens_is_what_pool_applies(vl):
    ids = vl.tokenize(TEXTS[:3])
    with torch.no_grad():
        tokens = vl.text_tokens(vl.word_vectors(ids), ids)
        ends = vl.project_tokens(tokens)[torch.arange(3), ids.argmax(1)]
        assert torch.allclose(ends, vl.pool(tokens, ids), atol=1e-6)


def test_a_causal_tower_computes_what_is_pooled_and_words_that_are_known_once():
    vl, width, layers = build(), TEXT["width"], TEXT["layers"]
    ids = vl.cut(vl.tokenize(["a red circle on a very large blue square"] * 3))
    vectors, length = vl.word_vectors(ids), ids.shape[1]
    for known in (0, 4):
        opening = vl.opening(ids[0, :known].tolist()) if known else None
        new = length - known
        # projections and MLP; scores and weighted sums
        layer = new * (12 * width**2 + 2 * length * width)
        # all are looked at, but only the end of text looks
        last = new * 3 * width**2 + 9 * width**2 + 2 * length * width
        counted = multiply_adds(lambda opening=opening: vl.encode_vectors(vectors, ids, opening))
        assert counted == 3 * ((layers - 1) * layer + last + width * 32) / 1e6


@pytest.mark.parametrize(
    "tower", ["plain", "quick gelu", "custom", "custom, end by its id", "layers of another kind"]
)
def test_gradients_reach_the_word_vectors_as_through_open_clip(tower):
    kind, settings = TOWERS[tower]
    vl = build(kind, **settings)
    ids = vl.tokenize(TEXTS[:3])
    vectors = vl.word_vectors(ids).requires_grad_()
    hook = vl.tower.table.register_forward_hook(lambda *_: vectors)
    expected = vl.clip.encode_text(ids, normalize=True)
    hook.remove()
    direction = torch.randn(expected.shape)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), vectors)
    assert wanted[:, 1].abs().max() > 1e-3
    for known in (0, 1):
        opening = vl.opening(vl.words.prefix) if known else None
        ours = vl.encode_vectors(vectors, ids, opening)
        (got,) = torch.autograd.grad((ours * direction).sum(), vectors)
        assert torch.allclose(ours, expected, atol=1e-5) and torch.allclose(
            got[:, known:], wanted[:, known:], atol=1e-5
        )


def test_any_beginning_that_texts_share_is_read_once_with_the_same_result():
    vl = build()
    for word in "a the one my red blue tiny big any old".split():
        texts = [f"{word} square with a {shape}" for shape in ("star", "circle")]
        ids = vl.cut(vl.tokenize(texts))
        with torch.autocast("cpu", torch.bfloat16):  # makes nothing of it rougher
            opening = vl.opening(ids[0, :3].tolist())
        with torch.no_grad():
            found = vl.encode_vectors(vl.word_vectors(ids), ids, opening)
        assert torch.allclose(found, theirs(vl, texts), atol=1e-5)
        assert not any(part.requires_grad for part in opening)


def test_word_norm_leaves_out_words_that_were_never_seen(vl):
    with torch.no_grad():
        table = vl.clip.token_embedding.weight.zero_()
        table[5:8, 0] = torch.tensor([1.0, -3.0, 7.0])
    assert vl.word_norm == 3


@pytest.mark.parametrize("what", ["a text tower of another make", "another tokenizer"])
def test_refused_models(what):
    vl = build(open_clip.CustomTextCLIP)
    tokenizer = vl.tokenizer
    if what.startswith("another"):
        tokenizer, message = (lambda texts: None), "SimpleTokenizer.*has a function"
    else:
        vl.clip.text, message = nn.Linear(2, 2), "Linear.*cannot be entered with word vectors"
    with pytest.raises(ValueError, match=message):
        VLModel(vl.clip, vl.preprocess, tokenizer)


@pytest.mark.parametrize("part", ["pool", "embed"])
def test_a_model_that_says_something_else_from_vectors_than_from_ids_is_not_loaded(
    part, vl_folder, monkeypatch
):
    monkeypatch.setattr(
        f"isa_lite.models.text_tower.OpenClipText.{part}", lambda self, vectors, *_: vectors[:, 0]
    )
    with pytest.raises(ValueError, match="word vectors.*ids"):
        load_vl_model(str(vl_folder))


# ------------------------------------------------------------------------------------------------
# images


def test_arrays_take_a_short_way_with_the_same_result(vl, images):
    slow = torch.stack([vl.preprocess(Image.fromarray(i)) for i in images])
    assert torch.allclose(vl.pixels(images), slow, atol=1e-6)
    assert torch.allclose(vl.pixels([Image.fromarray(i) for i in images]), slow, atol=1e-6)
    assert torch.allclose(vl.pixels(list(images)), slow, atol=1e-6)
    other = build()  # mean and std that differ by channel, arrays of its own size and of another
    for size in (32, 64):
        slow = torch.stack([other.preprocess(Image.fromarray(i[:size, :size])) for i in images])
        assert torch.allclose(other.pixels(images[:, :size, :size]), slow, atol=1e-6), size


@pytest.mark.parametrize("vision", [VISION, RESNET, TIMM], ids=["vit", "resnet", "timm"])
def test_images_are_encoded_as_open_clip_does_it_with_and_without_patches(vision, images):
    vl = build(open_clip.CustomTextCLIP if vision is TIMM else open_clip.CLIP, vision)
    pictures = [Image.fromarray(i) for i in images]
    with torch.no_grad():
        if vision is RESNET:  # a random one says nearly the same of every image
            vl.clip.visual.attnpool.c_proj.bias -= vl.clip.encode_image(vl.pixels(images)).mean(0)
        theirs = vl.clip.encode_image(
            torch.stack([vl.preprocess(p) for p in pictures]), normalize=True
        )
        embedding, patches = vl.encode_pixels_and_patches(vl.pixels(images))
    assert (theirs @ theirs.T).fill_diagonal_(0).max() < 0.9999  # the model tells the images apart
    # what is left of it is small, and its rounding with it
    off = 1e-4 if vision is RESNET else 1e-5
    for ours in (vl.encode_images(images), vl.encode_images(pictures, batch_size=2), embedding):
        assert torch.allclose(ours, theirs, atol=off)
    assert patches.shape[:2] == (3, (32 // 8) ** 2 if vision is VISION else (64 // 32) ** 2)
    if vision is TIMM:
        with pytest.raises(ValueError, match="TimmModel.*lar_weight"):
            vl.project_patches(patches)
    else:
        projected = vl.project_patches(patches)
        assert projected.shape == (*patches.shape[:2], 32)
        assert torch.allclose(projected.norm(dim=2), torch.ones(patches.shape[:2]))


def test_patches_of_a_vit_are_its_last_layer_in_order_and_projected_as_its_class_token(images):
    vl = build()
    pixels = vl.pixels(images[:, :32, :32])
    seen = []
    vl.clip.visual.transformer.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        embedding = F.normalize(vl.clip.encode_image(pixels), dim=-1)
        patches = vl.encode_pixels_and_patches(pixels)[1]
        assert torch.allclose(patches, seen[0][:, 1:], atol=1e-5)
        assert torch.allclose(vl.project_patches(seen[0][:, :1])[:, 0], embedding, atol=1e-5)


def test_patches_of_a_resnet_are_projected_as_if_they_had_all_the_attention():
    vl = build(vision=RESNET)
    pool = vl.clip.visual.attnpool
    nn.init.zeros_(pool.positional_embedding)
    # the same at every place: where the attention goes is all one
    patch = torch.randn(5, pool.v_proj.in_features)
    with torch.no_grad():
        everywhere = pool(patch[:, :, None, None].expand(-1, -1, 2, 2))
        assert torch.allclose(
            vl.project_patches(patch[:, None])[:, 0], F.normalize(everywhere, dim=-1), atol=1e-5
        )


# -----------------------------------------------------------------------------------------------
# loading


def test_a_folder_loads_frozen_complete_and_without_a_network(vl_folder, images, no_network):
    for name in (str(vl_folder), f"local-dir:{vl_folder}"):
        vl = load_vl_model(name)
        assert not vl.training and not any(m.training for m in vl.modules())
        assert not any(p.requires_grad for p in vl.parameters())
        assert vl.image_size == 64 and vl.context_length == 77 and vl.word_width == 32
        with torch.no_grad():
            patches = vl.encode_pixels_and_patches(vl.pixels(images))[1]
            logits = vl.matcher(torch.randn(3, 7, 32), torch.ones(3, 7, dtype=bool), patches)
        assert logits.shape == (3, 2)


def test_a_folder_without_a_matching_encoder_loads(vl_folder, tmp_path):
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((vl_folder / name).read_bytes())
    assert load_vl_model(str(tmp_path)).matcher is None


@pytest.mark.skipif(
    not (DATA / SCENES_CLIP / "open_clip_model.safetensors").is_file(),
    reason="the shipped model is not there",
)
def test_the_shipped_model_loads_without_a_network(no_network):
    vl = load_vl_model()
    assert torch.allclose(vl.encode_text(TEXTS), theirs(vl, TEXTS), atol=1e-5)
    assert vl.matcher is not None and not any(p.requires_grad for p in vl.parameters())


def test_a_model_of_open_clip_loads_with_a_file_of_weights(
    tmp_path, monkeypatch, images, no_network
):
    model = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-ViT", model)
    saved = build()
    torch.save(saved.clip.state_dict(), tmp_path / "weights.pt")
    vl = load_vl_model("tiny-ViT", pretrained=str(tmp_path / "weights.pt"))
    assert torch.allclose(vl.encode_text(TEXTS), saved.encode_text(TEXTS), atol=1e-6)
    assert vl.matcher is None and vl.context_length == 20 and "tiny-ViT" in vl.name
    assert torch.allclose(
        vl.pixels(images),
        torch.stack([vl.preprocess(Image.fromarray(i)) for i in images]),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "name, pretrained, message",
    [
        ("ViT-B-23", "openai", "'ViT-B-23'.*ViT-B-32"),
        ("scene-clip", None, "did you mean .*scenes-clip"),
        ("%%%%%%", None, "unknown VL model '%%%%%%'$"),
        ("ViT-B-32", None, "needs weights.*laion2b_s34b_b79k"),
        (
            "ViT-B-32",
            "laion2b_s34b_b97k",
            "tag of weights for ViT-B-32.*did you mean.*laion2b_s34b_b79k",
        ),
        ("ViT-B-32", "no/such/file.pt", "no file.*no/such/file.pt"),
        ("ViT-B-32", "missing.safetensors", "no file.*missing.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_what_is_near(name, pretrained, message, no_network):
    with pytest.raises(ValueError, match=message):
        load_vl_model(name, pretrained)


def test_a_folder_that_holds_no_model(tmp_path, no_network):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*open_clip_config.json"):
        load_vl_model(str(tmp_path))


def test_a_folder_that_holds_settings_but_no_weights(tmp_path, vl_folder, no_network):
    (tmp_path / "open_clip_config.json").write_bytes(
        (vl_folder / "open_clip_config.json").read_bytes()
    )
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_vl_model(str(tmp_path))


def test_a_file_of_weights_that_is_cut_off_or_of_something_else_is_named(
    tmp_path, vl_folder, monkeypatch, no_network
):
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "tiny-ViT",
        {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT},
    )
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "garbage.pt").write_bytes(b"hello" * 100)
    (tmp_path / "garbage.safetensors").write_bytes(b"hello" * 100)
    (tmp_path / "short.pt").write_bytes(b"abc")  # the unpickler trips over each in another way
    (tmp_path / "binary.pt").write_bytes(b"X\x01\x00\x00\x00\xff.")
    for name in ("other.pt", "garbage.pt", "garbage.safetensors", "short.pt", "binary.pt"):
        with pytest.raises(ValueError, match=f"{name}.*weights of tiny-ViT"):
            load_vl_model("tiny-ViT", str(tmp_path / name))
    shutil.copytree(vl_folder, tmp_path / "cut")
    whole = (vl_folder / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "cut" / "open_clip_model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "open_clip_config.json").write_text('{"model_cfg": ')
    with pytest.raises(ValueError, match="half.open_clip_config.json"):
        load_vl_model(str(tmp_path / "half"))
    with pytest.raises(ValueError, match="no weights.*open_clip_config.json"):
        load_vl_model(str(tmp_path / "cut"))
    shutil.copytree(vl_folder, tmp_path / "matcher")
    matcher = tmp_path / "matcher" / "matching_encoder.safetensors"
    for spoil in (lambda: matcher.write_bytes(matcher.read_bytes()[:500]), matcher.unlink):
        spoil()
        with pytest.raises(ValueError, match="matcher.*matching_encoder"):
            load_vl_model(str(tmp_path / "matcher"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_not_taken_for_bad_weights(device):
    with pytest.raises(ValueError, match=f"device '{device}'.*'cpu'"):
        load_vl_model(device=device)


def test_fingerprint_is_of_weights_and_preprocessing(vl_folder, tmp_path):
    vl = load_vl_model(str(vl_folder))
    first = vl.fingerprint
    assert first == load_vl_model(str(vl_folder)).fingerprint
    seen = {first}
    for weight in (
        vl.clip.visual.conv1.weight,
        vl.clip.text_projection,
        vl.clip.logit_scale,
        vl.matcher.head[1].bias,
    ):
        with torch.no_grad():
            weight.view(-1)[0] += 1
        seen.add(vl.fingerprint)
        with torch.no_grad():
            weight.view(-1)[0] -= 1
    vl.clip.visual.bn1.running_mean[0] += 1  # a buffer counts as well
    seen.add(vl.fingerprint)
    for path in vl_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "open_clip_config.json").read_text())
    settings["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.4]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    seen.add(load_vl_model(str(tmp_path)).fingerprint)
    assert len(seen) == 7


def test_the_same_weights_with_another_activation_are_another_model():
    one, other = build(), build(quick_gelu=True)
    other.clip.load_state_dict(one.clip.state_dict())
    assert not torch.allclose(one.encode_text(TEXTS), other.encode_text(TEXTS), atol=1e-4)
    assert one.fingerprint != other.fingerprint


# ---------------------------------------------------------------------------------- what a model
# folder may say


def changed(vl_folder: Path, to: Path, change) -> Path:
    """The model's folder again, with its settings changed in place by `change`."""
    shutil.copytree(vl_folder, to)
    config = json.loads((to / "open_clip_config.json").read_text())
    config = change(config) or config
    (to / "open_clip_config.json").write_text(json.dumps(config))
    return to


def put(*path):
    """A change that puts the last of `path` at the place that the others name."""

    def change(config):
        for key in path[:-2]:
            config = config.setdefault(key, {})
        config[path[-2]] = path[-1]

    return change


@pytest.mark.parametrize(
    "path",
    [
        ("model_cfg", "text_cfg", "tokenizer_kwargs", {"trust_remote_code": True}),
        ("model_cfg", "text_cfg", "tokenizer_kwargs", {"bpe_path": "/etc/passwd"}),
        ("model_cfg", "vision_cfg", "timm_model_name", "hf-hub:somebody/something"),
        ("model_cfg", "vision_cfg", "timm_model_name", "local-dir:/tmp/x"),
        ("model_cfg", "vision_cfg", "act_kwargs", {"cls": "x"}),
        ("model_cfg", "cache_dir", "/tmp"),
        ("model_cfg", "text_cfg", []),
        ("model_cfg", "text_cfg", "tokenizer_kwargs", {"clean": "nothing"}),
        ("model_cfg", "text_cfg", "width", float("nan")),
        ("model_cfg", "text_cfg", "width", 10**15),
        ("model_cfg", "text_cfg", "heads", 0),
        ("model_cfg", "text_cfg", "layers", "four"),
        ("model_cfg", "embed_dim", None),
        ("model_cfg", []),
        ("preprocess_cfg", []),
        ("preprocess_cfg", "std", None),
        ("preprocess_cfg", "std", [0.5, 0.5, 0]),
        ("preprocess_cfg", "mean", [0.5, 0.5]),
        ("preprocess_cfg", "mean", [0.5, float("nan"), 0.5]),
        ("preprocess_cfg", "mean", [0.5, 1e30, 0.5]),
        ("preprocess_cfg", "resize_mode", "wide"),
        ("preprocess_cfg", "interpolation", ["bicubic"]),
        ("preprocess_cfg", "mena", [0.5, 0.5, 0.5]),
    ],
    ids=str,
)
def test_a_setting_that_is_not_known_to_be_harmless_or_cannot_work_is_refused(
    vl_folder, tmp_path, no_network, path
):
    folder = changed(vl_folder, tmp_path / "m", put(*path))
    with pytest.raises(ValueError, match="open_clip_config.json"):
        load_vl_model(str(folder))


@pytest.mark.parametrize("name", ["width", "layers"])
def test_sizes_of_an_image_tower_that_are_not_said_are_no_large_defaults(vl_folder, tmp_path, name):
    def without(config):
        del config["model_cfg"]["vision_cfg"][name]

    folder = changed(vl_folder, tmp_path / "m", without)
    with pytest.raises(ValueError, match=f"open_clip_config.json.*{name}"):
        load_vl_model(str(folder))


@pytest.mark.parametrize("key", ["hf_tokenizer_name", "hf_model_name"])
def test_a_local_folder_reaches_no_network(vl_folder, tmp_path, no_network, monkeypatch, key):
    pytest.importorskip("transformers")
    asked = []
    monkeypatch.setattr("isa_lite.support.hub.no_answer", lambda *a: asked.append(a) or "")
    folder = changed(
        vl_folder,
        tmp_path / "m",
        put("model_cfg", "text_cfg", key, "somebody/something-unheard-of"),
    )
    with pytest.raises(ConnectionError, match=re.escape(str(folder))):
        load_vl_model(str(folder))
    assert not asked


def test_every_model_that_open_clip_knows_sets_what_is_harmless():
    for name in open_clip.list_models():
        check_settings(Path(name), open_clip.get_model_config(name), "model_cfg")


def test_weights_that_are_no_numbers_are_refused(vl_folder, tmp_path):
    for name in ("open_clip_model.safetensors", "matching_encoder.safetensors"):
        folder = Path(shutil.copytree(vl_folder, tmp_path / name))
        tensors, _ = read_tensors(folder / name)
        next(v for v in tensors.values() if v.is_floating_point()).view(-1)[0] = float("nan")
        write_tensors(folder / name, tensors)
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            load_vl_model(str(folder))


@pytest.mark.parametrize("record", [[], {"width": 0}, {"width": "a"}, {"colour": 3}])
def test_settings_of_a_matching_encoder_that_cannot_work_are_named(vl_folder, tmp_path, record):
    folder = Path(shutil.copytree(vl_folder, tmp_path / "m"))
    (folder / "matching_encoder.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="matching_encoder.json"):
        load_vl_model(str(folder))


def test_an_export_that_was_cut_off_is_no_model(vl_folder, vl, tmp_path, monkeypatch):
    shutil.copytree(vl_folder, tmp_path / "m")
    config = PretrainConfig(
        image_size=64, embed_dim=16, vision_width=4, text_width=32, text_layers=1
    )
    write = {"write_text": pretrain.write_text, "write_tensors": pretrain.write_tensors}
    for stop in range(4):  # before the first, second, ... file is written
        calls = iter(range(stop))
        for name, real in write.items():

            def cut(*given, real=real, calls=calls):
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                real(*given)

            monkeypatch.setattr(pretrain, name, cut)
        with pytest.raises(KeyboardInterrupt):
            export(vl, config, tmp_path / "m")
        with pytest.raises(ValueError, match="open_clip_config.json"):
            load_vl_model(str(tmp_path / "m"))
    monkeypatch.undo()
    export(vl, config, tmp_path / "m")
    assert load_vl_model(str(tmp_path / "m")).matcher is not None


# ------------------------------------------------------------------------------------------ what is
# refused


@torch.no_grad()
def test_embeddings_that_are_nothing_are_refused(vl):
    for weights in vl.clip.visual.attnpool.c_proj.parameters():
        weights.zero_()
    with pytest.raises(ValueError, match="damaged"):
        vl.encode_images(np.zeros((1, 64, 64, 3), np.uint8))
    vl.clip.text_projection.fill_(float("nan"))
    with pytest.raises(ValueError, match="damaged"):
        vl.encode_text(["a"])


@pytest.mark.parametrize(
    "wrong", ["a red circle", b"red", None, [], ["red", None], [3], [["red"]], {"red": 1}, {"red"}]
)
def test_what_is_no_list_of_texts_is_refused(vl, wrong):
    for call in (vl.encode_text, vl.tokenize):
        with pytest.raises(ValueError, match="texts"):
            call(wrong)
    assert torch.equal(
        vl.encode_text(np.array(["red", "a star"])), vl.encode_text(("red", "a star"))
    )


@pytest.mark.parametrize("name", ["scenes-clip", "{}", "local-dir:{}", "hf-hub:{}", "blip:{}"])
def test_weights_beside_a_model_that_has_its_own_are_refused(vl_folder, name, no_network):
    with pytest.raises(ValueError, match="pretrained"):
        load_vl_model(name.format(vl_folder), pretrained="openai")


def test_no_weights_are_asked_for_by_an_empty_name(vl_folder, no_network):
    # a Path, and notebooks' way of saying none
    assert load_vl_model(vl_folder, pretrained="").name == str(vl_folder)


@pytest.mark.parametrize("vision", [VISION, RESNET, TIMM], ids=["vit", "resnet", "timm"])
def test_a_model_in_half_precision_reads_images_and_texts(vision, images):
    vl = build(open_clip.CustomTextCLIP if vision is TIMM else open_clip.CLIP, vision)
    exact = vl.encode_images(images), vl.encode_text(TEXTS)
    for kind in (torch.bfloat16, torch.float16):
        vl = vl.to(kind)
        with torch.no_grad():
            rough = (
                vl.encode_images(images),
                vl.encode_text(TEXTS),
                vl.encode_pixels_and_patches(vl.pixels(images))[0],
            )
        for one, other in zip(rough, (*exact, exact[0]), strict=True):
            assert one.dtype == torch.float32 and (one * other).sum(1).min() > 0.98
