"""What one step of distillation costs, part by part: GFLOP, seconds, seconds as products.

A step is cut at the tensors that its parts hand on (feature map, pseudo-words, sentence
embeddings), so that the forward and the backward pass of each part can be timed alone. *Seconds x
rate* is the time in plain matrix products, which compares machines: how many GFLOP of float32
products the machine would do in the same time. Ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isa_lite.deploy.measure import side_by_side
from isa_lite.losses import gcd_loss, hardest_other, lar_loss
from isa_lite.models.optimization import frozen_stem, train_mode
from isa_lite.models.vl_model import VLModel
from isa_lite.prompt import Prompt, read_sentences
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support.draws import blur, local_count
from isa_lite.support.settings import DistillConfig
from isa_lite.support.training import keep_freed_memory
from isa_lite.world import scenes

#: Rows, inner and outer width of the products that `product_rate` times: some of a step with the
#: shipped models, and a large one.
SIZES = ((2688, 192, 768), (2688, 768, 192), (2560, 128, 512), (1024, 1024, 1024))


def product_rate(sizes: Sequence[tuple[int, int, int]] = SIZES, rounds: int = 15) -> float:
    """GFLOP of float32 products a second: the median over sizes of their median rates."""
    rates = []
    for rows, inner, outer in sizes:
        product = partial(torch.mm, torch.randn(rows, inner), torch.randn(inner, outer))
        ms = side_by_side({"": product}, rounds, warm_up=0)[""]
        rates.append(2e-6 * rows * inner * outer / ms)
    return median(rates)


#: Calls what it is given, once, and notes it under a part's name.
Clock = Callable[[str, Callable[[], object]], object]


class _Parts:
    """Passes by name: `run` cuts the graph before a part, `back` goes through it alone."""

    def __init__(self, clock: Clock):
        self.clock, self.kept = clock, {}

    def run(self, part: str, call: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `call` makes of its inputs, cut off from what made them."""
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        outputs = self.clock(f"{part} forward", lambda: call(*inputs))
        self.kept[part] = inputs, outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs

    def back(self, part: str, *grads: Tensor | None) -> list[Tensor | None]:
        """Gradients of the part's inputs, from its outputs' (None: not needed)."""
        inputs, outputs = self.kept.pop(part)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        self.clock(f"{part} backward", lambda: torch.autograd.backward(*zip(*pairs, strict=True)))
        return [x.grad for x in inputs]


def _counted(name: str, call: Callable, table: dict[str, float]) -> object:
    # fused attention hides from the counter
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = call()
    table[name] = table.get(name, 0) + counter.get_total_flops() / 1e9
    return result


def _timed(name: str, call: Callable, table: dict[str, list[float]]) -> object:
    began = time.perf_counter()
    result = call()
    table.setdefault(name, []).append(time.perf_counter() - began)
    return result


def _examples(vl: VLModel, config: DistillConfig) -> tuple:
    """Rendered scenes, their embeddings B x E, their patches B x P x width, negatives M x E."""
    images = range(config.batch_size)
    world = scenes.sample_scenes(len(images), seed=config.seed)
    data = scenes.render_many(world, images, vl.image_size)
    with torch.no_grad():
        own, patches = vl.encode_pixels_and_patches(vl.pixels(data))
    return data, own, patches, F.normalize(torch.randn(config.negatives, own.shape[1]), dim=1)


def step_cost(
    vl: VLModel, encoder: QueryEncoder, config: DistillConfig, rounds: int = 7
) -> pd.DataFrame:
    """GFLOP, seconds (median of `rounds`) and seconds x rate of each part (rows) of one step of
    distillation, and of the whole.

    On rendered scenes, on the CPU, in float32, with as many images and negatives as `config` says.
    The products behind *rate* are timed before and after, see `product_rate`; the table's `attrs`
    hold it. The counter takes the gradient of a depthwise convolution's weights for a full one's,
    so the backbone's GFLOP backwards are too many.
    """
    data, own, patches, others = _examples(vl, config)
    encoder.to(memory_format=torch.channels_last)
    train_mode(encoder, frozen_stem(encoder, config))
    pixels = encoder.pixels(data).to(memory_format=torch.channels_last)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    local = local_count(len(data), config)
    said = Prompt.of(vl, encoder.config.num_tokens, config.template)

    def step(clock: Clock) -> None:
        parts = _Parts(clock)
        features = parts.run("backbone", lambda x: encoder.backbone(x)[0], pixels)
        tokens = parts.run("token learner", lambda x: encoder.mapping(x).tokens, features)
        tokens = blur(tokens, config.word_noise, 0, config.seed)
        query, context, places = parts.run(
            "text tower", lambda x: read_sentences(vl, x, said, local), tokens
        )
        parts.run("GCD", lambda x: gcd_loss(x, own, config.temperature, others), query)
        (to_query,), to_context = parts.back("GCD", torch.tensor(config.gcd_weight)), None
        if local:
            hardest = hardest_other(query.detach() @ own.T).numpy()[:local]

            def lar(context: Tensor) -> Tensor:
                known = (lambda rows: patches[torch.from_numpy(rows)], np.arange(local), hardest)
                return lar_loss(vl, context, places, *known, config.temperature)[0]

            parts.run("LAR", lar, context)
            (to_context,) = parts.back("LAR", torch.tensor(config.lar_weight))
        (to_tokens,) = parts.back("text tower", to_query, to_context, None)
        (to_features,) = parts.back("token learner", to_tokens)
        parts.back("backbone", to_features)
        clock("optimizer", optimizer.step)
        optimizer.zero_grad(set_to_none=True)

    flops: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    step(lambda part, call: _counted(part, call, flops))
    keep_freed_memory()
    rates = [product_rate()]
    for _ in range(rounds + 1):  # the first is a warm-up
        step(lambda part, call: _timed(part, call, times))
    rate = median([*rates, product_rate()])
    medians = {part: median(seconds[1:]) for part, seconds in times.items()}
    table = pd.DataFrame({"GFLOP": flops, "s": medians})
    table.loc["whole step"] = table.sum()
    table["s x rate"] = table["s"] * rate
    table.attrs["rate"] = rate
    return table
