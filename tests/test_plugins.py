"""What FILE.py:NAME loads, and the one line that says what is wrong with it."""

import sys

import pytest

from isa_lite.support.plugins import load

FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Pair:
    one: int
    two: int = 2

def add(a, b):
    return a + b

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_function_and_a_class_come_out_of_a_file_and_nothing_else_can_import_it(file):
    assert load(f"{file}:add", "loss")(2, 3) == 5
    assert load(f"{file}:Pair", "mapping")(1).two == 2
    assert "mine" not in sys.modules
    file.write_text(FILE.replace("a + b", "a * b"))
    assert load(f"{file}:add", "loss")(2, 3) == 6


@pytest.mark.parametrize(
    "name, said",
    [
        ("sub", "mine.py defines no 'sub'"),
        ("", "mine.py defines no ''"),
        ("number", "number is no class or function"),
    ],
)
def test_a_name_that_cannot_be_used_is_named(file, name, said):
    with pytest.raises(ValueError, match=f"loss '.*mine.py:{name}'.*{said}"):
        load(f"{file}:{name}", "loss")


@pytest.mark.parametrize("spec", ["adaptive", "mine.txt:add", "mine.py", ":add", "", None, 3])
def test_another_form_is_refused(spec):
    with pytest.raises(ValueError, match="loss .* must be given as FILE.py:NAME"):
        load(spec, "loss")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"mapping '.*none.py:A': there is no file"):
        load(f"{tmp_path / 'none.py'}:A", "mapping")


@pytest.mark.parametrize(
    "source, said",
    [
        ("def (", "SyntaxError: "),
        ("import not_there_at_all", "ModuleNotFoundError: .*not_there_at_all"),
        ("raise KeyError('two\\nlines')", "KeyError: .*two"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
    ],
)
def test_a_file_that_fails_is_one_line_and_leaves_nothing_behind(tmp_path, source, said):
    path, before = tmp_path / "bad.py", set(sys.modules)
    path.write_text(source)
    with pytest.raises(ValueError, match=f"bad.py fails with {said}") as error:
        load(f"{path}:A", "mapping")
    assert "\n" not in str(error.value)
    assert not [name for name in set(sys.modules) - before if "plugin" in name]
