"""Bad input, by the hundred: `python tests/fuzz.py --seed 0`. Not collected by pytest.

Valid files of every reader are damaged, and every option, notebook parameter and public function
gets bad values (`fuzz_damage`; what is tried is in `fuzz_entries`). Each case follows from
`--seed`, the entry point's name and its number. It runs in a child of its own (forked from this
process, which has imported everything: on Linux or macOS) with `MEMORY` bytes beyond what the child
starts with, `SECONDS` of processor time and no network, and it is one of

- clean: refused in one line that names the file or the parameter (a command: with status 2), or a
warning named the file;
- unnamed: refused by the right kind of error, but the line names nothing, is several lines, or the
status is not 2;
- strict: refused, though the input is good (a BOM, a link, an odd folder name, a key more);
- accepted: it was allowed, and what came out is what the valid input gives, or the value is as
valid as the other one;
- silent: it was allowed, and what came out is something else, without a word: also where the
  network was reached for or a program was started, and where a command, a notebook's check or a
  function began to work with a value that cannot work;
- bare: a traceback, or an exception that is no ValueError, OSError, ImportError, or TypeError that
names the parameter;
- memory, slow: over the limits; killed: ended by a signal.

What is fair. Some damage nobody can see: another number where any number would do, a flipped bit in
a pixel or in a float weight without a checksum, a sentence that says something else. Such a change
is *free*: it may change what comes out, which must still be finite, and of length 1 where the valid
one is. All else is to be *refused*, or must not matter: a value of another type, a missing key, a
file cut off, a NaN, another shape. And some changes must be the *same*: what comes out is what came
before.
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import argparse
import json
import math
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

# this checkout's package, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz_entries import Case, Entry, prepare

KINDS = ("clean", "unnamed", "strict", "accepted", "silent", "bare", "memory", "slow", "killed")
MEMORY, SECONDS = 4 << 30, 30
#: Programs that may be started: those that name the commit and the machine.
HARMLESS = {"git", "uname", "lscpu"}


# -------------------------------------------------------------------------------------------------
# results


def leaves(result: object, where: str = "") -> Iterator[tuple[str, object]]:
    """The arrays, numbers and texts of a result, with their places."""
    if isinstance(result, torch.Tensor):
        yield (
            where,
            (result.float() if result.is_floating_point() else result).detach().cpu().numpy(),
        )
    elif isinstance(result, Mapping) or is_dataclass(result) and not isinstance(result, type):
        found = result if isinstance(result, Mapping) else vars(result)
        for key in sorted(found, key=str):
            yield from leaves(found[key], f"{where}/{key}")
    elif isinstance(result, (list, tuple)):
        for i, value in enumerate(result):
            yield from leaves(value, f"{where}/{i}")
    elif isinstance(result, (int, float, np.ndarray, np.number)):
        yield where, np.asarray(result)
    elif isinstance(result, str):
        yield where, result


def differs(found: Mapping, valid: Mapping) -> str:
    """Where a result is not the valid one; "" where it is."""
    for where in sorted(set(found) | set(valid)):
        value, other = found.get(where), valid.get(where)
        if isinstance(value, str) or isinstance(other, str) or value is None or other is None:
            same = isinstance(value, str) and value == other
        elif value.shape != other.shape or value.dtype.kind != "f":
            same = np.array_equal(value, other)
        else:
            same = np.allclose(value, other, 1e-3, 1e-3, equal_nan=True)
        if not same:
            return where or "the whole"
    return ""


def unsound(found: Mapping, valid: Mapping) -> str:
    """Where a result has something that is no number, or a vector of another length than 1 where
    the valid ones have that.
    """
    for where, value in found.items():
        other = valid.get(where)
        if isinstance(value, str):
            if re.search(r"\bnan\b", value) and not re.search(r"\bnan\b", str(other)):
                return f"{where} says nan"
        elif value.dtype.kind == "f":
            valid_is_finite = not isinstance(other, np.ndarray) or np.isfinite(other).all()
            if np.isnan(value).any() or valid and valid_is_finite and np.isinf(value).any():
                # among bad values, minus infinity may say that nothing was found
                return f"{where} is not finite"
            units = (
                isinstance(other, np.ndarray)
                and other.ndim == 2
                and np.allclose(np.linalg.norm(other, axis=1), 1, atol=1e-3)
            )
            if (
                units
                and value.ndim == 2
                and not np.allclose(np.linalg.norm(value, axis=1), 1, atol=1e-2)
            ):
                return f"{where} has vectors of other lengths"
    return ""


# ---------------------------------------------------------------------------------------------------
# cases


def attempt(case: Case, place: Path, valid: Mapping) -> dict:
    """Runs the case here, and says what happened."""
    reached: list[str] = []

    def audit(event: str, arguments: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            reached.append("the network")
            raise ConnectionError("there is no network here")
        if event == "subprocess.Popen" and Path(str(arguments[0])).name not in HARMLESS:
            reached.append(f"the program {Path(str(arguments[0])).name}")
        if event == "pickle.find_class" and str(arguments[0]).split(".")[0] not in (
            "torch",
            "collections",
            "numpy",
        ):
            reached.append("an unpickled " + ".".join(map(str, arguments)))

    sys.addaudithook(audit)
    os.chdir(place)
    out: dict = {"what": "ok", "error": "", "message": "", "trace": ""}
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            found = dict(leaves(case.run(place)))
            out |= {
                "differs": differs(found, valid) if valid else "all of it",
                "unsound": unsound(found, valid),
            }
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            out |= {
                "what": "exit",
                "status": status,
                "message": end.code if isinstance(end.code, str) else "",
            }
        except BaseException as error:
            told = isinstance(error, TypeError) and any(name in str(error) for name in case.names)
            out |= {
                "what": "error",
                "error": type(error).__name__,
                "message": str(error),
                "trace": traceback.format_exc()[-4000:],
            }
            out["allowed"] = told or isinstance(error, (ValueError, OSError, ImportError))
    full = (
        re.search(r"allocate memory|bad_alloc|not enough memory", out["message"])
        or out["error"] == "MemoryError"
    )
    return out | {
        "memory": bool(full),
        "warnings": [str(w.message) for w in noted],
        "reached": sorted(set(reached)),
    }


def judge(
    case: Case, out: dict | None, number: int, stdout: str, stderr: str, seconds: float
) -> tuple[str, str]:
    """The kind of the case (one of KINDS), and why. out: `attempt`'s; None from a child that signal
    `number` ended before.
    """
    if out is None:
        if number in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM):
            return "slow", f"ended after {seconds:.0f} s"
        return "killed", f"by signal {number}: {stderr[-200:]}"

    def named(text: str) -> bool:
        return any(name in text for name in case.names)

    message = out["message"] or (
        (stderr.strip().splitlines() or [""])[-1] if out["what"] == "exit" else ""
    )
    line = f"{out['error']} {' '.join(message.split())[:300]}".strip()
    if out["reached"]:
        return "silent", f"it reached for {', '.join(out['reached'])}; {line}"
    if out["memory"] or "not enough memory" in message or out["rss"] > MEMORY / 2:
        return "memory", f"{out['rss'] / 2**30:.1f} GiB; {line}"
    if out["what"] == "ok" or out["what"] == "exit" and out["status"] == 0:
        if any(named(text) for text in out["warnings"]):
            return "clean", "a warning"
        if out.get("unsound"):
            return "silent", out["unsound"]
        if case.expect != "free" and out.get("differs", "all of it"):
            return "silent", f"accepted; not as with valid input: {out.get('differs', 'all of it')}"
        return "accepted", ""
    if out["what"] == "error" and not out["allowed"] or "Traceback (most recent" in stderr:
        return "bare", line
    if out["what"] == "exit" and out["status"] != 2:
        return "unnamed", f"status {out['status']}: {line}"
    lines = len(message.strip().splitlines())
    if lines > 1 or not named(message + stdout * (out["what"] == "exit")):
        return "unnamed", f"{line} ({lines} lines)" if lines > 1 else line
    return ("strict" if case.expect == "same" else "clean"), line


def limited(case: Case, place: Path, valid: Mapping, report: Path) -> None:
    """In the child: `attempt` within the limits; what happened goes to the file `report`."""
    pages = Path("/proc/self/statm")
    now = (
        int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if pages.is_file()
        else 64 << 30
    )
    for what, most in (
        (resource.RLIMIT_AS, now + MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most if what != resource.RLIMIT_CPU else SECONDS + 5))
    signal.alarm(40 * SECONDS)  # for one that waits; on a busy machine, all do
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = attempt(case, place, valid)
    out["rss"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )
    report.write_text(json.dumps(out, default=str))


def forked(
    work: Callable[[], object], stdout: Path | None = None, stderr: Path | None = None
) -> int:
    """Runs `work` in a forked child, its output in files; returns the status of `os.waitpid`. This
    process starts no thread.
    """
    sys.stdout.flush(), sys.stderr.flush()
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        for number, path in ((1, stdout), (2, stderr)):
            if path:
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (
            open(n, "w", closefd=False, errors="backslashreplace", buffering=1) for n in (1, 2)
        )
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def try_case(
    entry: Entry, number: int, args: argparse.Namespace, place: Path, valid: Mapping
) -> tuple[str, str, Case]:
    """One case in a child of its own, judged."""
    case = entry.case(number, Random(f"{args.seed} {entry.name} {number}"))
    report, stdout, stderr = (place.with_suffix(ending) for ending in (".json", ".out", ".err"))
    place.mkdir()
    began = time.monotonic()
    ended_by = (
        forked(lambda: limited(case, place, valid.get(case.key, {}), report), stdout, stderr) & 0x7F
    )
    out = json.loads(report.read_text()) if report.is_file() else None
    said, complained = (path.read_text(errors="replace") for path in (stdout, stderr))
    if args.show:
        print(said, complained, (out or {}).get("trace", ""), sep="\n")
    kind, why = judge(case, out, ended_by, said, complained, time.monotonic() - began)
    shutil.rmtree(place, ignore_errors=True)
    for path in (report, stdout, stderr):
        path.unlink(missing_ok=True)
    return kind, why, case


def valid_results(entry: Entry, into: Path) -> dict:
    """What the entry's valid inputs give, by key: computed in a child. RuntimeError where one
    fails.
    """

    def work() -> None:
        into.write_bytes(
            pickle.dumps({key: dict(leaves(value)) for key, value in entry.valid().items()})
        )

    if entry.valid is None:
        return {}
    if forked(work):
        raise RuntimeError(f"{entry.name}: its valid input does not work")
    return pickle.loads(into.read_bytes())


def shares(entries: list[Entry], cases: int, seed: int) -> dict[str, list[int]]:
    """The numbers of the cases of each entry: half of all go to damaged files, the rest to bad
    values, as many as there are.
    """
    values = [e for e in entries if e.count]
    readers, there = len(entries) - len(values), sum(e.count for e in values)
    each = (
        math.ceil(max(cases / 2, cases - there) / readers)
        if values and readers
        else math.ceil(cases / max(1, readers))
    )
    share = min(1.0, max(0, cases - each * readers) / max(1, there))
    orders = {e.name: Random(f"{seed} {e.name}").sample(range(e.count), e.count) for e in values}
    return {
        e.name: sorted(orders[e.name][: math.ceil(share * e.count)])
        if e.count
        else list(range(each))
        for e in entries
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cases", type=int, default=1800, help="in all, shared among the entry points"
    )
    parser.add_argument(
        "--only",
        default="",
        help="entry points whose name holds this; NAME:NUMBER runs and shows one case",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="each case that is neither clean nor accepted, as it comes",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="a folder of valid files, to be used again; it is written where there is none",
    )
    args = parser.parse_args()
    wanted, _, number = args.only.partition(":")
    # what was tried need not be text that can be printed
    sys.stdout.reconfigure(errors="backslashreplace")
    args.show, began = bool(number), time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        args.work, folder = (args.work or Path(folder) / "work").resolve(), Path(folder)

        def build(write: Callable[[], None]) -> None:
            if forked(write):
                sys.exit("the valid files cannot be written")

        entries = [
            e
            for e in prepare(args.work, build)
            if (wanted == e.name if number else wanted in e.name)
        ]
        if not entries:
            sys.exit(f"--only: no entry point is called {wanted!r}")
        print(
            f"{len(entries)} entry points; ready after {time.monotonic() - began:.0f} s", flush=True
        )
        table: dict[str, Counter] = {}
        failed: list[str] = []
        numbers = {wanted: [int(number)]} if number else shares(entries, args.cases, args.seed)
        for entry in (e for e in entries if numbers[e.name]):
            table[entry.name] = Counter()
            try:
                valid = valid_results(entry, folder / "valid")
            except RuntimeError as error:  # the others can still be tried
                failed.append(str(error))
                continue
            for i in numbers[entry.name]:
                start = time.monotonic()
                kind, why, case = try_case(entry, i, args, folder / f"case{i}", valid)
                table[entry.name][kind] += 1
                if args.show or args.verbose and kind not in ("clean", "accepted"):
                    print(
                        f"{kind:9}{entry.name}: {case.text[:200]}\n         {why[:300]}  ({time.monotonic() - start:.1f} s)"
                    )
                    print(
                        f"         python tests/fuzz.py --seed {args.seed} --only {json.dumps(f'{entry.name}:{i}')}",
                        flush=True,
                    )
    width, total = max(map(len, table)), sum(table.values(), Counter())
    print(f"\nseed {args.seed}: {total.total()} cases in {time.monotonic() - began:.0f} s")
    print(" " * width, *(f"{kind:>9}" for kind in ("cases", *KINDS)))
    for name, counts in [*table.items(), ("all", total)]:
        print(
            f"{name:{width}}",
            *(f"{n or '.':>9}" for n in (counts.total(), *(counts[kind] for kind in KINDS))),
        )
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
