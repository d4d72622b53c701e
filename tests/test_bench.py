import torch
from torch import nn

from isa_lite.bench import multiply_adds, side_by_side


def test_multiply_adds_of_layers_that_one_can_count_by_hand():
    linear, x = nn.Linear(30, 50, bias=False), torch.zeros(7, 30)
    assert multiply_adds(lambda: linear(x)) == 7 * 30 * 50 / 1e6
    conv = nn.Conv2d(3, 8, 3, padding=1, groups=1, bias=False)
    assert multiply_adds(lambda: conv(torch.zeros(2, 3, 10, 10))) == 2 * 8 * 100 * 27 / 1e6


def test_attention_is_counted_although_the_fast_path_hides_it():
    block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.zeros(1, 10, 32)
    projections = 10 * (4 * 32 * 32 + 2 * 32 * 64)
    assert multiply_adds(lambda: block(x)) == (projections + 2 * 10 * 10 * 32) / 1e6
    assert torch.backends.mha.get_fastpath_enabled()  # as before


def test_calls_are_timed_in_turn():
    order = []
    times = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4)
    assert order == ["a", "b"] * 7 and set(times) == {"a", "b"} and min(times.values()) >= 0
