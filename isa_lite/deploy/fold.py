"""A query encoder made quicker for use, with the same result: batch normalisation folded into the
convolutions before it.

In evaluation mode a batch normalisation is a fixed scale and shift of each channel, which the
convolution in front of it can do with its own weights. Images laid out channels-last suit
convolutions on CPUs. A folded encoder is for answering queries: it cannot be trained further, and
saving it is refused. The folding is textbook; finding the pairs by watching a run is ours.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from isa_lite.query_encoder import QueryEncoder


def _pairs(module: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose output went straight, and only once, into a batch normalisation."""
    # by the output's identity; the tensor is kept, so that no other takes its id
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(conv, inputs, output):
        made[id(output)] = (conv, output)

    def before_norm(norm, inputs):
        if id(inputs[0]) in made:
            found.append((made[id(inputs[0])][0], norm))

    hooks = [
        m.register_forward_hook(after_conv) for m in module.modules() if isinstance(m, nn.Conv2d)
    ]
    hooks += [
        m.register_forward_pre_hook(before_norm)
        for m in module.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    try:
        module(example)
    finally:
        for hook in hooks:
            hook.remove()
    convs, norms = [id(c) for c, _ in found], [id(n) for _, n in found]
    return [
        (c, n)
        for c, n in found
        if convs.count(id(c)) == norms.count(id(n)) == 1 and n.track_running_stats
    ]


class FoldedEncoder(QueryEncoder):
    """What `folded` makes: like its encoder, but it can be neither trained nor saved."""

    def __init__(self, encoder: QueryEncoder):
        nn.Module.__init__(self)  # no fresh weights: everything is the encoder's
        self.config, self.preprocess = encoder.config, encoder.preprocess
        self.backbone, self.mapping = (
            copy.deepcopy(encoder.backbone),
            copy.deepcopy(encoder.mapping),
        )
        self.backbone.to(memory_format=torch.channels_last)
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels: B x 3 x H x W -> the backbone's map, B x C x h x w."""
        pixels = pixels.to(next(self.parameters()).device, memory_format=torch.channels_last)
        return self.backbone(pixels)[0].contiguous()  # attention, in turn, is slow on channels-last

    def save(self, folder, info=None) -> None:
        raise ValueError("a folded encoder cannot be saved; save the encoder that it was made from")


@torch.no_grad()
def folded(encoder: QueryEncoder) -> FoldedEncoder:
    """A copy of the encoder, frozen, for answering queries: the same sentences (to rounding),
    sooner.

    Raises ValueError where the copy's sentences differ from the encoder's, which a backbone that
    shares layers could bring about.
    """
    quick, size = FoldedEncoder(encoder), encoder.config.image_size
    example = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(
        next(quick.parameters())
    )
    names = {id(m): name for name, m in quick.backbone.named_modules()}
    for conv, norm in _pairs(quick.backbone, example):
        # timm's normalisation brings its activation along
        after = [norm.drop, norm.act] if hasattr(norm, "act") else []
        for old, new in ((conv, fuse_conv_bn_eval(conv, norm)), (norm, nn.Sequential(*after))):
            parent, _, leaf = names[id(old)].rpartition(".")
            setattr(quick.backbone.get_submodule(parent), leaf, new)
    quick.backbone.to(memory_format=torch.channels_last)
    was_training = encoder.training
    before, after = encoder.eval()(example).tokens, quick(example).tokens
    encoder.train(was_training)
    if not torch.allclose(before, after, atol=1e-3 * float(before.abs().max())):
        raise ValueError(
            f"the batch normalisation of backbone {encoder.config.backbone!r} cannot be folded; use"
            " it as it is"
        )
    return quick
