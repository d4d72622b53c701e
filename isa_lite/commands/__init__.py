"""The command line: `python -m isa_lite NAME ...` runs the module NAME of this package, and
`--help` explains its options.

A command is a short file with two functions: `add_arguments(parser)`, and `run(args)`. Only `run`
imports what is slow to import (PyTorch, pandas, ...), so help and the check of the arguments take
no time. `main` is the one place that turns errors into a line on stderr and an exit status: 2 for
anything that was wrong with the input, 130 for a run that was stopped.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from isa_lite.support.parameters import Rule, number, option, output
from isa_lite.support.plugins import either
from isa_lite.support.settings import DATA, MINUTES, SCENES_CLIP, SCENES_ENCODER, TEMPLATE

#: What each command does, in the order in which a newcomer meets them.
COMMANDS = {
    "distill": "train a query encoder on a folder of images",
    "evaluate": "print the results of notebook 02, or gather several runs into one file",
    "compare": "ISA beside every other method, over several seeds",
    "benchmarks": "score on FashionIQ, CIRR or CIRCO; write or check submission files",
    "export": "write a query side as ONNX files",
    "client": "answer one query from such files, without PyTorch",
    "pretrain_folder": "train a small VL model on a folder of captioned images",
    "sweep": "the ablations: notebook 02 with one thing changed at a time",
    "growth": "recall and search time as the gallery grows",
    "failures": "the worst queries as a page to browse",
    "bench": "speed and cost of queries, galleries and backbones",
    "pretrain": "train the VL model of rendered scenes that is shipped",
    "light_backbone": "train the backbone weights that are shipped",
    "sprites": "make the drawings of the world of things from packages of open emoji",
    "cards": "measure the shipped models and write their cards",
}


#: Options that several commands have.
_SHARED = {
    "encoder": {"default": str(DATA / SCENES_ENCODER), "help": "folder of a trained query encoder"},
    "mapping": {
        "type": option(either()),
        "help": "FILE.py:NAME of the encoder's mapping, if that is yours (default: none)",
    },
    "vl-model": {"help": "a name of open_clip, hf-hub:..., blip:..., or a folder"},
    "pretrained": {"help": "tag or file of weights, for an open_clip model (default: none)"},
    "checkpoint-minutes": {"help": "how often the state of the run is saved", "default": MINUTES},
}
_SHARED["template"] = {"default": TEMPLATE, "help": "the prompt, with {sentence} and {modifier}"}
_SHARED["vl-model"]["default"] = SCENES_CLIP
_SHARED["checkpoint-minutes"]["type"] = option(number(0), float)


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options of `_SHARED`, by their names."""
    for name in names:
        parser.add_argument(f"--{name}", **_SHARED[name])


def add_output(
    parser: argparse.ArgumentParser, name: str, rule: Rule, default: str | None, meaning: str
) -> None:
    """The option --NAME: where results go, a `folder()` or `file()`; required without `default`."""
    how = {"required": True} if default is None else {"default": Path(default)}
    parser.add_argument(f"--{name}", type=output(rule), help=meaning, **how)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. Its help shows each default that its text does not."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": _Help, **settings})

    def error(self, message: str):
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


class _Help(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        if action.required or not action.option_strings or action.nargs == 0 or "default" in told:
            return told
        return f"{told} (default: %(default)s)"


def overview() -> str:
    """The list that `python -m isa_lite` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, does in COMMANDS.items()]
    head, foot = "usage: python -m isa_lite COMMAND ...", "COMMAND --help explains a command."
    return "\n".join([head, "", *lines, "", f"python -m isa_lite {foot}"])


def parser_of(name: str) -> Parser:
    """The parser of one command. Its description is what the command's module says of itself."""
    module = importlib.import_module(f"isa_lite.commands.{name}")
    said = (module.__doc__ or "").replace("`", "")
    parser = Parser(prog=f"python -m isa_lite {name}", description=said)
    module.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. SystemExit after one line on stderr: 2 for an error, 130 if stopped."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("-", "_"), COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "python -m isa_lite lists them"
        _end(2, f"error: there is no command {name!r}; {hint}")
    try:
        with _sigterm_interrupts():
            args = parser_of(name).parse_args(rest)
            importlib.import_module(f"isa_lite.commands.{name}").run(args)
            sys.stdout.flush()
    except KeyboardInterrupt:
        _end(130, f"stopped: python -m isa_lite {name}")
    except BrokenPipeError:  # nobody reads on, as with `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(1)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        _end(2, f"error: {_words(error)}")
    except RuntimeError as error:
        if "memory" not in str(error):  # PyTorch's way to say that there is none left
            raise
        _end(2, f"error: {_words(error)}")


def _end(status: int, line: str = "") -> None:
    if line:
        print(line, file=sys.stderr)
    raise SystemExit(status)


def _words(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        parts = (error.filename, error.filename2, error.strerror)
        return ": ".join(str(part) for part in parts if part is not None)
    if isinstance(error, MemoryError):
        return f"not enough memory ({error})" if str(error) else "not enough memory"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM (of `docker stop`, of a queue) raises KeyboardInterrupt, as Ctrl-C does."""
    # only the main thread may set a handler
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
