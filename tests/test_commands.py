"""The command line: help without heavy imports, every option explained, and one line for whatever
goes wrong.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from isa_lite import commands
from isa_lite.commands import COMMANDS, main, parser_of
from isa_lite.mappings import MAPPINGS
from isa_lite.support import settings

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "torchvision",
    "open_clip",
    "timm",
    "pandas",
    "sklearn",
    "matplotlib",
    "scipy",
    "numpy",
    "onnxruntime",
    "PIL",
)


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


IMPORTED = f"""
import sys
from isa_lite.commands import main
for arguments in ([], *([name, *more] for name in {tuple(COMMANDS)} for more in (["--help"], ["--no-such-option"]))):
    try:
        main(arguments)
    except SystemExit:
        pass
    assert not (heavy := set({HEAVY}) & set(sys.modules)), (arguments, heavy)
"""


def test_help_and_the_check_of_the_arguments_import_nothing_heavy():
    done = python("-c", IMPORTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m isa_lite") == 1 + len(COMMANDS)


def test_importing_the_package_imports_nothing():
    done = python(
        "-c", "import sys; before = {*sys.modules}; import isa_lite; print({*sys.modules} - before)"
    )
    assert done.stdout.strip() == "{'isa_lite'}", done.stderr


def test_every_command_is_listed_and_has_its_module(capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(COMMANDS)


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [
        parser,
        *(p for action in subs for sub in action.choices.values() for p in parsers(sub)),
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_means_and_its_default(name):
    assert parser_of(name).description.strip()
    for parser in parsers(parser_of(name)):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            told = parser._get_formatter()._expand_help(action)
            assert len(told.strip()) > 3, action.option_strings
            if action.option_strings and not action.required and action.nargs != 0:
                assert "default" in told and "None" not in told and "[]" not in told, (
                    action.option_strings
                )


def test_no_command_writes_below_the_package_by_default(monkeypatch, tmp_path):
    for name in COMMANDS:
        for parser in parsers(parser_of(name)):
            for option in ("out", "run", "runs", "cache"):
                where = parser.get_default(option)
                assert where is None or str(where).startswith(f"runs{os.sep}"), (
                    name,
                    option,
                    where,
                )


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["pretrain-foldr"])
    assert "pretrain_folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("two\nlines"), "error: two lines"),
        (
            OSError(28, "No space left on device", "metrics.json"),
            "error: metrics.json: No space left on device",
        ),
        (FileExistsError(17, "File exists", Path("out")), "error: out: File exists"),
        (ConnectionError("out of reach"), "error: out of reach"),
        (ImportError("no package"), "error: no package"),
        (MemoryError(), "error: not enough memory"),
    ],
)
def test_an_error_is_one_line_and_status_2(monkeypatch, capsys, error, said):
    def run(args):
        raise error

    monkeypatch.setattr(importlib.import_module("isa_lite.commands.cards"), "run", run)
    with pytest.raises(SystemExit, match="^2$"):
        main(["cards"])
    assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_ends_with_130(monkeypatch, capsys, how):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        importlib.import_module("isa_lite.commands.cards"),
        "run",
        lambda args: signal.raise_signal(how),
    )
    with pytest.raises(SystemExit, match="^130$"):
        main(["cards"])
    assert capsys.readouterr().err.count("\n") == 1 and signal.getsignal(signal.SIGTERM) == before


def test_names_that_parsers_need_are_those_of_the_modules():
    assert settings.MAPPING_NAMES == tuple(MAPPINGS)


def test_texts_name_the_commands_as_they_are_called():
    """Where a card tells how a file was made, it keeps the name of that day."""
    files = [
        ROOT / "README.md",
        *(ROOT / "isa_lite").rglob("*.py"),
        *(ROOT / "notebooks").rglob("*.ipynb"),
    ]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"python -m isa_lite\.\w", text), path
        assert {found for found in re.findall(r"-m isa_lite (\w+)", text)} <= {
            *COMMANDS,
            "NAME",
            "COMMAND",
            "lists",
        }, path


def refused(capsys, *arguments: str) -> str:
    """The one line in which a command says why it does not run."""
    with pytest.raises(SystemExit, match="^2$"):
        main(list(arguments))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "--images", ".", "--out", "TAKEN"],
        ["export", "--out", "TAKEN"],
        ["pretrain_folder", "--images", ".", "--captions", "c.csv", "--out", "TAKEN/below"],
        ["benchmarks", "cirr", "--root", ".", "--out", "TAKEN"],
        ["benchmarks", "cirr", "--root", ".", "--cache", "TAKEN"],
        ["pretrain", "--run", "TAKEN"],
        ["light_backbone", "--out", "TAKEN"],
        ["cards", "--out", "TAKEN"],
        ["growth", "--out", "TAKEN/growth.json"],
        ["failures", "--out", "."],
        ["compare", "--isa", ".", "--out", "TAKEN/a.json"],
        ["sweep", "--out", "."],
    ],
)
def test_where_results_cannot_go_is_refused_before_any_work(
    capsys, monkeypatch, tmp_path, arguments
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TAKEN").write_text("")
    assert re.search("--(out|run|cache)", refused(capsys, *arguments))


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["distill", "--images", ".", "--out", "o", "--steps", "0"], "steps"),
        (["distill", "--images", ".", "--out", "o", "--device", "cuda:99"], "device 'cuda:99'"),
        (["distill", "--images", "pictures", "--out", "o", "--width", "100"], "width"),
        (["pretrain", "--text-width", "100"], "text_width"),
        (["pretrain", "--device", "cdua"], "device 'cdua'"),
        (["pretrain", "--steps", "0"], "steps"),
        (["failures", "--queries", "-1"], "--queries"),
        (["failures", "--encoder", "nowhere"], "nowhere"),
        (["growth", "--encoder", "nowhere"], "nowhere"),
        (["compare", "--isa", "nowhere"], "nowhere"),
        (["sweep", "--seeds", "a"], "--seeds"),
        (["sweep", "--seeds=0,-1"], "--seeds"),
        (["evaluate", "nowhere.json"], "nowhere.json"),
        (["evaluate", "list.json"], "list.json"),
        (["evaluate", "other.json"], "other.json"),
        (["evaluate", "methods.json"], "methods.json"),
        (["evaluate", "picture.png"], "picture.png"),
        (["sweep", "--only", "tokens", "--add", "--dry-run", "--out", "other.json"], "other.json"),
        (["sweep", "--only", "tokens", "--add", "--dry-run", "--out", "list.json"], "list.json"),
        (["sweep", "--dry-run", "--notebook", "other.json"], "other.json"),
        (["sweep", "--dry-run", "--device", "cdua"], "--device"),
        (["sweep", "--dry-run", "--jobs", "1000000000"], "--jobs"),
        (["bench", "backbones", "--image-size", "1000000000"], "--image-size"),
        (["light_backbone", "--checkpoint-minutes", "nan"], "--checkpoint-minutes"),
    ],
)
def test_bad_input_is_named_in_a_line(capsys, monkeypatch, tmp_path, arguments, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"runs": [{}]}')
    keys = ("data", "seed", "queries", "gallery", "params", "machine", "training_seconds", "groups")
    (tmp_path / "methods.json").write_text(
        json.dumps(dict.fromkeys(keys, {}) | {"methods": {"isa": 3}, "intervals": {}})
    )
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    assert name in refused(capsys, *arguments)
