"""What makes the package run on systems that are tried nowhere here: Windows above all, where files
are read in another encoding, open files are neither renamed nor removed, and the workers of a data
loader start from nothing."""

import ast
import pickle
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from isa_lite.pretraining.folder_batches import FolderBatches, FolderConfig
from isa_lite.pretraining.towers import PretrainConfig, SceneBatches
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support.images import ImageFolder, batch_loader

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "isa_lite").rglob("*.py")), *sorted((ROOT / "notebooks").glob("*.py"))]
POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}


@cache
def trees() -> dict[str, ast.Module]:
    """All code of the package, of the scripts beside the notebooks, and of each cell of a
    solution.
    """
    found = {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in SCRIPTS
    }
    for path in sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                found[f"{path.name} {cell.id}"] = ast.parse(cell.source)
    return found


def calls(tree: ast.Module):
    """(name of the function or method, its call)"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def reads_text(name: str, call: ast.Call) -> bool:
    """Whether a call opens a file as text, in whatever encoding the system has unless one is
    named.
    """
    if name in ("read_text", "write_text"):
        # a method of ours has a path there
        given = call.args[0] if call.args and name == "read_text" else None
        return isinstance(call.func, ast.Attribute) and given is None and len(call.args) <= 1
    if name == "open" and ast.unparse(call.func) not in ("Image.open", "PIL.Image.open", "os.open"):
        words = [
            a.value
            for a in (*call.args, *(k.value for k in call.keywords if k.arg == "mode"))
            if isinstance(a, ast.Constant)
        ]
        return not any(
            "b" in word for word in words if isinstance(word, str) and set(word) <= set("rwxabt+")
        )
    return False


def test_text_is_read_and_written_in_a_named_encoding():
    bare = [
        f"{where}, line {call.lineno}: {ast.unparse(call)}"
        for where, tree in trees().items()
        for name, call in calls(tree)
        if reads_text(name, call) and not any(k.arg == "encoding" for k in call.keywords)
    ]
    assert not bare, "without encoding=, Windows takes another one:\n" + "\n".join(bare)


def test_a_call_without_an_encoding_is_found():
    bad = [
        "p.read_text()",
        "p.write_text('é')",
        "open(p)",
        "open(p, 'w')",
        "p.open()",
        "(a / b).open('a')",
    ]
    good = [
        "open(p, 'rb')",
        "p.open('xb')",
        "write_text(path, text)",
        "checkpoint.write_text(path, text)",
        "Image.open(p)",
    ]
    for source, expected in [*((s, True) for s in bad), *((s, False) for s in good)]:
        assert any(reads_text(*found) for found in calls(ast.parse(source))) == expected, source


def test_a_file_that_is_there_already_is_replaced_and_not_renamed_onto():
    """Path.rename replaces a file on Linux and fails on Windows; Path.replace and os.replace do the
    same on both.
    """
    named = [
        f"{where}: {ast.unparse(c)}"
        for where, tree in trees().items()
        for name, c in calls(tree)
        if name in ("rename", "renames")
    ]
    # those are a table's
    assert not [line for line in named if "columns=" not in line and "index=" not in line], named


def test_what_only_linux_and_macos_have_is_imported_where_it_is_missed_without_harm():
    for where, tree in trees().items():
        guarded = {
            id(n) for t in ast.walk(tree) if isinstance(t, ast.Try | ast.If) for n in ast.walk(t)
        }
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX_ONLY & set(names) or id(node) in guarded, (
                f"{where}: {ast.unparse(node)}"
            )
        for name, call in calls(tree):
            assert name not in ("uname", "fork", "getuid", "setsid", "killpg", "mkfifo"), (
                f"{where}: {ast.unparse(call)}"
            )
        paths = [
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        found = [p for p in paths if p.startswith(("/proc", "/tmp", "/dev/", "/etc/", "/usr/"))]
        assert not found or any(
            f"Path({p!r})" in ast.unparse(tree) and "is_file" in ast.unparse(tree) for p in found
        ), (
            where,
            found,
        )


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    for i in range(16):
        Image.fromarray(np.full((40, 40, 3), 15 * i, np.uint8)).save(tmp_path / f"{i:02}.png")
    return ImageFolder(tmp_path)


def test_what_a_worker_is_given_can_be_sent_to_it(vl, folder):
    """A worker that is spawned gets its work by pickle; under Linux, where it is forked, nobody
    would notice that it cannot.
    """
    encoder = QueryEncoder.for_model(vl, num_tokens=2)
    batches = [np.array([0, 3]), np.array([5])]
    config = FolderConfig(steps=1, matching_steps=0, batch_size=8, image_size=32)
    said = [[f"shade {i}"] for i in range(len(folder))]
    work = [
        batch_loader(images, batches, to).dataset
        for images in (folder, np.zeros((6, 64, 64, 3), np.uint8))
        for to in (vl.pixels, encoder.pixels)
    ]
    work += [
        SceneBatches(PretrainConfig(image_size=64), 1, 0, 2),
        FolderBatches(folder, said, np.arange(16), config).source(1, 0, 2),
    ]
    for dataset in work:
        sent, own = pickle.loads(pickle.dumps(dataset))[1], dataset[1]
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (sent, own)), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b)), type(dataset)


@pytest.mark.slow
def test_spawned_workers_load_the_same(vl, folder):
    batches = [np.array([0, 3]), np.array([5]), np.array([15, 1])]
    loader = batch_loader(folder, batches, vl.pixels, num_workers=2)
    loader.multiprocessing_context = "spawn"
    for loaded, own in zip(loader, batch_loader(folder, batches, vl.pixels), strict=True):
        assert torch.equal(loaded, own)
