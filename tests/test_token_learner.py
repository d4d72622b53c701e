"""What holds for every mapping network, and what only attention gives."""

import pytest
import torch

from isa_lite import mappings, token_learner
from isa_lite.deploy.measure import multiply_adds
from isa_lite.mappings import MAPPINGS
from isa_lite.models.start_words import start_from
from isa_lite.token_learner import AdaptiveTokenLearner, Shapes


def build(name: str, num_tokens: int = 5, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    return MAPPINGS[name](Shapes(10, (4, 4), num_tokens, 16, 0.3), **settings).eval()


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_mapping_gives_a_sentence(name):
    mapping = build(name)
    tokens, maps, reads = mapping(3 * torch.randn(6, 10, 4, 4))
    assert reads is None  # nobody asked
    count = 1 if name == "single vector" else 5
    assert tokens.shape == (6, count, 16) and maps.shape == (6, count, 4, 4)
    assert (maps >= 0).all() and torch.allclose(maps.sum((2, 3)), torch.ones(6, count), atol=1e-5)
    # the stretch starts at one
    assert torch.allclose(tokens.norm(dim=-1), torch.tensor(0.3), atol=1e-5)
    torch.nn.init.normal_(mapping.to_word.stretch.weight, std=10)
    norms = mapping(3 * torch.randn(6, 10, 4, 4)).tokens.norm(dim=-1)
    assert (
        norms.min() >= 0.15 - 1e-5
        and norms.max() <= 0.6 + 1e-5
        and norms.max() > norms.min() + 0.05
    )


def test_the_maps_are_the_weights_of_what_is_pooled():
    learner = build("adaptive", depth=0)
    features = torch.randn(2, 10, 4, 4)
    tokens, maps, _ = learner(features)
    seen = learner.project(features) + learner.position  # B x width x 4 x 4
    for b in range(2):
        for token in range(5):
            pooled = sum(
                maps[b, token, i, j] * seen[b, :, i, j] for i in range(4) for j in range(4)
            )
            word = learner.to_word(learner.norm(pooled + learner.identity[token]))
            assert torch.allclose(word, tokens[b, token], atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_the_number_of_tokens_is_what_was_asked_for_except_of_a_single_vector(num_tokens):
    for name in MAPPINGS:
        tokens, maps, _ = build(name, num_tokens)(torch.randn(2, 10, 4, 4))
        assert tokens.shape[1] == maps.shape[1] == (1 if name == "single vector" else num_tokens)
        assert torch.isfinite(tokens).all()


@pytest.mark.parametrize(
    "name, blind",
    [
        ("adaptive", False),
        ("slot attention", False),
        ("resampler", False),
        ("single vector", True),
        ("average pooling", True),
    ],
)
def test_only_attention_knows_where_things_are(name, blind):
    mapping, features = build(name), torch.randn(2, 10, 4, 4)
    shuffled = features.flatten(2)[:, :, torch.randperm(16)].view_as(features)
    for other in (shuffled, features.flip(2), features.flip(3)):
        difference = float(
            (mapping(features).tokens - mapping(other).tokens).norm(dim=-1).max().detach()
        )
        assert difference < 1e-5 if blind else difference > 1e-3  # of vectors 0.3 long
    assert (mapping(features).maps == 1 / 16).all() == blind


@pytest.mark.parametrize(
    "name, count, of_maps",
    [
        ("adaptive", 3, 0),
        ("slot attention", 3, -1),
        ("resampler", 2, -1),
        ("single vector", 1, 0),
        ("average pooling", 1, 0),
    ],
)
def test_all_reads_of_the_image_come_when_asked_for_and_change_nothing(name, count, of_maps):
    mapping, features = build(name), torch.randn(2, 10, 3, 4)
    plain, asked = mapping(features), mapping(features, reads=True)
    length = plain.tokens.shape[1]
    assert asked.reads.shape == (2, count, length, 3, 4) and (asked.reads >= 0).all()
    assert torch.allclose(asked.reads.sum((3, 4)), torch.ones(2, count, length), atol=1e-5)
    assert torch.equal(asked.reads[:, of_maps], asked.maps)
    assert torch.allclose(asked.tokens, plain.tokens, atol=1e-5) and torch.allclose(
        asked.maps, plain.maps, atol=1e-5
    )


def test_the_second_read_is_the_blocks_cross_attention_by_hand():
    learner, features = build("adaptive", 3, depth=1), torch.randn(1, 10, 2, 4)
    memory = learner.placed(features).flatten(2)[0].T  # HW x width
    (block,) = learner.blocks
    start = learner(features).maps[0].flatten(1) @ memory + learner.identity  # L x width
    w_query, w_key, _ = block.cross.in_proj_weight.chunk(3)
    b_query, b_key, _ = block.cross.in_proj_bias.chunk(3)
    q, k = block.norm1(start) @ w_query.T + b_query, memory @ w_key.T + b_key
    heads = [
        (q[:, h : h + 32] @ k[:, h : h + 32].T / 32**0.5).softmax(1) for h in range(0, 128, 32)
    ]
    assert torch.allclose(
        learner(features, reads=True).reads[0, 1].flatten(1), torch.stack(heads).mean(0), atol=1e-5
    )


def test_training_does_not_compute_weights_that_nobody_asked_for(monkeypatch):
    asked, attend = [], token_learner.attend

    def watched(*args, weights=False):
        asked.append(weights)
        return attend(*args, weights=weights)

    for module in (token_learner, mappings):
        monkeypatch.setattr(module, "attend", watched)
    # its maps are those of the last
    for name, expected in (("adaptive", [False] * 4), ("resampler", [False, True])):
        asked.clear()
        build(name)(torch.randn(1, 10, 4, 4))
        assert asked == expected


def test_the_position_code_is_stretched_over_another_grid():
    # The logit map shows the code's first channel alone: 0, 1, 2, 3 from left to right.
    learner = build("adaptive", 1)
    for parameter in (
        learner.project.weight,
        learner.project.bias,
        learner.attend.weight,
        learner.attend.bias,
    ):
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        learner.attend.weight[:, 0] = 1
        learner.position[:, 0] = torch.arange(4.0)
    for width, expected in ((4, [0, 1, 2, 3]), (8, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])):
        row = learner(torch.randn(1, 10, 2, width)).maps.log()[0, 0, 0]
        assert (row - row[0]).tolist() == pytest.approx(expected, abs=1e-5)


def test_another_grid_interpolates_the_position_code():
    learner = build("adaptive")
    assert learner(torch.randn(1, 10, 7, 3)).maps.shape == (1, 5, 7, 3)
    torch.nn.init.constant_(learner.position, 0.7)
    flat = torch.randn(1, 10, 1, 1)  # one colour everywhere: how fine the grid is cannot matter
    assert torch.allclose(
        learner(flat.expand(1, 10, 4, 4)).tokens,
        learner(flat.expand(1, 10, 9, 6)).tokens,
        atol=1e-5,
    )


def test_tokens_start_out_different():
    def likeness(learner: AdaptiveTokenLearner) -> float:
        tokens = torch.nn.functional.normalize(learner(torch.randn(4, 10, 4, 4)).tokens, dim=-1)
        pairs = tokens @ tokens.transpose(1, 2)  # B x L x L
        return float((pairs.sum((1, 2)) - 5).mean().detach() / 20)

    learner = build("adaptive")
    assert likeness(learner) < 0.6
    torch.nn.init.zeros_(learner.identity)
    assert likeness(learner) > 0.9  # what the identities are for


@pytest.mark.parametrize("name", MAPPINGS)
def test_without_norm_matching_nothing_holds_the_length_of_a_pseudo_word(name):
    torch.manual_seed(0)
    mapping = MAPPINGS[name](Shapes(10, (4, 4), 5, 16, None)).eval()
    with torch.no_grad():
        mapping.to_word.direction.weight.mul_(100)
    assert (
        mapping(torch.randn(2, 10, 4, 4)).tokens.norm(dim=-1).max() > 5
    )  # nothing holds the length; with matching, 0.6 is the most


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_sentence_that_starts_from_words_is_near_them_whatever_it_sees(name):
    torch.manual_seed(0)
    mapping = MAPPINGS[name](Shapes(10, (4, 4), 5, 64, None)).eval()
    words = torch.randn(3, 64)  # of length 8 or so
    start_from(mapping.to_word, words)
    tokens = mapping(3 * torch.randn(20, 10, 4, 4)).tokens  # 20 x L x 64
    for place in range(tokens.shape[1]):
        gap = (tokens[:, place] - words[place % 3]).norm(dim=-1)
        assert 0.001 < gap.mean() < 0.6 * words[place % 3].norm()
        other = (tokens[:, place] - words[(place + 1) % 3]).norm(dim=-1)
        assert (gap < other).all()


def test_slots_compete_for_each_position():
    mapping = build("slot attention", 3, depth=0)
    features = torch.randn(2, 10, 4, 4)
    maps = mapping(features).maps
    memory = mapping.norm_memory(mapping.placed(features).flatten(2).transpose(1, 2))
    for b in range(2):
        shares = torch.stack([  # one round by hand: a row a slot, what it gets of each position
            torch.stack([mapping.query(mapping.norm_slots(slot)) @ mapping.key(place) / 128**0.5 for place in memory[b]])
            for slot in mapping.start
        ]).softmax(0)  # fmt: skip
        assert torch.allclose(shares.sum(0), torch.ones(16))
        assert torch.allclose(maps[b].flatten(1), shares / shares.sum(1, keepdim=True), atol=1e-5)
    alone = build("slot attention", 1)(features).maps
    assert torch.allclose(alone, torch.full_like(alone, 1 / 16))  # no rival, so no choice


def test_a_resamplers_maps_are_its_attention_without_the_latents():
    mapping = build("resampler", 3, depth=1)
    features = torch.randn(1, 10, 4, 4)
    memory = mapping.norm_memory(mapping.placed(features).flatten(2)[0].T)  # HW x width
    query = mapping.norms[0][0](mapping.latents)
    w_query, w_key, _ = mapping.attends[0].in_proj_weight.chunk(3)
    b_query, b_key, _ = mapping.attends[0].in_proj_bias.chunk(3)
    q, k = query @ w_query.T + b_query, torch.cat([memory, query]) @ w_key.T + b_key
    heads = [
        (q[:, h : h + 32] @ k[:, h : h + 32].T / 32**0.5).softmax(1) for h in range(0, 128, 32)
    ]
    on_places = torch.stack(heads).mean(0)[:, :16]
    assert on_places.sum(1).max() < 0.999  # some goes to latents, so that the scaling matters
    expected = on_places / on_places.sum(1, keepdim=True)
    assert torch.allclose(mapping(features).maps[0].flatten(1), expected, atol=1e-5)


def test_a_resampler_that_never_looks_is_refused():
    with pytest.raises(ValueError, match="depth.*1"):
        build("resampler", depth=0)


@pytest.mark.parametrize("name", MAPPINGS)
def test_the_multiply_adds_of_every_mapping_can_be_counted(name):
    mapping, features = build(name), torch.randn(1, 10, 4, 4)
    assert multiply_adds(lambda: mapping(features)) > 0
