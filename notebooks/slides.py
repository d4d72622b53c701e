"""Slides out of the notebooks' pages: title, questions, formulas, figures, tables, claims and quiz;
one file, no network. Made by pages.py.
"""

from html import escape
from itertools import zip_longest

from bs4 import BeautifulSoup, Tag

#: What a slide can hold: claims of a cell go on over several slides, a longer table is left out.
MOST_CLAIMS, MOST_ROWS = 7, 25
#: The numbers of slides that are larger than the window, found in a browser; with the argument true
#: also those that are only too high.
TOO_LARGE = """tall => [...document.querySelectorAll("section.slide")].map((s, i) => {
    const before = document.querySelector("section.slide.on");
    before.classList.remove("on"); s.classList.add("on");
    const large = s.scrollWidth > s.clientWidth || (tall && s.scrollHeight > s.clientHeight);
    s.classList.remove("on"); before.classList.add("on");
    return large ? i + 1 : 0;
}).filter(n => n)"""
_STYLE = """
* { box-sizing: border-box; } body { margin: 0; color: #1b1b1b; background: #fff; font: min(2.1vw, 3.6vh)/1.45 system-ui, sans-serif; overflow-wrap: break-word; }
section.slide { display: none; width: 100vw; height: 100vh; padding: 4vh 5vw 7vh; overflow: auto; position: relative; } section.slide.on { display: flex; flex-direction: column; justify-content: center; }
h1, h2 { line-height: 1.2; margin: 0 0 .6em; } h1 { font-size: 2.1em; } h2 { font-size: 1.35em; color: #00508f; }
p, ul, ol { margin: 0 0 .7em; } a { color: #00508f; } code { font-family: ui-monospace, monospace; font-size: .88em; }
figure { margin: 0; min-height: 0; display: flex; flex-direction: column; } figure img { flex: 0 1 auto; min-height: 0; max-width: 100%; object-fit: contain; width: auto; height: auto; }
figcaption { margin-top: .6em; font-size: .8em; color: #595959; } img.formula { max-width: 100%; } span.scroll { font-size: 1.4em; }
table { border-collapse: collapse; margin: 0 auto; font-size: min(1em, 60vh / var(--rows, 8) / 1.75, 88vw / var(--letters, 60) / .62); line-height: 1.3; white-space: nowrap; } th, td { padding: .2em .7em; border-bottom: 1px solid #d0d0d0; text-align: right; font-variant-numeric: tabular-nums; }
footer { position: fixed; right: 1.5vw; bottom: 1.5vh; font-size: .7em; color: #595959; } footer a { color: inherit; }
.source { position: absolute; left: 5vw; bottom: 1.5vh; font-size: .7em; color: #595959; } .question { font-size: 1.25em; } details { margin-top: 1em; } summary { cursor: pointer; }
@media (max-width: 800px) { body { font-size: 1rem; } section.slide.on { justify-content: flex-start; } table, span.scroll { font-size: .8em; } .scroll { overflow-x: auto; } figure img { flex-shrink: 0; } }
@page { size: 1280px 720px; margin: 0; }
@media print { section.slide { display: flex; flex-direction: column; justify-content: center; break-after: page; width: 1280px; height: 720px; overflow: hidden; } footer { display: none; } }
"""
_SCRIPT = """
const slides = [...document.querySelectorAll("section.slide")];
let at = 0;
function show(n) {
    slides[at].classList.remove("on");
    at = Math.max(0, Math.min(slides.length - 1, n));
    slides[at].classList.add("on");
    const number = document.querySelector("footer a");
    number.textContent = `${at + 1} / ${slides.length}`;
    number.href = `#${at + 1}`;
    history.replaceState(null, "", `#${at + 1}`);
}
document.addEventListener("keydown", event => {
    const next = { ArrowRight: at + 1, PageDown: at + 1, ArrowLeft: at - 1, PageUp: at - 1, Home: 0, End: slides.length - 1 }[event.key];
    if (next !== undefined && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); show(next); }
});
let touched = null;
document.addEventListener("touchstart", event => { touched = event.touches[0].clientX; });
document.addEventListener("touchend", event => {
    const moved = event.changedTouches[0].clientX - touched;
    if (Math.abs(moved) > 60) show(at - Math.sign(moved));
});
window.addEventListener("hashchange", () => show(parseInt(location.hash.slice(1)) - 1 || 0));
show(parseInt(location.hash.slice(1)) - 1 || 0);
"""


def _slide(heading: str, *parts: str) -> str:
    return (f"<h2>{heading}</h2>" if heading else "") + "".join(parts)


def _of_text(cell: Tag, heading: str) -> tuple[list[str], str]:
    """Slides of a text cell: questions to predict, and formulas with the paragraph before them.
    Also the last heading.
    """
    found = []
    for element in cell.find_all(["h2", "p"]):
        if element.name == "h2":
            heading = element.decode_contents()
        elif question := element.find("strong", string="Predict, then run:"):
            words = "".join(map(str, [question, *question.next_siblings]))
            found.append(_slide(heading, f'<p class="question">{words}</p>'))
        elif element.select_one("span.scroll img.formula"):
            before = element.find_previous_sibling("p")
            found.append(_slide(heading, str(before) if before else "", element.decode_contents()))
    return found, heading


def _letters(row: Tag) -> list[float]:
    """The room that each column of a table's row asks for, in letters; an entry over several
    columns asks each for its share.
    """
    spans = [
        (len(entry.get_text()) + 3, int(entry.get("colspan", 1))) for entry in row.select("th, td")
    ]
    return [length / span for length, span in spans for _ in range(span)]


def _of_outputs(cell: Tag, heading: str) -> list[str]:
    """Slides of a code cell: a figure each with its caption, a table each, and the claims that were
    checked.
    """
    found, claims, title = [], [], ""
    for area in cell.select("div.output_area"):
        if image := area.select_one("img"):
            after = area.find_next_sibling("div")
            caption = after.get_text().strip() if after and after.select_one("p > em") else ""
            found.append(
                _slide(
                    heading, f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
                )
            )
            title = ""
        elif table := area.select_one("table"):
            rows = [_letters(row) for row in table.select("tr")]
            if len(rows) > MOST_ROWS:
                continue  # nobody could read it; it is in the notebook
            letters = sum(max(column) for column in zip_longest(*rows, fillvalue=0))
            drawn = f'<div class="scroll" style="--rows: {len(rows)}; --letters: {letters}">{table}</div>'
            found.append(_slide(heading, f"<p>{escape(title)}</p>" if title else "", drawn))
            title = ""
        elif printed := area.select_one("pre"):
            lines = printed.get_text().splitlines()
            checked = [line for line in lines if line.startswith(("holds: ", "DOES NOT HOLD"))]
            claims += checked
            # What is printed right before a table says what it is about, unless it is a claim.
            title = lines[-1].strip() if lines and lines[-1] not in checked else ""
    for start in range(0, len(claims), MOST_CLAIMS):
        part = [f"<li>{escape(claim)}</li>" for claim in claims[start : start + MOST_CLAIMS]]
        found.append(_slide(heading, "<p>Checked by this cell:</p>", "<ul>", *part, "</ul>"))
    return found


def slides_of(page: BeautifulSoup, name: str) -> list[str]:
    """The slides of one notebook, from its page: the HTML inside each of them. Raises ValueError
    for one without a title.
    """
    cells = page.select("div.cell")
    first = cells[0].find_all(["h1", "p"]) if cells else []
    if len(first) < 2 or first[0].name != "h1":
        raise ValueError("no slides: the first cell must be a heading, '# Title', and a paragraph")
    learn = [p for p in first if p.get_text().startswith("You will learn")]
    found = [f"<h1>{first[0].decode_contents()}</h1>{first[1]}{''.join(map(str, learn))}"]
    heading = ""
    for cell in cells[1:]:
        if "text_cell" not in cell["class"]:
            found += _of_outputs(cell, heading)
            continue
        slides, heading = _of_text(cell, heading)
        found += slides
        if quiz := cell.find("h2", id="quiz"):
            found.append(_slide("Quiz", str(quiz.find_next("ol")), str(quiz.find_next("details"))))
    return [f'{slide}<div class="source"><a href="{name}.html">{name}</a></div>' for slide in found]


def deck(found: list[str], colors: str) -> str:
    """One HTML file of all slides."""
    sections = "\n".join(
        f'<section id="{i + 1}" class="slide{"" if i else " on"}">{slide}</section>'
        for i, slide in enumerate(found)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>isa_lite: slides</title><style>{_STYLE}{colors}</style></head>\n<body>\n{sections}\n"
        f'<footer><a href="#1">1 / {len(found)}</a></footer>\n<script>{_SCRIPT}</script></body></html>\n'
    )
