"""Every family of text and image towers that open_clip has, small and with random weights, against
open_clip's own results.
"""

import sys

import open_clip
import parity
import pytest
import torch
from torch.nn import functional as F

from isa_lite.models.text_tower import text_config
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import compose, prompt_ids

transformers = pytest.importorskip(
    "transformers", reason="needs the extra: pip install 'isa_lite[blip]'"
)

#: One model of each family, those with small text towers; the whole list is `python
#: tests/parity.py`.
MODELS = [
    "ViT-S-32",
    "MobileCLIP-B",
    "MobileCLIP2-S0",
    "EVA02-B-16",
    "PE-Core-T-16-384",
    "ViTamin-S",
    "coca_ViT-B-32",
]
MODELS += [
    "ViT-B-16-SigLIP",
    "ViT-B-32-SigLIP2-256",
    "ViT-L-14-CLIPA",
    "ViT-L-14-worldwide",
    "coca_roberta-ViT-B-32",
]
MODELS += ["roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "mt5-base-ViT-B-32", "nllb-clip-base"]
STUB = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
TEXT = {"context_length": 20, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    """Few words, and narrow models of transformers: quick, with the same code."""
    monkeypatch.setattr(parity, "VOCABULARY", 2000)
    for name, (kind, settings) in parity.TEXT_MODELS.items():
        wide = {
            "d_model": 64,
            "d_ff": 64,
            "num_heads": 2,
            "d_kv": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        }
        wide |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        if "roberta" in kind:
            wide = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
        monkeypatch.setitem(parity.TEXT_MODELS, name, (kind, settings | wide))
    monkeypatch.setitem(parity.FRAMES, "nllb", ([1999], [2], 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_text_tower_of_each_family_equals_open_clips(name, tmp_path):
    found = parity.differences(parity.small(name, tmp_path))
    assert found.pop("moved") > 10 * parity.TOLERANCE  # else equality shows nothing
    assert max(found.values()) <= parity.TOLERANCE, found


def test_every_model_that_open_clip_knows_has_a_family_and_a_stand_in():
    families = {
        parity.family(name, open_clip.get_model_config(name)) for name in open_clip.list_models()
    }
    assert families == {
        parity.family(name, open_clip.get_model_config(name))
        for name in [*MODELS, "MobileCLIP-S1", "MobileCLIP2-B"]
    }


def test_a_model_that_fails_is_a_row_with_its_reason_and_not_the_end(monkeypatch):
    good = parity.differences
    monkeypatch.setattr(
        parity,
        "differences",
        lambda vl: good(vl) | {"words": 0.5} if vl.name == "ViT-S-16" else 1 / 0,
    )
    table = parity.parity(["ViT-S-16", "ViT-S-32"], progress=False)
    assert table["equal"].tolist() == [False, False]
    assert table["reason"].tolist() == ["off by 0.5", "ZeroDivisionError: division by zero"]


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "coca_ViT-B-32", "MobileCLIP-S1"])
def test_towers_that_see_the_padding_get_the_whole_row_and_need_it(name, tmp_path):
    vl = parity.small(name, tmp_path)
    ids, places = prompt_ids(vl, 3, ["make it blue"])
    assert ids.shape == places.shape == (1, vl.context_length)
    short = ids[:, :20]
    with torch.no_grad():
        whole, cut = (vl.encode_vectors(vl.word_vectors(i), i) for i in (ids, short))
    assert (whole - cut).abs().max() > 1e-3  # what a cut would have cost


@pytest.mark.parametrize(
    "name", ["ViT-S-32", "ViT-L-14-worldwide", "mt5-base-ViT-B-32", "coca_roberta-ViT-B-32"]
)
def test_towers_that_do_not_are_cut_at_the_longest_text(name, tmp_path):
    vl = parity.small(name, tmp_path)
    ids, _ = prompt_ids(vl, 3, ["make it blue", "zebra"])
    assert ids.shape[1] == (ids[0] != vl.words.pad).sum() < vl.context_length


# ------------------------------------------------------------------------------------- what cannot
# work


@pytest.mark.parametrize(
    "text, message",
    [
        ({"pool_type": "none"}, "a model.*pools by 'none'"),
        (
            {"hf_model_name": "nowhere/x", "hf_pooler_type": "max_pooler"},
            "a model.*pools by 'max_pooler'",
        ),
    ],
)
def test_a_family_that_cannot_work_is_refused_by_its_settings(text, message, monkeypatch):
    monkeypatch.setattr(
        "isa_lite.models.text_tower.repository", lambda *a: pytest.fail("looked for files first")
    )
    with pytest.raises(ValueError, match=message):
        text_config({"text_cfg": text}, "a model")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for config in ({"hf_tokenizer_name": "timm/x"}, {"hf_model_name": "roberta-base"}):
        with pytest.raises(ImportError, match=r"pip install 'isa_lite\[blip\]'"):
            text_config({"text_cfg": config}, "a model")


def test_a_tokenizer_whose_rows_do_not_fit_the_tower_is_refused():
    clip = open_clip.CLIP(32, STUB, TEXT)
    with pytest.raises(ValueError, match="77 ids.*20"):
        VLModel(clip, None, open_clip.SimpleTokenizer(), name="a model")


# -------------------------------------------------------------------------------------- image
# towers


def timm(name: str, size: int, pool: str = "avg", proj: str = "linear") -> dict:
    return {"image_size": size, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
COCA = VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
#: A small tower of each kind, and the number of its local tokens.
IMAGES = {
    "ViT (CLIP, DFN, MetaCLIP)": (VIT, 16),
    "ViT, mean pooled (CLIPA)": (VIT | {"pool_type": "avg", "no_ln_pre": True}, 16),
    "ModifiedResNet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, 4),
    "CoCa": (COCA, 16),
    "ConvNeXt": (timm("convnext_atto", 64, ""), 4),
    "Swin": (timm("swin_tiny_patch4_window7_224", 224), 49),
    "SigLIP": (timm("vit_tiny_patch16_224", 224, "map", "none"), 196),
    "EVA": (timm("eva02_tiny_patch14_224", 224, "token", "linear"), 256),
    "MobileCLIP-S": (timm("fastvit_t8", 64), 4),
    "ViTamin": (timm("vitamin_small_224", 224), 196),
    "PE-Core": (timm("vit_pe_core_tiny_patch16_384", 384, "", "none"), 576),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", IMAGES)
def test_local_tokens_of_each_image_tower_come_with_its_own_embedding(kind):
    vision, count = IMAGES[kind]
    torch.manual_seed(0)
    make = open_clip.CustomTextCLIP if "timm_model_name" in vision else open_clip.CLIP
    width = 192 if vision.get("timm_proj") == "none" else 32
    if kind == "CoCa":
        text = TEXT | {"embed_cls": True, "output_tokens": True}
        decoder = {"context_length": 20, "width": 32, "heads": 2, "layers": 1}
        clip = open_clip.CoCa(width, decoder, text, vision)
    else:
        clip = make(width, vision, TEXT)
    vl = VLModel(clip, None, open_clip.SimpleTokenizer(context_length=20), name=kind)
    pixels = torch.randn(2, 3, vl.image_size, vl.image_size)
    with torch.no_grad():
        own = clip.visual(pixels)
        own = F.normalize(own[0] if isinstance(own, tuple) else own, dim=-1)
        embedding, patches = vl.encode_pixels_and_patches(pixels)
        assert torch.allclose(embedding, own, atol=1e-5)
        assert torch.allclose(vl.encode_pixels(pixels), own, atol=1e-5)
    assert patches.ndim == 3 and patches.shape[:2] == (2, count)
    # they differ from place to place
    assert (patches[0] - patches[0].mean(0)).abs().max() > 1e-2 * patches[0].abs().max()
    try:
        vl.check_lar()
        assert torch.allclose(vl.project_patches(patches).norm(dim=-1), torch.ones(2, count))
    except ValueError as error:
        assert "does not project patches; set lar_weight to 0" in str(error)


def test_compose_works_on_a_siglip(tmp_path):
    vl = parity.small("ViT-B-16-SigLIP", tmp_path)
    one, other = compose(
        vl, torch.randn(1, 4, vl.word_width)[[0, 0]], ["make it blue", "make it red"]
    )
    assert (one - other).abs().max() > 1e-3
