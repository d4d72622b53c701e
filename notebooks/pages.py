"""The notebooks as web pages, and as slides, without a network: `python notebooks/pages.py --out
runs/pages [--slides]`.

A page a notebook, with its stored outputs, and the teaching notes (README.md) as index.html.
Nothing is run, and nothing in a page is loaded from
elsewhere: figures are in the page, and formulas are drawn by matplotlib. The command fails, after
it has written what it can, when a picture has no alternative text, a link leads nowhere, something
would be loaded from the network, or the content is wider than a window of 1280 or 390 pixels. The
last is looked at in Chromium through playwright, where both are installed.
"""

import argparse
import base64
import io
import os
import re
import shutil
import sys
from html import escape
from pathlib import Path

import matplotlib
import nbformat
import slides
from bs4 import BeautifulSoup, NavigableString, Tag
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from pygments.formatters import HtmlFormatter

from isa_lite.support.checkpoint import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WIDTHS = (1280, 390)  # of the windows in which nothing may stick out, in pixels
CODE_COLORS = HtmlFormatter(style="default").get_style_defs(".highlight")
_STYLE = """
:root { --ink: #1b1b1b; --soft: #595959; --line: #d0d0d0; --link: #00508f; --code: #f6f6f4; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 1rem 4rem; max-width: 58rem; color: var(--ink); background: #fff; font: 1.0625rem/1.6 system-ui, sans-serif; overflow-wrap: break-word; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: .75rem 0; border-bottom: 1px solid var(--line); }
h1, h2, h3 { line-height: 1.25; margin: 2.2em 0 .6em; } h1 { margin-top: 1em; font-size: 1.9rem; } h2 { font-size: 1.4rem; }
a { color: var(--link); } a:focus-visible, .scroll:focus-visible, pre:focus-visible, summary:focus-visible { outline: 3px solid #E69F00; }
.code { margin: 1rem 0; border-left: 4px solid var(--line); background: var(--code); }
pre { margin: 0; padding: .6rem .8rem; overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace; } code { font: .88em ui-monospace, monospace; }
.code pre, .highlight pre { white-space: pre-wrap; } .highlight .err { border: 0; color: inherit; } .output { margin: .6rem 0 1.4rem; } .output img { margin-top: .5rem; } .output pre { color: var(--soft); white-space: pre-wrap; padding-left: 1rem; border-left: 4px solid #0072B2; }
img { max-width: 100%; height: auto; } img.formula { max-width: none; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; } th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.dataframe th, .dataframe td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } thead th { border-bottom: 2px solid var(--soft); }
details { border: 1px solid var(--line); padding: .5rem 1rem; } summary { cursor: pointer; }
@media print { nav { display: none; } .code, .output, img { break-inside: avoid; } pre { white-space: pre-wrap; } }
"""


def formula(latex: str, display: bool) -> Tag:
    """A picture of a formula, as large as the text around it, with the LaTeX as its alternative
    text. ValueError: not drawable.
    """
    drawn, size = io.BytesIO(), 12
    scale, shown = (1.3, latex.replace(r"\frac", r"\dfrac")) if display else (1.1, latex)
    with matplotlib.rc_context({"mathtext.fontset": "stix"}):
        depth = math_to_image(f"${shown}$", drawn, FontProperties(size=size), dpi=72, format="svg")
    image = Tag(name="img", attrs={"class": "formula", "alt": latex})
    width = float(re.search(rb'width="([\d.]+)pt"', drawn.getvalue())[1])
    image["src"] = "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode()
    image["style"] = (
        f"width: {scale * width / size:.2f}em; vertical-align: {-scale * depth / size:.2f}em"
    )
    if not display:
        return image
    image["style"] += "; display: block; margin: 1em auto"
    block = Tag(name="span", attrs={"class": "scroll", "style": "display: block", "tabindex": "0"})
    block.append(image)
    return block


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def title_of(notebook: NotebookNode) -> str:
    """The first line of a notebook, without the mark of a heading; "" where there is none."""
    lines = notebook.cells[0].source.splitlines() if notebook.cells else []
    return lines[0].removeprefix("# ") if lines else ""


def link_to(link: str, out: Path, pages: set[str], repository: str) -> str:
    """Where a link of a notebook leads from a page in `out`: to another page, to the repository's
    address, or to the file beside us.
    """
    if re.match(r"\w+:|#", link):
        return link
    path, _, anchor = link.partition("#")
    target = (HERE / path).resolve()
    anchor = f"#{anchor}" if anchor else ""
    if target == HERE / "README.md":
        return f"index.html{anchor}"
    if target.parent == HERE and target.stem in pages:
        return f"{target.stem}.html{anchor}"
    if repository and target.exists():
        return f"{repository.rstrip('/')}/{target.relative_to(ROOT).as_posix()}{anchor}"
    return Path(os.path.relpath(target, out.resolve())).as_posix() + anchor


def sanitised(soup: BeautifulSoup) -> list[str]:
    """Takes out of a page whatever could run or load in a browser, and returns it in words: what a
    notebook shows is not trusted.
    """
    found = []
    for tag in soup.select("script, iframe, object, embed, form, base, meta, link"):
        found.append(f"<{tag.name}>")
        tag.decompose()
    for tag in soup.find_all(True):
        for name in list(tag.attrs):
            address = re.sub(r"[\s\0]", "", str(tag[name])).lower()
            runs = name.lower() in ("href", "src", "xlink:href", "action", "srcdoc") and re.match(
                r"javascript:|vbscript:|data:text", address
            )
            if name.lower().startswith("on") or runs:
                found.append(f"{name} of <{tag.name}>")
                del tag[name]
    return found


def body_of(
    notebook: NotebookNode, out: Path, pages: set[str], repository: str = ""
) -> tuple[BeautifulSoup, list[str]]:
    """A notebook's page without its frame, and what is wrong with it."""
    html, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    soup, wrong = BeautifulSoup(html, "html.parser"), []
    for tag in soup.select("a.anchor-link, div.prompt, style"):
        tag.decompose()
    wrong += [f"left out, for it could run: {found}" for found in sanitised(soup)]
    for tag in soup.select("h1, h2, h3, h4"):
        tag["id"] = slug(tag.get_text())
    for tag in soup.select("a[href]"):
        tag["href"] = link_to(tag["href"], out, pages, repository)
    for text in [
        t for t in soup.find_all(string=re.compile(r"\$")) if not t.find_parent(["code", "pre"])
    ]:
        parts = re.split(r"(\$\$.+?\$\$|\$[^$]+\$)", str(text), flags=re.S)
        try:
            new = [
                formula(p.strip("$").replace("\n", " "), p[:2] == "$$")
                if i % 2
                else NavigableString(p)
                for i, p in enumerate(parts)
            ]
        except ValueError as error:
            wrong.append(
                f"a formula that matplotlib cannot draw: {parts[1]}: {str(error).strip().splitlines()[-1]}"
            )
            continue
        text.replace_with(*new)
    for tag in soup.select("table"):
        tag.attrs.pop("border", None)
        tag.wrap(Tag(name="div", attrs={"class": "scroll", "tabindex": "0"}))
    for tag in soup.select("div.input"):
        tag["class"] = "code"
    for tag in soup.select(".highlight pre"):
        tag["tabindex"] = "0"  # so that the arrow keys can scroll it
    for tag in soup.select("img"):  # nbconvert writes a sentence where there is none
        if not tag.get("alt", "").strip() or tag["alt"].startswith(
            "No description has been provided"
        ):
            wrong.append(f"a picture without alternative text: {tag['src'][:60]}")
    loaded = [
        t.get("src") or t.get("href")
        for t in soup.select("script[src], img[src], iframe[src], link[href]")
    ]
    wrong += [
        f"loaded from the network: {source}"
        for source in loaded
        if re.match(r"(https?:)?//", source)
    ]
    return soup, wrong


def framed(body: str, title: str, links: list[tuple[str, str]]) -> str:
    """A whole page; links: title and address of each entry of the bar at its top."""
    bar = "".join(f'<a href="{address}">{escape(name)}</a>' for name, address in links)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CODE_COLORS}{_STYLE}</style></head>\n<body><nav>{bar}</nav><main>\n{body}\n</main></body></html>\n"
    )


def broken_links(page: Path) -> list[str]:
    """Links of a written page that lead to no file, or to no heading of it."""
    wrong = []
    for tag in BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select("a[href]"):
        if re.match(r"\w+:", tag["href"]):
            continue
        path, _, anchor = tag["href"].partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            wrong.append(f"a link to nowhere: {tag['href']}")
        elif (
            anchor
            and target.suffix == ".html"
            and f'id="{anchor}"' not in target.read_text(encoding="utf-8")
        ):
            wrong.append(f"a link to a heading that is not there: {tag['href']}")
    return wrong


def browser(playwright):
    """Chromium without a window: the system's where one starts, else playwright's own. Raises
    RuntimeError, with the last reason, for none.
    """
    # root cannot have it
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    for path in (
        *filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
        None,
    ):
        try:
            return playwright.chromium.launch(executable_path=path, args=arguments)
        except Exception as error:  # playwright's own error, a bare Exception
            reason = error
    raise RuntimeError(str(reason).strip().splitlines()[0]) from reason


def overflowing(paths: list[Path]) -> list[str]:
    """Pages that are wider than their window, and slides that are larger than theirs. Raises
    ImportError or RuntimeError without a browser.
    """
    from playwright.sync_api import sync_playwright

    wrong = []
    with sync_playwright() as playwright:
        chromium = browser(playwright)
        for width in WIDTHS:
            tab = chromium.new_page(viewport={"width": width, "height": 720})
            for path in paths:
                tab.goto(path.resolve().as_uri())
                if tab.evaluate(
                    "document.documentElement.scrollWidth > document.documentElement.clientWidth"
                ):
                    wrong.append(f"{path.name}: wider than a window of {width} pixels")
                # On a narrow screen a slide may be scrolled down; in a lecture it may not.
                wrong += [
                    f"{path.name}: slide {n} is larger than {width} x 720 pixels"
                    for n in tab.evaluate(slides.TOO_LARGE, width > 800)
                ]
            tab.close()
        chromium.close()
    return wrong


def make(
    notebooks: list[Path], out: Path, repository: str = "", with_slides: bool = False
) -> list[str]:
    """Write index.html, a page a notebook and, if asked for, slides.html into `out`. Returns what
    is wrong with them.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = {path.stem for path in notebooks}
    readme = new_notebook(
        cells=[new_markdown_cell((HERE / "README.md").read_text(encoding="utf-8"))]
    )
    sources = {"index": readme} | {path.stem: nbformat.read(path, 4) for path in notebooks}
    titles = {name: title_of(source) or name for name, source in sources.items()}
    order, wrong, deck = list(sources), [], []
    for i, (name, source) in enumerate(sources.items()):
        body, faults = body_of(source, out, names, repository)
        around = [order[j] for j in (0, i - 1, i + 1) if 0 <= j < len(order) and j != i]
        links = [(titles[other].split(":")[0], f"{other}.html") for other in dict.fromkeys(around)]
        if with_slides and name == "index":
            links.append(("Slides", "slides.html"))
        write_text(out / f"{name}.html", framed(str(body), titles[name], links))
        wrong += [f"{name}.html: {fault}" for fault in faults]
        if name != "index":
            try:
                deck += slides.slides_of(body, name)
            except ValueError as error:
                wrong.append(f"{name}.html: {error}")
    if with_slides:
        write_text(out / "slides.html", slides.deck(deck, CODE_COLORS))
        order.append("slides")
    return wrong + [
        f"{name}.html: {fault}" for name in order for fault in broken_links(out / f"{name}.html")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pages"), help="the folder for the pages"
    )
    parser.add_argument("--slides", action="store_true", help="also make slides.html")
    parser.add_argument(
        "--repository",
        default="",
        help="where its files are on the web, https://.../blob/main; without it links lead to the files here",
    )
    args = parser.parse_args()
    wrong = make(sorted(HERE.glob("*.ipynb")), args.out, args.repository, args.slides)
    written = sorted(args.out.glob("*.html"))
    try:
        wrong += overflowing(written)
    except (ImportError, RuntimeError) as error:
        print(f"not looked at in a browser, so nobody knows whether something sticks out: {error}")
    print(f"{len(written)} pages in {args.out}; begin with {args.out / 'index.html'}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
