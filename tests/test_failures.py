"""Failed queries: which, in what order, judged how; and the page that shows them."""

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup

from isa_lite.analysis.sentences import kept_and_followed
from isa_lite.course import figures
from isa_lite.experiments import failures
from isa_lite.retrieval.scene_queries import make_benchmark
from isa_lite.world import scenes

BENCH = make_benchmark(queries=12, gallery=60, seed=3, size=32)


@pytest.fixture(scope="module")
def failed() -> pd.DataFrame:
    """Every query's answers are its own four images; the first answer is a hard negative, and only
    query 2 is right.
    """
    gallery = torch.eye(60)
    queries = torch.zeros(12, 60)
    for q in range(12):
        first, second, third = (3, 2, 1) if q != 2 else (1, 2, 3)
        queries[q, 4 * q + first], queries[q, 4 * q + second], queries[q, 4 * q + third] = (
            0.9,
            0.5,
            0.2,
        )
    return failures.failures(BENCH.embedded(None, gallery), queries, answers=3)


def test_wrong_first_answers_are_judged_and_the_worst_come_first(failed):
    # a hard negative can happen to be the target of another query
    assert 2 not in failed.index and len(failed) >= 9
    for q, row in failed.iterrows():
        assert row["found"] == [4 * q + 3, 4 * q + 2, 4 * q + 1]
        reference, target, answer = (BENCH.scenes[4 * q + i] for i in (0, 1, 3))
        assert (row["kept"], row["followed"]) == kept_and_followed(reference, target, answer)
        worse = (
            "image"
            if row["kept"] < row["followed"]
            else "words"
            if row["followed"] < row["kept"]
            else "both alike"
        )
        assert row["ignored"] == worse and row["rank"] == 3
    score = (failed["kept"] + failed["followed"]).tolist()
    assert score == sorted(score) and score[0] < score[-1]


def test_the_summary_counts_by_kind(failed):
    table = failures.summary(BENCH, failed)
    assert table["wrong"].sum() == len(failed)
    for kind, row in table.iterrows():
        mine = [failures.kind_of(kinds) == kind for kinds in BENCH.kinds]
        assert row["queries"] == sum(mine)
        some = failed[failed["kind"] == kind]
        assert row["kept"] == pytest.approx(100 * some["kept"].mean())


def test_a_scene_in_words():
    star = scenes.Object(0, "star", "red", "small")
    words = failures.describe(scenes.Scene((star,), "white", "flat"))
    assert words == "a small red star at the top left; white background, flat style"


def test_the_page_stands_alone_and_says_everything_in_words(failed):
    text = failures.page(BENCH, failed, each=2)
    page = BeautifulSoup(text, "html.parser")
    cards = page.select("article")
    shown = pd.concat(
        [failed[failed["kind"] == kind].head(2) for kind in failures.summary(BENCH, failed).index]
    )
    assert len(cards) == len(shown)
    for card, (q, row) in zip(cards, shown.iterrows(), strict=True):
        assert card.h3.text == f"“{BENCH.texts[q]}”" and card["data-ignored"] == row["ignored"]
        alts = [image["alt"] for image in card.select("img")]
        assert (
            alts[0] == f"reference: {failures.describe(BENCH.scenes[BENCH.reference[q]])}"
            and len(alts) == 5
        )
        assert (
            f"kept {row['kept']:.0%}, followed {row['followed']:.0%}"
            in card.select_one(".verdict").text
        )
        assert len(card.select(".target")) >= 2  # the target, and where it came
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.select("img"))
    assert not page.select("script[src], link, [href^=http]") and "url(" not in text
    assert {a["href"][1:] for a in page.select("table a")} == {
        s["id"] for s in page.select("section")
    }
    assert [radio["value"] for radio in page.select("fieldset input")] == [
        "all",
        "image",
        "words",
        "both alike",
    ]


def test_words_of_a_query_cannot_break_the_page(failed):
    bench = make_benchmark(queries=12, gallery=60, seed=3, size=32)
    q = int(failed.index[0])
    bench.texts[q] = "<script>alert(1)</script>"
    page = BeautifulSoup(failures.page(bench, failed), "html.parser")
    assert len(page.select("script")) == 1 and any(
        bench.texts[q] in h.text for h in page.select("h3")
    )


def test_the_figure_shows_both_numbers(failed):
    table = failures.summary(BENCH, failed)
    axes = figures.kept_and_followed(table).axes[0]
    kept, followed = (np.asarray(marks.get_offsets())[:, 0] for marks in axes.collections)
    assert np.allclose(kept, table["kept"]) and np.allclose(followed, table["followed"])
    assert (
        axes.get_yticklabels()[0].get_text() == f"{table.index[0]} ({table['wrong'].iloc[0]} wrong)"
    )
