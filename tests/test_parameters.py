import math
import os
from pathlib import Path

import numpy as np
import pytest

from isa_lite.support import parameters
from isa_lite.support.parameters import (
    check,
    checked,
    device_name,
    file,
    flag,
    folder,
    naming,
    number,
    optional,
    path_name,
    text,
    whole,
)

RULES = dict(steps=whole(1), weight=number(0), smoke=flag(), device=text("cpu", "cuda"))
GOOD = dict(steps=5, weight=0.5, smoke=False, device="cpu", In=[], _hidden=3, check=check)


def test_values_come_back_typed():
    p = check(GOOD | {"smoke": "true", "weight": 1}, **RULES)
    assert (p.steps, p.smoke, p.device) == (5, True, "cpu")
    assert p.weight == 1.0 and isinstance(p.weight, float)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stesp": 7}, "unknown.*'stesp'.*'steps'"),
        ({"zzz": 7}, "unknown.*'zzz'.*steps"),
        ({"steps": 0}, "'steps'.*whole number.*at least 1"),
        ({"steps": True}, "'steps'.*whole number"),
        ({"steps": 2.5}, "'steps'.*whole number"),
        ({"weight": -0.1}, "'weight'.*at least 0.*-0.1"),
        ({"weight": float("nan")}, "'weight'.*number"),
        ({"weight": float("inf")}, "'weight'.*number"),
        ({"smoke": "yes"}, "'smoke' must be true or false"),
        ({"device": "cdua"}, "'device'.*did you mean 'cuda'"),
        ({"device": 3}, "'device' must be a string"),
    ],
)
def test_a_bad_parameter_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        check(GOOD | change, **RULES)


def test_a_missing_parameter_is_named():
    with pytest.raises(ValueError, match="'steps' is missing"):
        check({k: v for k, v in GOOD.items() if k != "steps"}, **RULES)


def test_a_notebook_may_be_run_again_in_the_same_kernel():
    left = {"p": check(GOOD, **RULES), "number_of_steps": 3, "step": 2}  # by its own cells
    cell = "steps: int = 9  # so many\nsmoke: bool = False"
    ran = [
        "%matplotlib inline",
        "steps: int = 5\nsmoke: bool = False",
        "step = 2",
        cell,
        "number_of_steps = 3",
    ]
    assert check(GOOD | left | {"steps": 9, "In": ran}, **RULES).steps == 9
    for wrong in ("stesp: int = 9", "stesp = 9"):
        ran = [cell, "step = 2", f"smoke: bool = False\n{wrong}"]
        with pytest.raises(ValueError, match="unknown.*'stesp'.*'steps'"):
            check(GOOD | left | {"stesp": 9, "In": ran}, **RULES)
    with pytest.raises(ValueError, match="'steps'.*whole number"):
        check(GOOD | left | {"steps": 0, "In": ran}, **RULES)


PARAMETERS = (
    "steps: int = 5  # so many\nweight: float = 0.5\nsmoke: bool = False\ndevice: str = 'cpu'"
)


def test_variables_of_a_startup_file_and_paths_of_papermill_are_no_parameters():
    """As under `papermill --inject-paths`, with an IPython startup file that sets `student`."""
    injected = "# Parameters\nsteps = 5\nPAPERMILL_INPUT_PATH = 'a'\nPAPERMILL_OUTPUT_PATH = 'b'"
    names = {"student": "Kim", "PAPERMILL_INPUT_PATH": "a", "PAPERMILL_OUTPUT_PATH": "b"}
    ran = ["", "import os", PARAMETERS, injected, "p = check(globals())"]
    assert check(GOOD | names | {"In": ran}, **RULES).steps == 5
    ran[3] = "# Parameters\nstesp = 5"
    with pytest.raises(ValueError, match="unknown parameter 'stesp'.*'steps'"):
        check(GOOD | names | {"stesp": 5, "In": ran}, **RULES)
    ran[2:4] = [PARAMETERS + "\nstesp = 5"]
    with pytest.raises(ValueError, match="unknown parameter 'stesp'"):
        check(GOOD | names | {"stesp": 5, "In": ran}, **RULES)


def test_a_number_is_at_most_what_memory_holds(monkeypatch):
    assert parameters.memory() > 2**28
    monkeypatch.setattr(parameters, "memory", lambda: 10_000_000)
    assert whole(1, each=1000)(10_000) == 10_000
    with pytest.raises(ValueError, match="10000.*memory"):
        whole(1, each=1000)(10_001)
    with pytest.raises(ValueError, match="from 1 to 5"):
        whole(1, 5)(6)
    monkeypatch.setattr(parameters, "memory", lambda: math.inf)
    assert whole(1, each=1000)(10**9) == 10**9


def test_a_device_is_any_that_torch_has_here():
    assert device_name()("cpu") == "cpu" and device_name()("cpu:0") == "cpu:0"
    for name in ("cuda:99", "cdua", "meta", "", "cuda:-1"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used"):
            device_name()(name)
    with pytest.raises(ValueError, match="string"):
        device_name()(0)


def test_where_results_go_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for good in (tmp_path, tmp_path / "new" / "deep"):
        assert folder()(str(good)) == str(good)
        assert file()(str(good / "record.json"))
    for bad in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError):
            folder()(str(bad))
    with pytest.raises(ValueError):
        file()(str(tmp_path))
    with pytest.raises(ValueError):
        file()(str(tmp_path / "file" / "record.json"))
    (tmp_path / "closed").mkdir(mode=0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write anywhere
        with pytest.raises(ValueError, match="closed"):
            folder()(str(tmp_path / "closed" / "new"))


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ConnectionError, ImportError])
def test_what_goes_wrong_with_a_parameter_names_it(error):
    with (
        pytest.raises(error, match="^parameters 'vl_model', 'pretrained': gone"),
        naming("vl_model", "pretrained"),
    ):
        raise error("gone")
    with pytest.raises(ValueError, match="^parameter 'out_dir': .*full"), naming("out_dir"):
        raise OSError(28, "disk is full")


@checked(count=whole(1), where=optional(path_name()))
def some(count: int, where=None, more=()):
    return count, where, more


def test_a_checked_function_takes_what_keeps_the_rules():
    assert some(2) == (2, None, ()) and some(count=np.int64(3), where=Path("x"), more="y") == (
        3,
        Path("x"),
        "y",
    )


@pytest.mark.parametrize(
    "name, value",
    [("count", v) for v in (0, 1.5, True, "2", None)]
    + [("where", v) for v in ("", 3, "a\0b", b"", [])],
)
def test_a_checked_function_names_itself_and_the_parameter(name, value):
    with pytest.raises(ValueError, match=f"some.*{name}"):
        some(**{"count": 1, name: value})
