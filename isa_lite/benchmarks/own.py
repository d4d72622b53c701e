"""A benchmark of your own: a function that reads it, and the same metrics for whatever it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from isa_lite.benchmarks.common import Ranking, Task, checked_task

KS = (1, 5, 10, 50)


class OwnBenchmark:
    """What `run` takes for a benchmark, from `read(root, split)` -> a `Task` or a list of them."""

    def __init__(self, read: Callable[..., Task | list[Task]]):
        self.read = read

    def load(self, root: str | Path, split: str, **options: object) -> list[Task]:
        """Raises ValueError where the function returns something else, or a task that cannot be
        right (`common.checked_task`)."""
        found = self.read(Path(root), split, **options)
        tasks = found if isinstance(found, list) else [found]
        if not tasks or not all(isinstance(task, Task) for task in tasks):
            raise ValueError(f"the benchmark must return a Task or a list of them, not {found!r}")
        return [checked_task(task) for task in tasks]

    def score(self, tasks: Sequence[Task], rankings: Sequence[Ranking]) -> dict[str, float]:
        """Recall@1, 5, 10, 50 in percent: the share of queries with a right answer that early. With
        several tasks one value for each, and their mean.
        """
        found = {}
        for task, ranking in zip(tasks, rankings, strict=True):
            for k in KS:
                rows = zip(task.queries, ranking.top, strict=True)
                hits = [bool(set(row[:k]) & set(query.targets)) for query, row in rows]
                found[f"{task.name} R@{k}"] = 100 * float(np.mean(hits))
        if len(tasks) == 1:
            return {name.removeprefix(f"{tasks[0].name} "): v for name, v in found.items()}
        means = {k: np.mean([found[f"{task.name} R@{k}"] for task in tasks]) for k in KS}
        return found | {f"mean R@{k}": float(value) for k, value in means.items()}

    def write_submissions(self, *_: object) -> list[Path]:
        """No server judges it, so every query needs its answers. Raises ValueError."""
        raise ValueError("a benchmark of your own needs the right answers of every query")
