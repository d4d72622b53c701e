"""Student notebooks from the solutions: `python notebooks/student.py` writes them, `--check` only
compares.

Edit `notebooks/solutions/NN_name.ipynb`, and nothing else. Then, in this order:

    ruff format notebooks
    python notebooks/student.py           # writes notebooks/NN_name.ipynb and says which have to be
    run again
    python notebooks/execute.py NN        # runs those and stores their outputs

In a solution, an exercise holds both its answer and the hole that students get in its place:

    def double(x):
        \"\"\"Twice x.\"\"\"
        # solution
        return 2 * x
        # hole
        # return float("nan")  # your code

A student notebook gets the commented lines behind `# hole`, without their `# `, in the place of
everything from `# solution` on. Links that lead out of solutions/ lose one `../`. Ids, tags and
metadata are the solution's. Outputs stay with every cell whose source did not change. A solution
has no outputs: the figures are stored once, in the student's copy, and the tests run the answers.

`--adopt NN` goes the other way, for a notebook that was written or changed as a student's: its
cells are taken into the solution, answers that are there already are kept, and new holes ("your
code") wait for theirs.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from isa_lite.support.checkpoint import write_text

HERE = Path(__file__).resolve().parent
SOLUTIONS = HERE / "solutions"
UNSOLVED = 'raise NotImplementedError("an answer")'
_EXERCISE = re.compile(
    r"^(?P<indent> +)# solution\n(?P<answer>.*?)^(?P=indent)# hole\n(?P<hole>(?:(?P=indent)# .*(?:\n|\Z))+)",
    re.M | re.S,
)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s]+")


def with_hole(source: str) -> str:
    """A code cell of a solution as students get it. Raises ValueError for markers that do not
    belong together.
    """
    done = _EXERCISE.sub(
        lambda m: re.sub(f"^{m['indent']}# ", m["indent"], m["hole"], flags=re.M), source
    )
    if re.search(r"^\s*# (solution|hole)$", done, re.M):
        raise ValueError(
            f"'# solution' and '# hole', with the hole commented out behind it, belong together:\n{source}"
        )
    return done


def with_answer(source: str) -> str:
    """A student's code cell with `# solution` markers around each function that says "your code";
    the answer is to be written.
    """
    if "your code" not in source:
        return source  # perhaps not even Python: a line of a shell, for instance
    lines = source.splitlines()
    for node in reversed([n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if not body or "your code" not in "\n".join(lines[node.lineno : node.end_lineno]):
            continue
        indent, start = " " * body[0].col_offset, body[0].lineno - 1
        hole = [f"{indent}# {line.removeprefix(indent)}" for line in lines[start : node.end_lineno]]
        lines[start : node.end_lineno] = [
            f"{indent}# solution",
            indent + UNSOLVED,
            f"{indent}# hole",
            *hole,
        ]
    return "\n".join(lines)


def up(link: str) -> str:
    """A student's relative link as it reads one folder deeper; other notebooks have their solution
    beside this one.
    """
    return link if re.match(r"\w+\.ipynb", link) else f"../{link}"


def student(solution: NotebookNode, committed: NotebookNode | None = None) -> NotebookNode:
    """The student's version, with the outputs of `committed` where the source is still the same."""
    made = nbformat.from_dict(solution)
    kept = {
        (cell.id, cell.source): cell
        for cell in (committed.cells if committed else [])
        if cell.cell_type == "code"
    }
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub(lambda m: m[0].removeprefix("../"), cell.source)
        elif cell.cell_type == "code":
            cell.source = with_hole(cell.source)
            old = kept.get((cell.id, cell.source), {})
            cell.outputs, cell.execution_count = old.get("outputs", []), old.get("execution_count")
    return made


def adopt(written: NotebookNode, solution: NotebookNode | None = None) -> NotebookNode:
    """The solution of a notebook that was written as a student's; answers come from `solution`
    where their hole is the same.
    """
    made = nbformat.from_dict(written)
    answers = {
        with_hole(cell.source): cell.source
        for cell in (solution.cells if solution else [])
        if cell.cell_type == "code"
    }
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub(lambda m: up(m[0]), cell.source)
        elif cell.cell_type == "code":
            cell.source = answers.get(cell.source) or with_answer(cell.source)
            cell.outputs, cell.execution_count = [], None
    return made


def read(path: Path) -> NotebookNode | None:
    return nbformat.read(path, 4) if path.is_file() else None


def write(path: Path, notebook: NotebookNode) -> None:
    write_text(path, nbformat.writes(notebook).rstrip("\n") + "\n")


def unlike(name: str) -> bool:
    """Whether a student notebook is something else than what its solution gives."""
    committed = read(HERE / name)
    return student(read(SOLUTIONS / name), committed) != committed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail where a student notebook is out of date",
    )
    parser.add_argument(
        "--adopt",
        metavar="NN",
        help="take a student notebook, by the beginning of its name, into the solutions",
    )
    args = parser.parse_args()
    if args.adopt:
        found = sorted(HERE.glob(f"{args.adopt}*.ipynb"))
        if len(found) != 1:
            parser.error(f"{args.adopt!r} names {len(found)} notebooks in {HERE.name}/, not one")
        name = found[0].name
        SOLUTIONS.mkdir(exist_ok=True)
        write(SOLUTIONS / name, adopt(read(found[0]), read(SOLUTIONS / name)))
        missing = "\n".join(cell.source for cell in read(SOLUTIONS / name).cells).count(UNSOLVED)
        print(f"solutions/{name}: {missing} answers to write, in the place of {UNSOLVED}")
        return
    names = [path.name for path in sorted(SOLUTIONS.glob("*.ipynb"))]
    old = [name for name in names if unlike(name)]
    if args.check and old:
        sys.exit(
            f"not what their solutions give: {', '.join(old)}; run python notebooks/student.py"
        )
    for name in old:
        made = student(read(SOLUTIONS / name), read(HERE / name))
        write(HERE / name, made)
        stale = sum(
            cell.cell_type == "code" and cell.execution_count is None for cell in made.cells
        )
        print(
            f"{name}: written"
            + (f"; {stale} cells to run: python notebooks/execute.py {name[:2]}" if stale else "")
        )
    print(f"{len(names)} student notebooks are what their solutions give")


if __name__ == "__main__":
    main()
