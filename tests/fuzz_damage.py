"""Ways to damage a file, and bad values for a parameter; for `fuzz.py`, which says what "refuse",
"free" and "same" mean.
"""

from __future__ import annotations

import copy
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch

#: Numbers of which a thousand million is a wish like any other; of all other whole numbers it is
#: refused.
LONG = {
    "steps",
    "pretrain_steps",
    "matching_steps",
    "seed",
    "seeds",
    "warmup",
    "validate_every",
    "negatives",
    "batch_size",
}
LONG |= {"shard", "probes", "rounds", "each", "chunk", "rivals", "draws", "to", "k"}
#: Texts and paths of which not every one can be meant.
NAMED = {
    "device",
    "dtype",
    "template",
    "backbone",
    "mapping",
    "vl_model",
    "encoder",
    "images",
    "captions",
    "triplets",
    "root",
}
NAMED |= {
    "benchmark",
    "split",
    "gallery",
    "word",
    "backbone_weights",
    "pretrained",
    "tag",
    "kind",
    "methods",
    "name",
    "folder",
}
NAMED |= {
    "path",
    "image",
    "metrics",
    "isa",
    "symmetric",
    "notebook",
    "check",
    "models",
    "only",
    "recipe",
}
#: Where something is written.
OUTPUTS = {"out", "out_dir", "run", "runs", "cache", "checkpoint", "gather"}


# ---------------------------------------------------------------------------------------------------
# files


def damaged_bytes(data: bytes, rng: Random, text: bool) -> tuple[str, str, bytes]:
    """What was done, what is to come of it, and the bytes. text: a table or JSON, of which a part
    may be whole, too.
    """
    at, many = rng.randrange(max(1, len(data))), rng.choice((1, 1, 8, 200))
    kind = rng.choice(
        ["cut", "cut", "flip", "flip", "zeros", "random", "insert", "append"]
        + ["bom", "utf-16", "crlf"] * text
    )
    if kind == "cut":
        return f"cut at byte {at} of {len(data)}", "free" if text else "refuse", data[:at]
    if kind == "flip":
        new = bytearray(data)
        for _ in range(many):
            new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
        return f"{many} bits flipped", "free", bytes(new)
    return {
        "zeros": (
            f"{many} bytes from {at} are zero",
            "free",
            data[:at] + bytes(len(data[at : at + many])) + data[at + many :],
        ),
        "random": ("random bytes", "refuse", rng.randbytes(rng.choice((1, 7, 8, 100, 5000)))),
        "insert": (
            f"{many} zero bytes put in at {at}",
            "free",
            data[:at] + bytes(many) + data[at:],
        ),
        "append": ("bytes behind the end", "free", data + rng.randbytes(20)),
        "bom": ("a byte-order mark", "same", b"\xef\xbb\xbf" + data),
        "crlf": (
            "Windows' ends of lines",
            "same",
            data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
        ),
        "utf-16": ("as UTF-16", "refuse", data.decode("utf-8", "replace").encode("utf-16")),
    }[kind]


def _paths(doc: object, here: tuple = ()) -> Iterator[tuple]:
    yield here
    for key, value in (
        doc.items()
        if isinstance(doc, dict)
        else enumerate(doc[:50])
        if isinstance(doc, list)
        else ()
    ):
        yield from _paths(value, (*here, key))


ODD = [
    "null",
    "[]",
    "{}",
    '""',
    '"x"',
    '"\\ud800"',
    '"a\\u0000b"',
    "true",
    "-1",
    "0",
    "1.5",
    "1" + "0" * 30,
    "1" + "0" * 5000,
]
ODD += [
    "NaN",
    "Infinity",
    "1e400",
    '["x"]',
    "[null]",
    '{"x": 1}',
    "[" * 1000 + "]" * 1000,
    '"' + "x" * 100_000 + '"',
]


def damaged_json(
    doc: object, rng: Random, free: bool = False, optional: bool = False
) -> tuple[str, str, str]:
    """Another value, key or kind somewhere in a document. free: other texts are as good; optional:
    keys may be missing.
    """
    doc, paths = copy.deepcopy(doc), list(_paths(doc))
    # else long lists would get nearly every change
    depth = rng.choice(sorted({len(p) for p in paths}))
    path = rng.choice([p for p in paths if len(p) == depth])
    holder = doc
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]] if path else doc
    where, in_object = (
        "/".join(map(str, path)) or "the whole",
        bool(path) and isinstance(holder, dict),
    )
    kind = rng.choice(
        ["value"] * 5
        + ["missing", "extra", "duplicate"] * in_object
        + ["fewer"] * isinstance(old, list)
    )
    mark = "@@here@@"
    if kind == "value":
        new = rng.choice([value for value in ODD if value != json.dumps(old)])
        told = new if len(new) < 30 else f"{new[:12]}... ({len(new)} characters)"
        # an id may be a whole number, too
        name = free and path[-2:-1] == ("ids",) and re.fullmatch(r"-?\d+", new)
        text, number = (
            isinstance(old, str) and (new[0] == '"' or name),
            type(old) in (int, float) and new in ("0", "1.5", "-1"),
        )
        empty = (
            new == "[]"
            and isinstance(old, list)
            or optional
            and new == "{}"
            and isinstance(old, dict)
        )
        expect = "free" if text and free or number or empty else "refuse"
        if path:
            holder[path[-1]] = mark
        return (
            f"{where} is {told}",
            expect,
            json.dumps(doc).replace(f'"{mark}"', new) if path else new,
        )
    if kind == "missing":
        del holder[path[-1]]
        return f"{where} is missing", "free" if optional else "refuse", json.dumps(doc)
    if kind == "extra":
        holder["a key more"] = rng.choice((None, 1, [], "x"))
        return f"one key more beside {where}", "same", json.dumps(doc)
    if kind == "duplicate":
        new, holder[path[-1]] = rng.choice(("null", json.dumps(old))), mark
        twice = f"{json.dumps(old)}, {json.dumps(path[-1])}: {new}"
        return (
            f"{where} twice, then {new[:20]}",
            "refuse",
            json.dumps(doc).replace(f'"{mark}"', twice),
        )
    del old[rng.randrange(len(old)) if old else 0 :]
    return f"{where} is shorter", "free", json.dumps(doc)


def damaged_tensors(path: Path, rng: Random, free: bool) -> tuple[str, str]:
    """In place: one tensor of a safetensors file, or its `info`, is another; free: see
    `damaged_json`.
    """
    from safetensors.torch import safe_open, save_file

    with safe_open(path, "pt") as file:
        tensors, info = (
            {k: file.get_tensor(k) for k in file.keys()},
            (file.metadata() or {}).get("info"),
        )
    key, expect = rng.choice(sorted(tensors)), "refuse"
    old = tensors[key]
    kinds = [
        "shape",
        "row",
        "nan",
        "nan",
        "inf",
        "zero",
        "ints",
        "half",
        "missing",
        "extra",
        "huge",
        "header",
    ]
    kind = rng.choice(kinds + ["info"] * 4 * bool(info))
    floats = old.is_floating_point()
    if kind == "info":
        kind, expect, info = damaged_json(json.loads(info), rng, free)
        key = "info"
    elif kind == "missing":
        del tensors[key]
    elif kind == "extra":
        tensors["one.more"], expect = torch.zeros(2), "same"
    elif kind == "shape":
        tensors[key] = old[None] if rng.random() < 0.5 else old.flatten()[:-1]
    elif kind == "row":
        tensors[key] = old[:-1] if old.ndim else old[None]
    elif kind in ("nan", "inf", "huge"):
        new = old.float().clone()
        new.view(-1)[: rng.choice((1, new.numel()))] = {
            "nan": math.nan,
            "inf": math.inf,
            "huge": 1e38,
        }[kind]
        tensors[key], expect = new.to(old.dtype), "refuse" if floats and kind != "huge" else "free"
    elif kind == "zero":
        tensors[key], expect = torch.zeros_like(old), "free"
    elif kind == "ints":
        tensors[key] = old.to(torch.int64 if floats else torch.float64)
    elif kind == "half":
        tensors[key], expect = old.half() if floats else old, "free"
    if kind == "header":
        size, data = rng.choice((2**63, 2**40, path.stat().st_size, 0)), path.read_bytes()
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        return f"a header of {size} bytes", "refuse"
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        path,
        None if info is None else {"info": info},
    )
    return f"{key}: {kind}", expect


def damaged_array(path: Path, rng: Random) -> tuple[str, str]:
    """In place: a .npy file of another shape, kind or numbers, or with Python objects in it."""
    old = np.load(path)
    spoiled = old.copy()
    spoiled[1] = np.nan
    made = {
        "rows": old[:-1],
        "flat": old.reshape(-1),
        "float64": old.astype(np.float64),
        "ints": old.astype(np.int32),
    }
    made |= {"a row of nan": spoiled, "objects": np.array([{"x": 1}], object), "empty": old[:0]}
    made |= {
        "Fortran's order": np.asfortranarray(old),
        "a row of zeros": old * (np.arange(len(old)) != 1).reshape(-1, *[1] * (old.ndim - 1)),
    }
    kind = rng.choice(sorted(made))
    with path.open("wb") as file:
        np.save(file, made[kind])
    return kind, {"float64": "same", "Fortran's order": "same", "a row of zeros": "free"}.get(
        kind, "refuse"
    )


def _png(width: int, height: int) -> bytes:
    """A whole black PNG of these dimensions, small in bytes."""
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    body = (
        b"".join(packer.compress(row * min(500, height - y)) for y in range(0, height, 500))
        + packer.flush()
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", body),
        (b"IEND", b""),
    )
    parts = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def odd_image(rng: Random) -> tuple[str, str, bytes]:
    """Content under an image's name that is none, or too much."""
    kinds = {
        "EPS": lambda: (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n0 0 50 50 rectfill\nshowpage\n%%EOF\n"
        ),
        "SVG": lambda: (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
        ),
        "PNG of 1 x 60000": lambda: _png(1, 60000),
        "PNG of 13000 x 13000": lambda: _png(13000, 13000),
        "PNG of 60000 x 60000": lambda: _png(60000, 60000),
        "PNG whose header says 2^31": lambda: (
            _png(8, 8)[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + _png(8, 8)[24:]
        ),
        "text": lambda: b"image,caption\n",
        "PDF": lambda: b"%PDF-1.4\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF\n",
        "HTML": lambda: b"<!doctype html><title>404</title>",
    }
    kind = rng.choice(sorted(kinds))
    return kind, "refuse", kinds[kind]()


def damaged_table(data: bytes, rng: Random) -> tuple[str, str, bytes]:
    """A table with other columns, names or quotes."""
    lines = data.decode().splitlines()
    kinds = {
        "names without ending": lambda: [re.sub(r"\.\w+,", ",", line) for line in lines],
        "2000 rows of strange names": lambda: (
            lines + [f"photo_{i:05}.jpeg,a cat" for i in range(2000)]
        ),
        "names in another folder": lambda: lines[:1] + ["other/" + line for line in lines[1:]],
        "a quote that is not closed": lambda: [*lines[:2], 'a.png,"one', *lines[2:]],
        "a column more": lambda: [line + ",x" for line in lines],
        "a field more in a row": lambda: [*lines, lines[-1] + ",x,y"],
        "no header": lambda: lines[1:],
        "header alone": lambda: lines[:1],
        "another header": lambda: ["picture,text", *lines[1:]],
        "a name outside": lambda: [*lines, "../../etc/passwd,a cat"],
        "a caption of 100000 words": lambda: [*lines, "a.png," + "cat " * 100_000],
        "a null character": lambda: [*lines, "a.png,a \0cat"],
        "every row twice": lambda: [lines[0], *[line for line in lines[1:] for _ in "12"]],
        "semicolons": lambda: [line.replace(",", ";", 1) for line in lines],
    }
    kind = rng.choice(sorted(kinds))
    expect = {"every row twice": "same", "a column more": "same", "semicolons": "same"}
    return kind, expect.get(kind, "free"), "\n".join(kinds[kind]()).encode() + b"\n"


def _instead(path: Path, kind: str, other: Path) -> None:
    """Something else in the file's place."""
    path.rename(path.with_name("aside")) if kind == "a link to the file" else path.unlink()
    if kind == "an empty file":
        path.write_bytes(b"")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "another file":
        path.write_bytes(other.read_bytes())
    elif kind != "nothing":
        path.symlink_to("aside" if kind == "a link to the file" else "nowhere")


def damage(
    path: Path, kind: str, others: list[Path], rng: Random, free: bool, optional: bool, needed: bool
) -> tuple[str, str, Callable[[Path], None]]:
    """For a valid file of a kind (json, csv, tensors, npy, image, bytes): what is done, what is to
    come of it, and the deed.

    needed: the file must be there; free, optional: see `damaged_json`.
    """
    if rng.random() < 0.12:
        what = rng.choice(
            (
                "an empty file",
                "a folder",
                "a link to nothing",
                "a link to the file",
                "another file",
                "nothing",
            )
        )
        other = rng.choice([o for o in others if o.name != path.name])
        # In a folder of images, nobody knows of one that is gone, and another picture is as good.
        free = (
            kind == "image"
            and what in ("another file", "nothing", "a folder")
            or not needed
            and "nothing" in what
        )
        expect = "same" if what == "a link to the file" else "free" if free else "refuse"
        return f"{what} in its place", expect, lambda place: _instead(place, what, other)
    seed = rng.random()
    if kind in ("tensors", "npy") and rng.random() < 0.7:
        work = partial(damaged_tensors, free=free) if kind == "tensors" else damaged_array
        trial = path.with_name("trial")
        trial.write_bytes(path.read_bytes())
        text, expect = work(trial, Random(seed))
        trial.unlink()
        return text, expect, lambda place: work(place, Random(seed)) and None
    if kind == "json" and rng.random() < 0.75:
        text, expect, new = damaged_json(json.loads(path.read_bytes()), rng, free, optional)
        new = new.encode()
    elif kind == "csv" and rng.random() < 0.6:
        text, expect, new = damaged_table(path.read_bytes(), rng)
    elif kind == "image" and rng.random() < 0.4:
        text, expect, new = odd_image(rng)
    else:
        text, expect, new = damaged_bytes(path.read_bytes(), rng, kind in ("json", "csv"))
    return text, expect, lambda place: place.write_bytes(new) and None


# --------------------------------------------------------------------------------------------------
# values


def bad_number(name: str, default: object) -> list[tuple[object, str]]:
    """Values for a number, with what is to come of each."""
    whole = type(default) is int
    values = (
        [(v, "refuse") for v in (-1, math.nan, "x", [])]
        + [(None, "refuse")] * (default is not None)
        + [(0, "free")]
    )
    if not whole:
        # never: at the end alone
        return [*values, (math.inf, "free" if name == "checkpoint_minutes" else "refuse")]
    return (
        values
        + [(True, "refuse"), (1.5, "refuse")]
        + [(10**9, "refuse"), (10**30, "refuse")] * (name not in LONG)
    )


def bad_text(name: str, default: object, work: Path) -> list[tuple[object, str]]:
    """Values for a text or a path, with what is to come of each. work: a folder with metrics.json
    and the folder results.
    """
    values = [(v, "refuse") for v in (3, ["x"])] + [(None, "refuse")] * (default is not None)
    if name in OUTPUTS:
        return [
            *values,
            *(
                (v, "refuse")
                for v in (str(work / "metrics.json" / "x"), "x" * 5000, str(work / "metrics.json"))
            ),
        ]
    if name not in NAMED:
        return values + [(v, "free") for v in ("", "\ud800", "a\0b", "x " * 5000)]
    wrong = (
        "nonsense",
        "nonsense/no.pt",
        "\ud800",
        "a\0b",
        "x" * 5000,
        str(work / "results"),
        str(work / "metrics.json"),
    )
    return values + [
        (v, "refuse")
        for v in (*wrong, "cuda:99", "{}")
        if not (name == "metrics" and v == str(work / "metrics.json"))
    ]


def bad_value(name: str, default: object, work: Path) -> list[tuple[object, str]]:
    """Values for a parameter that has this default."""
    if isinstance(default, bool):
        return [(v, "refuse") for v in (None, "maybe", 2, [], 0.5, "")]
    if isinstance(default, (int, float)):
        return bad_number(name, default)
    if isinstance(default, (str, Path)):
        return bad_text(name, default, work)
    return [(v, "refuse") for v in ("x", -1, math.nan, [], {"x": 1})]


def bad_word(name: str, option, work: Path) -> list[tuple[str, str]]:
    """Words on the command line for one of argparse's options, with what is to come of each."""
    if option.nargs == 0:
        return [("x", "refuse")]
    if option.choices:
        return [("nonsense", "refuse"), ("", "refuse")]
    if name in OUTPUTS:
        other = "metrics.json" if option.help.startswith("folder") else "results"
        wrong = (str(work / "metrics.json" / "x"), "x" * 5000, str(work / other))
        return [
            *((v, "refuse") for v in wrong),
            ("a\udcff", "free"),
            ("{}é '", "free"),
            ("-1", "free"),
        ]
    numbers = (
        type(option.default) in (int, float)
        or option.type not in (None, str, Path)
        or name in ("seeds", "rivals")
    )
    if numbers:
        real = type(option.default) is float or option.type is float
        values = [(v, "refuse") for v in ("-1", "x", "", "nan", "inf", "1" * 5000)] + [
            ("0", "free")
        ]
        return (
            values
            if real
            else [*values, ("1.5", "refuse"), *[("1" + "0" * 9, "refuse")] * (name not in LONG)]
        )
    if name in NAMED:
        return [
            (v, e)
            for v, e in bad_text(name, "", work)
            if isinstance(v, str) and "\0" not in v and v != "\ud800"
        ]
    return [(v, "free") for v in ("", "x " * 5000, "\udcff")]
