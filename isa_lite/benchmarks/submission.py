"""Submission files for the test servers: written only if our own check finds no fault."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path

from isa_lite.benchmarks.common import Query, Task, read_json
from isa_lite.support.checkpoint import write_text


def write_submission(
    path: Path, content: object, check: Callable[[Path, Task], list[str]], task: Task
) -> Path:
    """Content as JSON to `path` if `check` finds no fault; else ValueError, and no file is left."""
    if task.left_out:
        told = f"{path.name} would be rejected"
        raise ValueError(f"{told}: {task.left_out} queries lack their images and were left out")
    with tempfile.TemporaryDirectory() as folder:
        unchecked = Path(folder) / path.name
        write_text(unchecked, json.dumps(content))
        problems = check(unchecked, task)
    if problems:
        raise ValueError(f"{path.name} would be rejected: {'; '.join(problems)}")
    write_text(path, json.dumps(content))
    return path


def read_submission(path: Path) -> object:
    """A submission file's JSON. Raises FileNotFoundError, or ValueError where it is not JSON."""
    return read_json(path.parent, path.name, "give a submission file")


def check_lists(
    lists: Mapping[str, object], k: int, task: Task, candidates: Callable[[Query], Set]
) -> list[str]:
    """Faults of the lists of k ids by query id that answer `task`: a sentence each, or none."""
    known = {q.id for q in task.queries}
    problems, extra = [], [key for key in lists if key not in known]
    if lacking := [q.id for q in task.queries if q.id not in lists]:
        told = f"{len(lacking)} of {len(known)} queries have no list"
        problems.append(f"{told}, the first: {lacking[0]}")
    if len(known) < len(task.queries):
        problems.append(f"the annotations' {len(task.queries)} queries have only {len(known)} ids")
    if extra:
        problems.append(
            f"{len(extra)} keys are no query of {task.name} {task.split}, the first: {extra[0]}"
        )
    faults: dict[str, list[str]] = {}
    for query in task.queries:
        row, allowed = lists.get(query.id, ()), candidates(query)
        if row == ():
            continue
        if not isinstance(row, list) or not all(type(i) in (str, int) for i in row):
            faults.setdefault("are no list of image ids", []).append(query.id)
            continue
        strange = set(row) - allowed
        as_text = {str(i) for i in allowed} if strange else set()
        known_as_text = [str(i) in as_text for i in strange]
        most = len(allowed) - (task.remove_reference and query.reference in allowed)
        other_type = "write image ids as another type (a text for a number, or the other way)"
        wrong = {
            f"do not hold {k} ids": len(row) != min(k, most),
            "name an image twice": len(set(row)) < len(row),
            other_type: any(known_as_text),
            "name something that is no image of the gallery or subset": not all(known_as_text),
            "name their own reference": task.remove_reference and query.reference in row,
        }
        for fault in (fault for fault, found in wrong.items() if found):
            faults.setdefault(fault, []).append(query.id)
    told = [f"{len(where)} lists {fault}, the first: {where[0]}" for fault, where in faults.items()]
    return problems + told
