"""The losses against NumPy and loops."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from isa_lite.losses import gcd_loss, hardest_other, late_interaction_loss, matching_loss
from isa_lite.models.matching_encoder import MatchingEncoder


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def matcher() -> MatchingEncoder:
    torch.manual_seed(0)
    return MatchingEncoder(12, 10, 4, width=8, depth=2, heads=2).eval().requires_grad_(False)


def test_gcd_is_its_formula():
    q, g, t = unit(6, 8, seed=1).double().numpy(), unit(6, 8, seed=2).double().numpy(), 0.07
    e = np.exp(q @ g.T / t)
    expected = -np.mean(np.log(np.diag(e) / e.sum(1)) + np.log(np.diag(e) / e.sum(0))) / 2
    assert float(gcd_loss(torch.tensor(q), torch.tensor(g), t)) == pytest.approx(expected, abs=1e-9)


def test_gcd_by_hand():
    # Two images with orthogonal embeddings and perfect sentences: logits are 1/t on the diagonal
    # and 0 elsewhere.
    q = torch.eye(2)
    assert float(gcd_loss(q, q, 0.5)) == pytest.approx(np.log(1 + np.exp(-2)), abs=1e-6)
    assert float(gcd_loss(q, q.flip(0), 0.5)) == pytest.approx(np.log(1 + np.exp(2)), abs=1e-6)


def test_gcd_with_further_negatives_is_the_formula_over_all_of_them():
    rng = np.random.default_rng(1)
    q, g, more = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (rng.normal(size=(n, 5)) for n in (3, 3, 7))
    )
    t = 0.2
    everything = np.exp(q @ np.concatenate([g, more]).T / t)  # 3 x 10
    own = np.exp((q * g).sum(1) / t)
    forwards, backwards = (
        -np.log(own / everything.sum(1)),
        -np.log(own / np.exp(q @ g.T / t).sum(0)),
    )
    expected = (forwards.mean() + backwards.mean()) / 2
    assert float(gcd_loss(*map(torch.tensor, (q, g)), t, torch.tensor(more))) == pytest.approx(
        expected, abs=1e-9
    )


def test_the_hardest_other_is_never_the_own_one():
    similarity = torch.randn(9, 9, generator=torch.Generator().manual_seed(3)) + 5 * torch.eye(9)
    before = similarity.clone()
    expected = [
        max((j for j in range(9) if j != i), key=lambda j: similarity[i, j]) for i in range(9)
    ]
    assert hardest_other(similarity).tolist() == expected and torch.equal(similarity, before)


def test_matching_loss_one_pair_at_a_time(matcher):
    text, patches, other = (
        torch.randn(5, 7, 12),
        torch.randn(5, 4, 10),
        torch.tensor([2, 0, 4, 1, 3]),
    )
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 2, 6])[:, None]
    terms, right = [], []
    for i in range(5):
        own, wrong = (
            matcher(text[i : i + 1], mask[i : i + 1], patches[j : j + 1])[0].double()
            for j in (i, int(other[i]))
        )
        terms += [-own.log_softmax(0)[1], -wrong.log_softmax(0)[0]]
        right.append(own[1] - own[0] > wrong[1] - wrong[0])
    loss, share = matching_loss(matcher, text, mask, patches, other)
    assert float(loss) == pytest.approx(float(sum(terms) / 10), abs=1e-5)
    assert float(share) == pytest.approx(float(sum(right) / 5))
    assert 0 < share < 1  # else the case is too easy to tell
    # Seen from the other side, what was right is wrong.
    _, turned = matching_loss(
        matcher, text.repeat(2, 1, 1), mask.repeat(2, 1), *swapped(patches, other)
    )
    assert float(turned) == pytest.approx(0.5)


def swapped(patches: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every sentence twice: with its own image against the other, and with the other against its
    own.
    """
    count = len(patches)
    return torch.cat([patches, patches[other]]), torch.cat(
        [torch.arange(count) + count, torch.arange(count)]
    )


def test_the_matching_encoder_does_not_see_padding(matcher):
    text, patches = torch.randn(3, 6, 12), torch.randn(3, 4, 10)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    short = matcher(text, mask, patches)
    assert torch.allclose(
        matcher(torch.where(mask[..., None], text, 9.0), mask, patches), short, atol=1e-5
    )
    assert torch.allclose(
        matcher(text[1:2, :2], mask[1:2, :2], patches[1:2]), short[1:2], atol=1e-5
    )
    # where a patch lies matters
    assert not torch.allclose(matcher(text, mask, patches.flip(1)), short, atol=1e-4)


def test_late_interaction_by_loops():
    tokens, patches, t = unit(4, 3, 8, seed=1), unit(4, 5, 8, seed=2), 0.1
    score = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            score[i, j] = np.mean(
                [max(float(word @ patch) for patch in patches[j]) for word in tokens[i]]
            )
    e = np.exp(score / t)
    expected = -np.mean(np.log(np.diag(e) / e.sum(1)) + np.log(np.diag(e) / e.sum(0))) / 2
    assert float(late_interaction_loss(tokens, patches, t)) == pytest.approx(expected, abs=1e-5)


def test_both_kinds_of_lar_reach_the_words(matcher):
    text = torch.randn(3, 6, 12, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    matching_loss(matcher, text, mask, torch.randn(3, 4, 10), torch.tensor([1, 2, 0]))[0].backward()
    assert torch.equal(text.grad.norm(dim=-1) > 0, mask)  # padding gets none
    assert all(p.grad is None for p in matcher.parameters())  # frozen
    words = unit(3, 2, 8).requires_grad_()
    late_interaction_loss(words, unit(3, 4, 8, seed=1), 0.1).backward()
    assert (words.grad.norm(dim=-1) > 0).all()


def test_gcd_pulls_a_sentence_to_its_image():
    query, target = unit(6, 8, seed=1).requires_grad_(), unit(6, 8, seed=2)
    loss = gcd_loss(query, target, 0.1)
    loss.backward()
    nearer = normalize(query.detach() - 0.05 * query.grad, dim=-1)
    assert gcd_loss(nearer, target, 0.1) < loss and ((nearer - query) * target).sum(1).mean() > 0
