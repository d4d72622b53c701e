"""The panels: set from Python against direct searches, in papermill and nbval, and by keyboard in a
real browser.
"""

import base64
import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pages
import papermill
import pytest
import torch
from conftest import nbval
from ipywidgets import HBox
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from isa_lite.analysis.sentences import nearest_words
from isa_lite.course import figures, panels
from isa_lite.distill import History
from isa_lite.methods import baselines
from isa_lite.methods.isa import Isa
from isa_lite.models.vl_model import DATA, load_vl_model
from isa_lite.prompt import compose
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval import scene_queries
from isa_lite.retrieval.gallery import Gallery
from isa_lite.support.images import ImageFolder

ROOT = Path(__file__).resolve().parents[1]
TOO_LONG = "put a star " * 60
HISTORY = History(gcd=[4.0, 2.0, 3.0, 1.0], lar=[1.0, 1.0, 0.0, 0.0], recall=[(2, 10.0), (4, 30.0)])


class Page(HTMLParser):
    """The tags of a piece of HTML with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def pixels(source: str) -> np.ndarray:
    return np.asarray(
        Image.open(
            io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))
        ).convert("RGB")
    )


def message(panel) -> str:
    return Page(panel.status.value).text


def failed(panel) -> bool:
    return Page(panel.status.value).all("div")[0]["role"] == "alert"


@pytest.fixture(scope="module")
def world():
    """A small gallery with queries, and the shipped models (with random ones, near ties would hang
    on the last digit).
    """
    vl = load_vl_model()
    encoder = QueryEncoder.load(DATA / "scenes-query-encoder", vl)
    bench = scene_queries.make_benchmark(queries=8, gallery=40, seed=1, size=vl.image_size)
    return bench, vl, encoder, vl.encode_images(bench.images)


# ------------------------------------------------------------------------------------- composing a
# query


def test_a_panel_shows_what_a_direct_search_finds_for_every_query_of_the_benchmark(world):
    bench, vl, encoder, embeddings = world
    panel = panels.compose_panel(*world)
    gallery, exclude = Gallery(embeddings, range(40)), torch.from_numpy(bench.reference)
    found = {
        "ISA": Isa(encoder)(bench.embedded(vl, embeddings)),
        "image + text": baselines.image_plus_text(bench.embedded(vl, embeddings)),
    }
    marked = 0
    for q in (3, 0, 7):
        panel.controls["reference"].value = q
        assert (
            panel.controls["modifier"].value
            == panel.controls["suggestions"].children[0].description
            == bench.texts[q]
        )
        pictures, figures = (Page(panel.picture.value).all(tag) for tag in ("img", "figure"))
        assert np.array_equal(pixels(pictures[0]["src"]), bench.images[bench.reference[q]])
        shown = []
        for name, queries in found.items():
            best = gallery.search(queries, 10, exclude)[1][q].tolist()
            assert panel.shown[name] == best
            shown += best
            rank = bench.ranks(queries, embeddings)[q]
            assert f"place {rank} by {name}" in message(panel)
        for i, picture, figure in zip(shown, pictures[1:], figures[1:], strict=True):
            assert np.array_equal(pixels(picture["src"]), bench.images[i])
            assert all(
                o.color in picture["alt"] and o.shape in picture["alt"]
                for o in bench.scenes[i].objects
            )
            assert (figure["class"] == "isa-target") == (
                bench.scenes[i] == bench.scenes[bench.target[q]]
            )
            marked += figure["class"] == "isa-target"
    assert marked > 0


def test_words_of_ones_own_are_searched_and_nothing_is_marked(world):
    bench, vl, encoder, embeddings = world
    panel = panels.compose_panel(*world)
    panel.controls["modifier"].value = "now it snows"
    query = compose(
        vl, encoder.sentences(bench.images[bench.reference[:1]]).tokens, ["now it snows"]
    )
    direct = Gallery(embeddings, range(40)).search(
        query, 10, torch.from_numpy(bench.reference[:1])
    )[1]
    assert panel.shown["ISA"] == direct[0].tolist()
    assert (
        "nobody has said which image is right" in message(panel)
        and "isa-target" not in panel.picture.value
    )
    panel.controls["modifier"].value = bench.texts[0]
    assert "target is at place" in message(panel)


def test_a_suggestion_is_typed_for_you_and_another_reference_is_another(world):
    panel = panels.compose_panel(*world)
    offered = [b for b in panel.controls["suggestions"].children if b.layout.display != "none"]
    assert (
        len(offered) >= 6
        and len({b.description for b in offered}) == len(offered)
        and all(b.description for b in offered)
    )
    before, last = panel.picture.value, offered[-1].description
    offered[-1].click()
    assert (
        panel.controls["modifier"].value == last
        and last in message(panel)
        and panel.picture.value != before
    )
    for _ in range(5):
        old = panel.controls["reference"].value
        panel.controls["another"].click()
        assert panel.controls["reference"].value != old
        assert panel.controls["modifier"].value == world[0].texts[panel.controls["reference"].value]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (TOO_LONG, "too long for the text tower's 77; shorten the modifier"),
        ("  ", "there are no words"),
    ],
)
def test_bad_words_are_refused_in_the_panel_and_good_ones_clear_the_error(world, words, complaint):
    panel = panels.compose_panel(*world)
    good = panel.picture.value
    panel.controls["modifier"].value = words
    assert failed(panel) and complaint in message(panel) and "truncate" not in message(panel)
    assert panel.picture.value == "" and panel.shown == {}
    panel.controls["modifier"].value = world[0].texts[0]
    assert not failed(panel) and panel.picture.value == good


def test_what_a_user_types_is_text_and_no_markup(world):
    panel = panels.compose_panel(*world)
    for words in ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<b>" + TOO_LONG):
        panel.controls["modifier"].value = words
        page = Page(panel.status.value + panel.picture.value)
        assert words.strip()[:40] in page.text  # a long one is shown by its beginning
        assert {tag for tag, _ in page.tags} <= {
            "div",
            "b",
            "img",
            "figure",
            "figcaption",
        } and "onerror" not in str(page.tags)
        assert all(picture["src"].startswith("data:") for picture in page.all("img"))


def test_the_name_of_a_file_is_text_and_no_markup():
    name = '"><script>alert(1)</script>.png'
    page = Page(panels._card("data:", name, name))
    assert page.tags == [
        ("figure", {"class": ""}),
        ("img", {"src": "data:", "alt": name}),
        ("figcaption", {}),
    ]
    assert page.text == name


# ------------------------------------------------------------------------------------ pictures of
# one's own


@pytest.fixture
def folder(world, tmp_path):
    for i, name in enumerate(["a&b", "c", "d", "e"]):
        Image.fromarray(world[0].images[i]).resize((90, 64)).save(tmp_path / f"{name}.png")
    return ImageFolder(tmp_path)


def test_a_folder_is_searched_by_file_name_and_the_reference_is_left_out(world, folder):
    _, vl, encoder, _ = world
    embeddings = vl.encode_images(list(folder))
    panel = panels.search_panel(folder, vl, encoder, embeddings)
    assert failed(panel) and "there are no words" in message(panel)
    panel.controls["modifier"].value = "in stripes"
    panel.controls["reference"].value = 2
    query = compose(vl, encoder.sentences([folder[2]]).tokens, ["in stripes"])
    order = [i for i in (embeddings @ query[0]).argsort(descending=True).tolist() if i != 2]
    assert panel.shown["ISA"] == [folder.files[i].name for i in order] and set(
        panel.shown["image + text"]
    ) == set(panel.shown["ISA"])
    assert "picture a&b.png" in {
        p["alt"].split(": ")[1] for p in Page(panel.picture.value).all("img")
    }
    folder.files[3].unlink()
    panel.controls["reference"].value = 3
    assert failed(panel) and "e.png" in message(panel) and panel.picture.value == ""


def test_what_cannot_be_searched_is_refused(world, folder):
    _, vl, encoder, embeddings = world
    with pytest.raises(ValueError, match="40 embeddings but 4 ids"):
        panels.search_panel(folder, vl, encoder, embeddings)
    with pytest.raises(ValueError, match="at least two images"):
        panels.search_panel([folder[0]], vl, encoder, embeddings[:1])
    with pytest.raises(ValueError, match="encoders is empty"):
        panels.token_panel([folder[0]], vl, {})
    with pytest.raises(ValueError, match="a history without steps"):
        panels.training_panel(History())


# -------------------------------------------------------------------------------------------------
# tokens


def test_a_token_shows_its_attention_and_its_nearest_words(world):
    bench, vl, encoder, _ = world
    panel = panels.token_panel(bench.images[:5], vl, {"shipped": encoder})
    assert panel.controls["encoder"].disabled and "num_tokens" in panel.children[0].value
    sentence = encoder.sentences(bench.images[4:5], reads=True)
    panel.controls["image"].value = 4
    for t in (1, 2, 12):
        panel.controls["token"].value = t
        assert panel.controls["token slider"].value == t
        ((words, cosines),) = [
            zip(*near, strict=True) for near in nearest_words(vl, sentence.tokens[0, t - 1 : t], 5)
        ]
        assert [word for word, _ in panel.shown["words"]] == list(words)
        assert [cosine for _, cosine in panel.shown["words"]] == pytest.approx(cosines, abs=1e-5)
        assert torch.allclose(panel.shown["reads"], sentence.reads[0, :, t - 1], atol=1e-5)
        (picture,) = Page(panel.picture.value).all("img")
        titles = ["read 1", "read 2", "read 3"]
        figure = figures.attention(
            bench.images[4], sentence.reads[0, :, t - 1].numpy(), titles, columns=4, side=1.8
        )
        difference = pixels(picture["src"]).astype(int) - pixels(
            base64.b64encode(figures.png(figure)).decode()
        )
        assert abs(difference).max() <= 2  # a last digit may round to another shade
        assert all(
            f"read {n}: " in picture["alt"] and f"ead {n}: " in message(panel) for n in (1, 2, 3)
        )
        assert (
            f"token {t}" in picture["alt"]
            and panel.shown["words"][0][0] in Page(panel.picture.value).text
        )


def test_with_several_encoders_the_tokens_follow_the_length_of_the_sentence(world):
    bench, vl, encoder, _ = world
    single = QueryEncoder.for_model(vl, mapping="single vector").eval()
    panel = panels.token_panel(bench.images[:2], vl, {"many": encoder, "one": single})
    # the shorter one is the first
    assert not panel.controls["encoder"].disabled and "encoder “one”" in message(panel)
    assert panel.controls["token"].max == 1 and "evenly" in message(panel)
    panel.controls["encoder slider"].value = 2
    panel.controls["token slider"].value = 7
    assert panel.controls[
        "token"
    ].value == 7 and f"Token 7 of {encoder.config.num_tokens}, encoder “many”" in message(panel)
    panel.controls["encoder"].value = 1
    assert panel.controls["token"].value == panel.controls[
        "token slider"
    ].max == 1 and "Token 1 of 1" in message(panel)


def test_the_place_of_the_strongest_attention_in_words():
    for cell, place in (
        ((0, 5), "top right"),
        ((3, 2), "center"),
        ((5, 0), "bottom left"),
        ((1, 4), "top right"),
    ):
        attention = torch.full((6, 6), 0.01)
        attention[cell] = 0.65
        assert f"at the {place}, where one of 36 cells gets 65%" in panels._place(attention)


# -----------------------------------------------------------------------------------------------
# training


@pytest.mark.slow
def test_a_training_is_read_off_at_a_step_by_hand():
    panel = panels.training_panel({"a": HISTORY, "b": History(gcd=[6.0, 4.0], recall=[(2, 5.0)])})
    panel.controls["smoothing"].value = 2
    panel.controls["step"].value = 2
    assert panel.shown["a"] == {"GCD": 3.0, "LAR": 1.0, "recall": 10.0}
    assert (
        panel.shown["b"]["GCD"] == 5
        and np.isnan(panel.shown["b"]["LAR"])
        and panel.shown["b"]["recall"] == 5
    )
    before = pixels(Page(panel.picture.value).all("img")[0]["src"])
    panel.controls["step slider"].value = 3
    assert panel.shown["a"] == {"GCD": 2.5, "LAR": 0.5, "recall": 10.0}
    assert all(np.isnan(v) for v in panel.shown["b"].values())  # that run has ended
    assert "2.5 0.5 10.0" in " ".join(Page(panel.picture.value.replace("<td>", " ")).text.split())
    assert not np.array_equal(before, pixels(Page(panel.picture.value).all("img")[0]["src"]))
    panel.controls["smoothing"].value = 1
    assert panel.shown["a"]["GCD"] == 3


def test_every_control_has_a_tooltip_and_a_label_that_a_screen_reader_finds(world, folder):
    bench, vl, encoder, _ = world
    for panel in (
        panels.compose_panel(*world),
        panels.search_panel(folder, vl, encoder, vl.encode_images(list(folder))),
        panels.token_panel(folder, vl, {"shipped": encoder}),
        panels.training_panel(HISTORY),
    ):
        named = {k: c for k, c in panel.controls.items() if k != "suggestions"}
        for name, control in named.items():
            assert control.tooltip, name
            # A slider of ipywidgets has no accessible label; it stands beside a labelled field of
            # the same value.
            assert control.description or name.removesuffix(" slider") in named, name
        assert all(
            button.tooltip and button.description
            for button in panel.controls.get("suggestions", HBox()).children[:1]
        )
        assert all(picture["alt"] for picture in Page(panel.picture.value).all("img"))


# ------------------------------------------------------------------------------ papermill, nbval,
# browser


def notebook(*sources: str):
    kernel = {
        "kernelspec": {"name": "python3", "display_name": "Python 3"},
        "language_info": {"name": "python"},
    }
    cells = [new_code_cell(source, id=f"cell-{i:02}") for i, source in enumerate(sources)]
    return new_notebook(cells=cells, metadata=kernel)


def environment(folder: Path) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "JUPYTER_CONFIG_DIR": str(folder / "config")}


@pytest.mark.slow
def test_a_panel_runs_in_papermill_is_stripped_and_passes_strict_nbval_without_a_marker(
    tmp_path, monkeypatch
):
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    source = "from isa_lite.course import panels\nfrom isa_lite.distill import History\nprint(2)"
    show = "panels.training_panel(History(gcd=[2.0, 1.0], recall=[(2, 50.0)]))"
    nbformat.write(notebook(source, show), str(tmp_path / "a.ipynb"))
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    papermill.execute_notebook(
        tmp_path / "a.ipynb", tmp_path / "b.ipynb", cwd=tmp_path, progress_bar=False
    )
    executed = nbformat.read(str(tmp_path / "b.ipynb"), 4)
    assert [list(o.data) for o in executed.cells[1].outputs] == [
        ["application/vnd.jupyter.widget-view+json"]
    ]
    stripped = execute.strip(executed)
    assert not stripped.cells[1].outputs
    nbformat.write(stripped, str(tmp_path / "b.ipynb"))
    done = nbval(tmp_path, "b.ipynb", timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def page(vl_folder, tmp_path_factory):
    """JupyterLab in headless Chromium, on a notebook that has shown three panels."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra: pip install 'isa_lite[browser]'"
    )
    folder = tmp_path_factory.mktemp("lab")
    setup = f"""
import torch
from isa_lite.course import panels
from isa_lite.distill import History
from isa_lite.models.vl_model import load_vl_model
from isa_lite.query_encoder import QueryEncoder
from isa_lite.retrieval import scene_queries
vl = load_vl_model({str(vl_folder)!r})
torch.manual_seed(0)
encoder = QueryEncoder.for_model(vl, num_tokens=3).eval()
bench = scene_queries.make_benchmark(queries=8, gallery=40, seed=1, size=vl.image_size)
"""
    panels = [
        "panels.compose_panel(bench, vl, encoder, vl.encode_images(bench.images))",
        "panels.token_panel(bench.images, vl, {'shipped': encoder})",
        f"panels.training_panel({HISTORY!r})",
    ]
    nbformat.write(notebook(setup, *panels), str(folder / "panels.ipynb"))
    for name, text in {
        # no pop-up
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
        # cells out of sight are there too
        "notebook-extension/tracker": '{"windowingMode": "none"}',
    }.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
    ]
    command += [
        "--IdentityProvider.token=panels",
        "--ServerApp.allow_root=True",
        "--ServerApp.port_retries=0",
    ]
    where = {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    with playwright.sync_playwright() as driver:
        try:
            browser = pages.browser(driver)
        except RuntimeError as error:
            pytest.skip(f"no Chromium to be had, so no test in a browser: {error}")
        with open(folder / "log.txt", "w") as log:
            lab = subprocess.Popen(
                command, cwd=folder, env=environment(folder) | where, stdout=log, stderr=log
            )
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(60_000)
            for attempt in range(120):  # until the server listens
                try:
                    page.goto(f"http://127.0.0.1:{port}/doc/tree/panels.ipynb?token=panels")
                    break
                except playwright.Error:
                    assert lab.poll() is None and attempt < 119, (folder / "log.txt").read_text()[
                        -3000:
                    ]
                    time.sleep(0.5)
            page.get_by_text("| Idle").wait_for()  # in the status bar: the kernel is there
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.locator('[data-command="runmenu:run-all"]').click()
            playwright.expect(page.locator(".isa-panel img").last).to_be_visible(timeout=120_000)
            playwright.expect(page.locator(".isa-panel")).to_have_count(3, timeout=120_000)
            page.locator(".isa-panel").nth(2).locator("img").wait_for(timeout=120_000)
            yield page
            browser.close()
        finally:
            lab.terminate()
            try:
                lab.wait(30)
            except subprocess.TimeoutExpired:
                lab.kill()


@pytest.mark.slow
def test_a_query_is_composed_by_keyboard_alone(page):
    from playwright.sync_api import expect

    expect.set_options(timeout=30_000)
    panel = page.locator(".isa-panel").nth(0)
    reference, modifier = panel.locator(".isa-reference img"), panel.get_by_label("Modifier")
    before, words = reference.get_attribute("src"), modifier.input_value()
    panel.get_by_label("Reference (0 to 7)").focus()
    page.keyboard.press("ArrowUp")
    expect(reference).not_to_have_attribute("src", before)
    expect(modifier).not_to_have_value(words)
    expect(panel.get_by_role("status")).to_contain_text("the target is at place")
    page.keyboard.press("Tab")
    expect(panel.get_by_role("button", name="Another one")).to_be_focused()
    before = reference.get_attribute("src")
    page.keyboard.press("Enter")
    expect(reference).not_to_have_attribute("src", before)
    page.keyboard.press("Tab")
    expect(modifier).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the second suggestion
    expect(panel.get_by_role("status")).to_contain_text("nobody has said which image is right")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    expect(modifier).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("<i>now it snows</i>")
    page.keyboard.press("Enter")
    expect(panel.get_by_role("status")).to_contain_text("“<i>now it snows</i>”")
    expect(panel.locator(".isa-target")).to_have_count(0)
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(TOO_LONG)
    page.keyboard.press("Enter")
    expect(panel.get_by_role("alert")).to_contain_text("too long for the text tower")
    expect(panel.locator("img")).to_have_count(0)
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("in stripes")
    page.keyboard.press("Enter")
    expect(panel.get_by_role("alert")).to_have_count(0)
    expect(panel.locator("img")).to_have_count(21)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, label, keys",
    [(1, "Token", ("ArrowUp", "ArrowRight")), (2, "Step", ("ArrowDown", "ArrowLeft"))],
)
def test_tokens_and_steps_are_chosen_by_keyboard_in_the_field_and_on_the_slider(
    page, number, label, keys
):
    from playwright.sync_api import expect

    panel = page.locator(".isa-panel").nth(number)
    field, picture = panel.get_by_label(label, exact=True), panel.locator("img")
    first, value = picture.get_attribute("src"), int(field.input_value())
    field.focus()
    page.keyboard.press(keys[0])
    expect(picture).not_to_have_attribute("src", first)
    second = picture.get_attribute("src")
    page.keyboard.press("Tab")
    expect(panel.get_by_role("slider").first).to_be_focused()
    page.keyboard.press(keys[1])
    expect(picture).not_to_have_attribute("src", second)
    expect(field).to_have_value(str(value + (2 if keys[0] == "ArrowUp" else -2)))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_of_a_panel_is_cut_off(page, width):
    page.set_viewport_size({"width": width, "height": 1000})
    page.wait_for_timeout(500)
    for panel in page.locator(".isa-panel").all():
        right = panel.evaluate("p => p.getBoundingClientRect().right")
        for part in panel.locator("input:visible, select, button, img, td, figcaption, p").all():
            assert part.evaluate("e => e.getBoundingClientRect().right") <= right + 1
        for label in panel.locator("label, button").all():
            assert label.evaluate("e => e.scrollWidth - e.clientWidth") <= 0, label.inner_text()
