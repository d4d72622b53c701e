"""Runs notebooks with their defaults and stores them as they are committed: `python
notebooks/execute.py 00 02`.

A committed notebook holds the outputs of one run from top to bottom, without progress bars and
without papermill's notes of its own. Nothing is stored of a run that failed or that wrote to
stderr. The notebooks are generated: edit their solutions, and run student.py before this; its
docstring has the whole order. A notebook that has no solution yet is run as it stands.
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
import papermill
import student
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent


def strip(notebook: NotebookNode) -> NotebookNode:
    """Take out what differs from run to run and says nothing. Raises ValueError for an error or a
    warning in an output.
    """
    notebook.metadata = {
        key: notebook.metadata[key]
        for key in ("kernelspec", "language_info")
        if key in notebook.metadata
    }
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                raise ValueError(
                    f"the cell beginning {cell.source[:60]!r} has an error or a warning: {output}"
                )
        cell.outputs = [
            o
            for o in cell.outputs
            if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
        ]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", help="how their names begin, for example 02")
    parser.add_argument(
        "--cwd",
        type=Path,
        default=Path("runs/notebooks"),
        help="their working directory; results stay there",
    )
    args = parser.parse_args()
    args.cwd.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(
            f"this machine is busy (a load of {load:.1f}): the times that are stored will be too large",
            file=sys.stderr,
        )
    for name in args.notebooks:
        found = sorted(HERE.glob(f"{name}*.ipynb"))
        if len(found) != 1:
            parser.error(f"{name!r} names {len(found)} notebooks in {HERE.name}/, not one")
        if (student.SOLUTIONS / found[0].name).is_file() and student.unlike(found[0].name):
            parser.error(
                f"{found[0].name} is not what its solution gives; run python notebooks/student.py first"
            )
        executed = args.cwd / found[0].name
        papermill.execute_notebook(found[0], executed, cwd=args.cwd)
        student.write(found[0], strip(nbformat.read(executed, 4)))


if __name__ == "__main__":
    main()
