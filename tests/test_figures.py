"""What the figures draw; nbval does not compare images."""

import io

import numpy as np
import pandas as pd
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from isa_lite.course import figures
from isa_lite.distill import History
from isa_lite.retrieval import metrics, scene_queries

BENCH = scene_queries.make_benchmark(queries=4, gallery=20, seed=1, size=32)


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_a_figure_as_the_last_line_of_a_cell_is_seen():
    shown, _ = DisplayFormatter().format(figures.weight_curves({"sum": [1, 2]}, [0, 1]))
    assert Image.open(io.BytesIO(shown["image/png"])).width > 300


def test_a_retrieved_target_is_marked_in_words_and_colour_and_nothing_else_is():
    row = np.array([BENCH.target[1], BENCH.reference[0], BENCH.target[0]])
    figure = figures.retrieval(BENCH, [1], row[None], "title")
    assert titles(figure) == ["reference", "1: target", "2", "3"]
    frames = [axes.spines["top"].get_edgecolor() for axes in figure.axes]
    assert frames[1] != frames[2] == frames[3]
    assert " ".join(figure.axes[0].get_xlabel().split()) == f"“{BENCH.texts[1]}”"
    assert np.array_equal(figure.axes[3].images[0].get_array(), BENCH.images[BENCH.target[0]])


def test_a_query_whose_target_is_not_among_the_answers_says_so():
    figure = figures.retrieval(
        BENCH, [1, 1], np.array([[BENCH.target[1], 0], [BENCH.reference[0], 0]])
    )
    assert [axes.get_xlabel() for axes in figure.axes][2::3] == ["", "no target so far"]


def test_bars_show_recall_and_its_interval():
    ranks = {"isa": np.array([1, 1, 1, 2]), "target ceiling": np.array([1, 1, 1, 1])}
    axes = figures.recall_bars(ranks).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [75, 100]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ranks)
    assert tuple(axes.lines[0].get_xdata()) == metrics.recall_interval(ranks["isa"], 1)


def test_bars_over_seeds_show_means_and_t_intervals_and_ceilings_last():
    runs = [
        {"methods": {"target ceiling": {"R@1": 5.0}, "isa": {"R@1": v}, "text only": {"R@1": 7.0}}}
        for v in (40.0, 50.0, 60.0)
    ]
    axes = figures.seed_bars(runs).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "text only",
        "isa",
        "target ceiling",
    ]
    assert [bar.get_width() for bar in axes.patches] == [7, 50, 5]
    assert tuple(axes.lines[1].get_xdata()) == metrics.seed_interval([40, 50, 60])


def test_weight_curves_mark_the_best_weight():
    axes = figures.weight_curves(
        {"sum": [1.0, 5.0, 2.0], "product": [3.0, 2.0, 1.0]}, [0.1, 0.5, 0.9]
    ).axes[0]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [
        ([0.1, 0.5, 0.9], [1, 5, 2]),
        ([0.5], [5]),
        ([0.1, 0.5, 0.9], [3, 2, 1]),
        ([0.1], [3]),
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sum", "product"]


def test_curves_show_running_means_and_recall():
    history = History(gcd=[4.0, 2.0, 0.0], recall=[(2, 10.0), (3, 30.0)])
    gcd, lar, recall = figures.curves({"run": history}, window=2).axes
    assert list(gcd.lines[0].get_ydata()) == [3, 1] and list(gcd.lines[0].get_xdata()) == [2, 3]
    assert not lar.lines and "not used" in lar.texts[0].get_text()
    assert list(recall.lines[0].get_ydata()) == [10, 30]
    marked = figures.curves({"run": history}, window=2, step=3).axes
    assert [list(axes.lines[-1].get_xdata()) for axes in (marked[0], marked[2])] == [
        [3, 3],
        [3, 3],
    ] and not marked[1].lines
    assert figures.png(marked[0].figure).startswith(b"\x89PNG")


def test_a_dollar_sign_in_a_caption_is_a_dollar_sign():
    figure = figures.contact_sheet([BENCH.images[0]] * 2, ["costs $5 or $7", "$\\foo{$ x"])
    assert figures.png(figure).startswith(b"\x89PNG") and titles(figure)[:2] == [
        "costs $5 or $7",
        "$\\foo{$ x",
    ]
    assert not any(axes.title.get_parse_math() for axes in figure.axes[:2])


def test_the_losses_of_a_few_steps_are_a_line():
    losses = (
        figures.curves({"run": History(gcd=[4.0, 2.0, 0.0, 0.0], recall=[(2, 10.0)])})
        .axes[0]
        .lines[0]
    )
    assert list(losses.get_ydata()) == [2, 2 / 3] and list(losses.get_xdata()) == [3, 4]


def test_attention_lays_each_map_over_the_image():
    maps = np.random.default_rng(0).random((3, 6, 6))
    figure = figures.attention(BENCH.images[0], maps)
    assert titles(figure)[:4] == ["image", "token 1", "token 2", "token 3"]
    laid = figure.axes[2].images[1]
    assert np.allclose(laid.get_array(), maps[1] / maps[1].max()) and tuple(laid.get_extent()) == (
        -0.5,
        31.5,
        31.5,
        -0.5,
    )


def test_all_reads_of_a_token_stand_in_its_column():
    reads = np.random.default_rng(0).random((3, 5, 6, 6))
    figure = figures.attention(BENCH.images[0], reads, [f"{i + 1}: a" for i in range(5)], columns=4)
    # two bands of three reads: the image, and three tokens in the first
    grid = np.array(figure.axes).reshape(6, 4)
    assert [a.get_title() for a in grid[0]] == ["image", "1: a", "2: a", "3: a"]
    assert [a.get_title() for a in grid[3]] == ["image", "4: a", "5: a", ""]
    assert [len(a.images) for a in grid.flat] == [
        1,
        2,
        2,
        2,
        0,
        2,
        2,
        2,
        0,
        2,
        2,
        2,
        1,
        2,
        2,
        0,
        0,
        2,
        2,
        0,
        0,
        2,
        2,
        0,
    ]
    for token, read, axes in ((1, 2, grid[2, 2]), (4, 0, grid[3, 2])):
        assert np.allclose(
            axes.images[1].get_array(), reads[read, token] / reads[read, token].max()
        )
    assert [a.get_ylabel() for a in grid[:, 1]] == ["read 1", "read 2", "read 3"] * 2


def test_a_cover_curve_is_the_mean_over_queries_in_its_interval():
    values = {
        "first": np.array([[1.0, 0.8], [0.5, 0.3]]),
        "random": np.array([[1.0, 1.0], [0.9, 0.7]]),
    }
    axes = figures.cover_curves(values, (0.1, 0.5), "cosine", "title").axes[0]
    assert [line.get_label() for line in axes.lines] == ["first", "random"]
    assert np.allclose(axes.lines[0].get_xydata(), [[10, 0.9], [50, 0.4]])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert np.allclose([band.min(), band.max()], [0.3, 1.0])  # of two queries, drawn again


def test_token_bars_stand_side_by_side():
    axes = figures.token_bars({"a": [1.0, 2.0], "b": [3.0, 4.0]}, "score", level=1.5).axes[0]
    bars = [(round(bar.get_x() + bar.get_width() / 2, 6), bar.get_height()) for bar in axes.patches]
    assert bars == [(-0.2, 1), (0.8, 2), (0.2, 3), (1.2, 4)]
    assert list(axes.lines[0].get_ydata()) == [1.5, 1.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]


def test_a_heatmap_says_its_numbers_in_legible_ink():
    figure = figures.heatmap(
        pd.DataFrame({"x": [0.0, 100.0], "y": [40.4, 60.0]}, index=["a", "b"]), "percent"
    )
    texts = {tuple(t.get_position()): (t.get_text(), t.get_color()) for t in figure.axes[0].texts}
    assert texts == {
        (0, 0): ("0", "white"),
        (1, 0): ("40", "white"),
        (0, 1): ("100", "black"),
        (1, 1): ("60", "black"),
    }
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert figure.axes[1].get_ylabel() == "percent"
    assert [label.get_rotation() for label in figure.axes[0].get_xticklabels()] == [0, 0]


def test_a_long_heatmap_lies_on_its_side():
    table = pd.DataFrame(
        {"color": np.arange(13.0), "size": np.zeros(13)},
        index=[f"token {i + 1}" for i in range(13)],
    )
    axes = figures.heatmap(table, "percent").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["color", "size"]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(table.index)
    assert {t.get_position(): t.get_text() for t in axes.texts}[12, 0] == "12"
    assert axes.get_xticklabels()[0].get_rotation() == 40  # else they lie over one another


def test_a_heatmap_knows_no_minus_zero():
    figure = figures.heatmap(pd.DataFrame({"without the change": [-0.4, 0.4, -0.6]}), "points")
    assert [t.get_text() for t in figure.axes[0].texts] == ["0", "0", "-1"]
    assert figure.axes[0].get_xticklabels()[0].get_rotation() == 25


def test_a_png_holds_all_that_is_drawn_and_no_more():
    figure = figures.contact_sheet(
        list(BENCH.images[:2]), ["one line", "a title that needs several lines " * 3], columns=2
    )
    pixels = np.asarray(Image.open(io.BytesIO(figures.png(figure))).convert("L"))
    border = round(0.06 * figure.dpi) - 2
    for edge in (pixels[:border], pixels[-border:], pixels[:, :border], pixels[:, -border:]):
        assert edge.min() == 255  # nothing is cut
    drawn = np.flatnonzero((pixels < 255).any(1))
    # and nothing but the border is empty
    assert drawn[0] <= border + 4 and drawn[-1] >= len(pixels) - border - 5


def test_panels_of_maps_share_one_legend():
    points = {name: np.random.default_rng(0).random((3, 2)) for name in ("images", "texts")}
    figure = figures.maps(
        {"before": points, "after": points, "later": points}, [("images", "texts")]
    )
    assert [axes.get_title("left") for axes in figure.axes[:3]] == [
        "before",
        "after",
        "later",
    ] and not figure.axes[3].axison
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(points)
    assert not any(axes.get_legend() for axes in figure.axes) and len(figure.axes[2].lines) == 3


def test_a_search_curve_has_plain_numbers_of_milliseconds():
    times, found = (
        {"exact": 1.1, "IVF, 1": 0.04, "IVF, 2": 0.06},
        {"exact": 100.0, "IVF, 1": 50.0, "IVF, 2": 95.0},
    )
    axes = figures.search_curve(times, found, ["IVF, 1", "IVF, 2"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "0.05",
        "0.1",
        "0.2",
        "0.5",
        "1",
    ]
    assert [t.get_text() for t in axes.texts] == ["exact", "1", "2"] and list(
        axes.lines[0].get_ydata()
    ) == [50, 95]
    assert axes.get_legend().get_texts()[0].get_text().startswith("IVF, ")


def test_the_names_of_points_side_by_side_do_not_lie_over_one_another():
    times = {"exact, PyTorch": 1.04, "exact, FAISS": 0.77, "IVF, 1": 0.03, "IVF, 2": 0.06}
    figure = figures.search_curve(times, dict.fromkeys(times, 100.0), ["IVF, 1", "IVF, 2"])
    figure.draw_without_rendering()
    one, other = (t.get_window_extent() for t in figure.axes[0].texts[:2])
    assert not one.overlaps(other)


def test_a_name_beside_the_end_of_the_search_curve_does_not_lie_over_its_number():
    times = {"exact, PyTorch": 0.355, "exact, FAISS": 0.74, "IVF, 1": 0.052, "IVF, 32": 0.27}
    found = {"exact, PyTorch": 100.0, "exact, FAISS": 100.0, "IVF, 1": 43.0, "IVF, 32": 99.7}
    figure = figures.search_curve(times, found, ["IVF, 1", "IVF, 32"])
    figure.draw_without_rendering()
    name, _, _, number = (t.get_window_extent() for t in figure.axes[0].texts)
    assert not name.overlaps(number)


def test_bars_in_pairs_stand_together_and_the_second_is_paler():
    ranks = {name: np.array([1, 2]) for name in ("a, with", "a, without", "b, with", "b, without")}
    bars = figures.recall_bars(ranks, pairs=True).axes[0].patches
    middles = [bar.get_y() + bar.get_height() / 2 for bar in bars]
    assert np.allclose(middles, [0, 1, 2.5, 3.5])
    assert [bar.get_alpha() for bar in bars] == [1, 0.55, 1, 0.55]


def test_text_is_wrapped_at_spaces():
    assert figures.wrap("make the red circle blue", 9) == "make the\nred\ncircle\nblue"


def test_attention_of_several_lengths_wraps_into_rows():
    rng = np.random.default_rng(0)
    maps = {"2": rng.random((2, 3, 3)), "5": rng.random((5, 3, 3))}
    axes = np.array(figures.attention_by_length(BENCH.images[0], maps, columns=3).axes).reshape(
        3, 4
    )
    assert [a.texts[0].get_text() if a.texts else "" for a in axes[:, 0]] == ["L = 2", "L = 5", ""]
    assert [[len(a.images) for a in row[1:]] for row in axes] == [[2, 2, 0], [2, 2, 2], [2, 2, 0]]
    assert np.allclose(axes[2, 2].images[1].get_array(), maps["5"][4] / maps["5"][4].max())


def test_the_parts_of_a_querys_time_are_stacked_and_the_whole_is_marked():
    rows = ["image encoding", "text tower", "whole query"]
    table = pd.DataFrame({"asymmetric": [1.0, 2.0, 2.8], "symmetric": [4.0, 2.0, 6.3]}, index=rows)
    axes = figures.latency(table).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [
        (0, 1),
        (1, 2),
        (0, 4),
        (4, 2),
    ]
    assert [tuple(mark.get_xydata()[0]) for mark in axes.lines] == [(2.8, 0), (6.3, 1)]
    assert [(text.get_text().strip(), text.get_position()[0]) for text in axes.texts] == [
        ("2.8 ms", 3),
        ("6.3 ms", 6.3),
    ]
    assert sorted(t.get_text() for t in axes.figure.legends[0].get_texts()) == [
        *rows[:2],
        "whole query, in one call",
    ]


def test_a_caption_is_text_and_no_markdown(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    figures.show(
        figures.contact_sheet([np.zeros((8, 8, 3), np.uint8)]),
        "a [link](javascript:1) <img src=x> *b*",
        "alt",
    )
    said = shown[1].data
    assert (
        "<img" not in said and r"\[link\]" in said and r"\*b\*" in said and said.startswith("*a ")
    )
