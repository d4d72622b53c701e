"""Symmetric ISA: the large image tower on the query side too, to measure the light encoder by.

The asymmetric query side pays a light backbone. The symmetric one pays the tower that embedded the
gallery; its local features feed the same token learner, trained by the same distillation. What
separates the two is the backbone alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from isa_lite.models.vl_model import VLModel

#: The name under which `backbones.build_backbone` gives the VL model's own image tower.
LARGE_TOWER = "vl"


class LargeTower(nn.Module):
    """The frozen image tower of `vl` as a backbone: B x 3 x H x W -> a list of one B x C x h x w.

    The map is the last layer's local features; a vision transformer's patch tokens are laid out on
    their grid. The tower belongs to `vl`: it is not among this module's parameters, is neither
    trained nor saved with the query encoder, and stays in evaluation mode. Raises ValueError
    without a VL model, or for patch tokens that do not form a square.
    """

    def __init__(self, vl: VLModel | None):
        super().__init__()
        if vl is None:
            fault = "a query encoder with the backbone 'vl' reads the VL model's image tower"
            raise ValueError(f"{fault}: give it the model (vl=)")
        object.__setattr__(self, "vl", vl)  # past nn.Module, which would make it a part of this one
        self.preprocess = vl.preprocess  # a PIL image as the tower wants it

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> list[Tensor]:
        patches = self.vl.encode_pixels_and_patches(pixels)[1].float()  # B x N x C
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            raise ValueError(
                f"{self.vl.name}: its {patches.shape[1]} patch tokens do not lie on a square grid"
            )
        return [patches.transpose(1, 2).unflatten(2, (side, side))]
