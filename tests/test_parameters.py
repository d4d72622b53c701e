import pytest

from isa_lite.parameters import check, flag, number, text, whole

RULES = dict(steps=whole(1), weight=number(0), smoke=flag(), device=text("cpu", "cuda"))
GOOD = dict(steps=5, weight=0.5, smoke=False, device="cpu", In=[], _hidden=3, check=check)


def test_values_come_back_typed():
    p = check(GOOD | {"smoke": "true", "weight": 1}, **RULES)
    assert (p.steps, p.smoke, p.device) == (5, True, "cpu")
    assert p.weight == 1.0 and isinstance(p.weight, float)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stesp": 7}, "unknown parameter 'stesp'; did you mean 'steps'"),
        ({"zzz": 7}, "unknown parameter 'zzz'; the parameters are steps"),
        ({"steps": 0}, "'steps' must be a whole number of at least 1, not 0"),
        ({"steps": True}, "'steps' must be a whole number"),
        ({"steps": 2.5}, "'steps' must be a whole number"),
        (
            {"weight": -0.1},
            "'weight' must be a number of at least 0.0, not -0.1|'weight' must be a number of at least 0, not -0.1",
        ),
        ({"weight": float("nan")}, "'weight' must be a number"),
        ({"smoke": "yes"}, "'smoke' must be true or false"),
        ({"device": "cdua"}, "one of 'cpu', 'cuda'; did you mean 'cuda'"),
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
    ran = ["%matplotlib inline", "steps: int = 5\nsmoke: bool = False", "step = 2", cell, "number_of_steps = 3"]
    assert check(GOOD | left | {"steps": 9, "In": ran}, **RULES).steps == 9
    for wrong in ("stesp: int = 9", "stesp = 9"):
        ran = [cell, "step = 2", f"smoke: bool = False\n{wrong}"]
        with pytest.raises(ValueError, match="unknown parameter 'stesp'; did you mean 'steps'"):
            check(GOOD | left | {"stesp": 9, "In": ran}, **RULES)
    with pytest.raises(ValueError, match="'steps' must be a whole number"):
        check(GOOD | left | {"steps": 0, "In": ran}, **RULES)
