"""The learning-rate schedule of a distillation and of the light backbone's start. Ours."""

from __future__ import annotations

import numpy as np

from isa_lite.support.settings import BackboneConfig, DistillConfig


def learning_rate(step: int, config: DistillConfig | BackboneConfig) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * (0.505 + 0.495 * float(np.cos(np.pi * step / config.steps)))
