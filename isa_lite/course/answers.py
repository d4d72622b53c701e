"""What the self-checks of the notebooks ask of an answer before they judge it. Ours."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch


class NotAnAnswer(ValueError):
    """Says what an answer is, or is not, where another kind of thing was asked for."""


def one_number(answer: object, asked: str = "") -> float:
    """An exercise's answer as a float: a number, or a tensor or array that holds one.

    asked: what that number is. Raises NotAnAnswer for everything else, and for nan, which stands in
    holes not filled yet.
    """
    wanted = "one number is asked for, " + (asked and f"{asked}, ")
    if answer is None:
        raise NotAnAnswer("your function returns nothing; is its `return` missing?")
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().cpu().double().numpy()
    if not isinstance(answer, (int, float, np.number, np.ndarray)):
        raise NotAnAnswer(f"{wanted}not a {type(answer).__name__}")
    numbers = np.asarray(answer)
    if numbers.size != 1:
        raise NotAnAnswer(f"{wanted}not {numbers.size} numbers")
    try:
        number = float(numbers.item())
    except (TypeError, ValueError):  # an array of something else
        raise NotAnAnswer(f"{wanted}not an array of {numbers.dtype}") from None
    if np.isnan(number):
        raise NotAnAnswer("nothing computed yet, or what came out is nan, which is no number")
    return number


def same_as(name: str, right: Callable[..., float], mine: Callable, cases: Iterable[tuple]) -> None:
    """Compares an exercise's function with the package's own `name` on `cases` of arguments.

    The last word of a check, behind the hints for answers that are wrong in a known way. Raises
    NotAnAnswer for the first case where the two differ (by more than half precision would), or
    where the arguments were changed.
    """
    for case in cases:
        given = copy.deepcopy(case)
        answer, expected = one_number(mine(*given)), float(right(*case))
        shown = ", ".join(str(part.tolist() if hasattr(part, "tolist") else part) for part in case)
        if not np.isclose(answer, expected, rtol=1e-3, atol=1e-4):
            raise NotAnAnswer(
                f"good so far, but for {shown} {name} gives {expected:g}, not {answer:g}"
            )
        if repr(given) != repr(case):
            fault = f"the numbers are right, but what was given has changed: {shown}"
            raise NotAnAnswer(f"{fault}; work on a copy")


def self_check(check: Callable[[], str]) -> Callable[[], str]:
    """Decorates `check_N`: what `one_number` objects to becomes its verdict, "exercise N: ..."."""

    @functools.wraps(check)
    def verdict() -> str:
        try:
            return check()
        except NotAnAnswer as why:
            return f"exercise {check.__name__.rpartition('_')[2]}: {why}"

    return verdict
