import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from isa_lite.commands import main
from isa_lite.deploy.bench import backbones, random_model
from isa_lite.deploy.measure import multiply_adds, peak_activations, side_by_side
from isa_lite.deploy.query_timing import (
    PARTS,
    WHOLE,
    calls,
    cost,
    end_to_end,
    fusion_steps,
    sentence_steps,
    split,
)
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder


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


def test_the_peak_is_what_is_alive_at_once():
    x, weight = torch.zeros(256, 1024), torch.zeros(1024, 1024)  # 1 MiB and 4 MiB, both given

    def chain():
        a = x + 1  # 1 MiB
        b = a @ weight.t()  # a and b are alive; the transposed weight is a view of what was given
        del a
        return b.sum(0)  # b and 4 KiB

    assert peak_activations(chain) == 2
    assert peak_activations(lambda: [x + 1, x + 2, x + 3]) == 3
    assert peak_activations(lambda: x.view(-1).t()) == 0


def test_a_query_is_split_into_parts_that_add_up(vl):
    torch.manual_seed(0)
    encoder = QueryEncoder.for_model(vl, num_tokens=3, width=32, depth=1)
    table = split(vl, encoder, gallery=50, rounds=2)
    assert list(table.index)[-1] == "whole query" and (table["ms"] >= 0).all().all()
    work = table["multiply-adds"]
    for side in ("asymmetric", "symmetric"):
        assert abs(work[side][:-1].sum() / work.loc["whole query", side] - 1) < 1e-6
    assert work.loc["search", "symmetric"] == 50 * 16 / 1e6
    assert work.loc["text tower", "symmetric"] == work.loc["text tower", "asymmetric"] > 0
    weights = table["weights, MiB"]
    own = sum(p.numel() for p in vl.clip.visual.parameters()) * 4 / 2**20
    assert weights.loc["image encoding", "symmetric"] == own
    text = sum(p.numel() for p in vl.clip.parameters()) * 4 / 2**20 - own
    assert abs(weights.loc["text tower", "asymmetric"] - text) < 1e-6
    assert (table["activations, MiB"].loc["whole query"] > 0).all()
    large = split(
        vl,
        QueryEncoder.for_model(vl, backbone="vl", num_tokens=3, width=32, depth=1),
        gallery=50,
        rounds=1,
    )
    # the tower is the model's, and has to be there too
    assert list(large["weights, MiB"].loc["image encoding"]) == [own, own]


def test_the_table_of_backbones(vl):
    table = backbones(vl, 64, ("resnet18", "vit_tiny_patch16_224"), rounds=1)
    assert list(table.index) == ["VL image tower", "resnet18", "vit_tiny_patch16_224"]
    assert list(table["map"][1:]) == ["256 x 4 x 4", "192 x 4 x 4"] and list(
        table["stride"][1:]
    ) == [16, 16]
    # weights and biases of attention, MLP, norms
    blocks = 12 * (4 * 192 * 192 + 4 * 192 + 8 * 192 * 192 + 5 * 192 + 4 * 192)
    # patches; positions and class
    assert round(1e6 * table["parameters"].iloc[2]) == blocks + 192 * (3 * 16 * 16 + 1) + 192 * 18
    assert (table["VL tower / ms"] * table["ms"]).round(6).nunique() == 1 and (
        table[["multiply-adds", "ms"]] > 0
    ).all().all()


def test_only_the_warning_of_random_weights_is_hushed_and_only_while_they_are_made(caplog):
    filters = list(logging.getLogger().filters)
    assert random_model("ViT-S-32-alt").image_size == 224
    assert (
        not [r for r in caplog.records if "weights" in r.getMessage()]
        and logging.getLogger().filters == filters
    )


@pytest.mark.parametrize("cut", [True, False])
def test_the_steps_of_a_query_give_what_the_library_gives(vl, cut):
    torch.manual_seed(0)
    encoder = QueryEncoder.for_model(vl, num_tokens=3, width=32, depth=1)
    # to be cut to size
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 70, 90, 3), np.uint8))
    said = ["make it red", "without the star"]
    made = calls(
        sentence_steps(
            vl, encoder, pictures, said, lambda query: query, "this is {sentence}, {modifier}", cut
        )
    )
    expected = compose(
        vl, encoder.sentences(pictures).tokens, said, "this is {sentence}, {modifier}"
    )
    assert tuple(made) == (*PARTS, WHOLE) and torch.allclose(made[WHOLE](), expected, atol=1e-4)
    assert torch.equal(made["search"](), made[WHOLE]())
    fused = calls(fusion_steps(vl, pictures, said, lambda query: query, cut))
    expected = vl.encode_images(pictures) + vl.encode_text(said)
    assert torch.allclose(fused[WHOLE](), expected / expected.norm(dim=1, keepdim=True), atol=1e-5)
    assert set(PARTS) - set(fused) == {"token learner"}


def test_cutting_saves_work_on_both_sides_and_in_the_text_tower_alone(vl):
    encoder = QueryEncoder.for_model(vl, num_tokens=3, width=32, depth=1)
    picture, said = np.zeros((1, 64, 64, 3), np.uint8), ["make it red"]
    theirs = multiply_adds(lambda: vl.clip.encode_text(vl.tokenize(said)))
    for steps in (partial(sentence_steps, vl, encoder), partial(fusion_steps, vl)):
        made = [calls(steps(picture, said, lambda query: query, cut=cut)) for cut in (True, False)]
        cut, uncut = ({part: multiply_adds(call) for part, call in parts.items()} for parts in made)
        assert cut["text tower"] < 0.5 * uncut["text tower"] == 0.5 * theirs
        assert cut["image encoding"] == uncut["image encoding"] > 0
        assert cut[WHOLE] - cut["text tower"] == pytest.approx(uncut[WHOLE] - uncut["text tower"])


def test_a_query_is_timed_end_to_end_and_its_ratios_are_of_those_times(vl):
    encoder = QueryEncoder.for_model(vl, num_tokens=3, width=32, depth=1)
    ms, ratios = end_to_end(vl, encoder, rounds=3, gallery=100)
    assert list(ms.index) == [*PARTS, WHOLE] and len(ratios) == 6
    assert (ms.drop("token learner") > 0).all().all() and ms.loc["token learner"].isna().sum() == 2
    assert ratios["symmetric uncut / light cut"] == pytest.approx(
        ms.loc[WHOLE, "symmetric, uncut"] / ms.loc[WHOLE, "light, cut"]
    )


def test_costs_an_image_do_not_depend_on_the_batch(vl):
    encoder = QueryEncoder.for_model(vl, num_tokens=3, width=32, depth=1)
    one, three = (cost(vl, encoder, batch, rounds=1, gallery=20) for batch in (1, 3))
    assert (three["multiply-adds"] / one["multiply-adds"]).round(6).eq(1).all() and (
        one["ms"] > 0
    ).all()
    assert one.loc["VL image tower", "VL tower / ms"] == 1


@pytest.mark.parametrize("what", ["cost", "split"])
def test_an_encoder_that_is_not_there_is_named_in_a_line(tmp_path, capsys, what):
    with pytest.raises(SystemExit):
        main(["bench", what, "--encoder", str(tmp_path)])
    assert f"{tmp_path} holds no query_encoder.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "what, option",
    [
        ("query", "--encoder"),
        ("embed", "--vl-model"),
        ("cost", "--rounds"),
        ("split", "--pretrained"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(capsys, what, option):
    with pytest.raises(SystemExit):
        main(["bench", what, option, "7"])
    assert option in capsys.readouterr().err
