"""Files of a run: written whole or not at all, readable by others, and named when they are
damaged.
"""

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from isa_lite.support import checkpoint
from isa_lite.support.checkpoint import (
    Between,
    misfit,
    read_info,
    read_json,
    read_shard,
    read_tensors,
    write_bytes,
    write_tensors,
    write_text,
)

POSIX = pytest.mark.skipif(os.name == "nt", reason="modes and limits of POSIX")


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(1)}


def test_tensors_and_info_come_back_as_they_were(tmp_path):
    write_tensors(tmp_path / "new" / "t.safetensors", tensors(), {"step": 3, "word": "é"})
    found, info = read_tensors(tmp_path / "new" / "t.safetensors")
    assert all(torch.equal(found[k], v) for k, v in tensors().items()) and info == {
        "step": 3,
        "word": "é",
    }
    assert read_info(tmp_path / "new" / "t.safetensors") == info
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["t.safetensors"]


@POSIX
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "t.safetensors", tensors())
        write_text(tmp_path / "t.txt", "text")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {mode}


def test_a_link_under_any_name_of_a_write_is_not_followed(tmp_path, monkeypatch):
    other = tmp_path / "precious"
    other.write_text("mine")
    monkeypatch.setattr(checkpoint.secrets, "token_hex", lambda _: "guessed")
    for name in ("t.txt.part", checkpoint._PART.format("guessed")):
        try:
            (tmp_path / name).symlink_to(other)
        except OSError:
            pytest.skip("this system makes no links")
    with pytest.raises(FileExistsError, match="t.txt"):
        write_text(tmp_path / "t.txt", "new")
    assert other.read_text() == "mine"


def test_many_writers_of_one_file_never_tear_it(tmp_path):
    path = tmp_path / "t.bin"
    wanted = {bytes([i]) * 100_000 for i in range(8)}
    write_bytes(path, next(iter(wanted)))
    with ThreadPoolExecutor(8) as pool:
        writes = [pool.submit(write_bytes, path, content) for content in wanted for _ in range(5)]
        while not all(w.done() for w in writes):
            assert path.read_bytes() in wanted
        assert not any(w.exception() for w in writes)
    assert [p.name for p in tmp_path.iterdir()] == ["t.bin"]


@POSIX
def test_a_disk_that_is_full_is_an_oserror_that_names_the_file_and_leaves_the_old_one(tmp_path):
    write_tensors(tmp_path / "t.safetensors", tensors())
    before = (tmp_path / "t.safetensors").read_bytes()
    code = (
        "import resource, signal, sys, torch; from pathlib import Path; from isa_lite.support.checkpoint import write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: write_tensors(Path(sys.argv[1]), {'a': torch.zeros(10_000)})\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t.safetensors")],
        capture_output=True,
        text=True,
    )
    assert "t.safetensors" in done.stdout, done.stderr
    assert (tmp_path / "t.safetensors").read_bytes() == before and len(
        list(tmp_path.iterdir())
    ) == 1


def test_what_killed_writers_left_goes_with_the_next_write_but_not_what_is_being_written(tmp_path):
    old, new = (tmp_path / checkpoint._PART.format(name) for name in ("old", "new"))
    old.write_text("half"), new.write_text("half")
    os.utime(old, (0, 0))
    write_text(tmp_path / "t.txt", "text")
    assert not old.exists() and new.exists()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "t.txt", "text")
    assert not list(tmp_path.iterdir())


DEEP = "[" * 200_000
BAD = {
    "text": b"{",
    "bytes": b"\xff\xfe{}",
    "deep": DEEP.encode(),
    "list": b"[]",
    "null": b"null",
    "empty": b"",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_json_that_is_damaged_is_a_valueerror_that_names_the_file(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="settings.json.*the settings of a test"):
        read_json(path, "the settings of a test")


def test_json_is_read_with_and_without_a_mark_and_a_missing_file_is_named(tmp_path):
    path = tmp_path / "settings.json"
    for content in ('{"ü": 1}'.encode(), '{"ü": 1}'.encode("utf-8-sig")):
        path.write_bytes(content)
        assert read_json(path, "settings") == {"ü": 1}
    write_text(path, json.dumps([1]))
    assert read_json(path, "numbers", list) == [1]
    with pytest.raises(FileNotFoundError, match="other.json"):
        read_json(tmp_path / "other.json", "settings")
    with pytest.raises(ValueError, match=tmp_path.name):
        read_json(tmp_path, "settings")


SHAPE = {
    "seed": int,
    "shares": {str: Between(0, 100)},
    "pair": (float, float),
    "names": [str],
    "rows": [int, ...],
    "more": object,
}
GOOD = {
    "seed": 1,
    "shares": {"a": 0, "b": 99.5},
    "pair": [1, 2.5],
    "names": [],
    "rows": [1, 2],
    "more": None,
    "unknown": "x",
}
MISFITS = {
    "seed": [None, 1.5, True, "1", 10**30, float("nan"), [1]],
    "shares": [[], None, {"a": -1}, {"a": float("nan")}, {"a": "1"}, {"a": 100.1}],
    "pair": [[1], [1, 2, 3], [1, None], {"0": 1}, [1, float("inf")]],
    "names": ["x", [1], {}],
    "rows": [[], ["x"], [1, 2, None]],
}


def test_json_of_a_shape_is_read_as_it_is(tmp_path):
    write_text(tmp_path / "a.json", json.dumps(GOOD))
    assert read_json(tmp_path / "a.json", "a record", SHAPE) == GOOD


BAD = [(key, GOOD | {key: value}) for key, values in MISFITS.items() for value in values]
BAD += [(key, {k: v for k, v in GOOD.items() if k != key}) for key in SHAPE]


@pytest.mark.parametrize("key, record", BAD)
def test_json_of_another_shape_or_without_a_key_names_the_file_and_the_key(tmp_path, key, record):
    write_text(tmp_path / "a.json", json.dumps(record))
    with pytest.raises(ValueError, match=f"a.json.*{key}"):
        read_json(tmp_path / "a.json", "a record", SHAPE)


def test_a_key_that_is_there_twice_is_named(tmp_path):
    write_text(tmp_path / "a.json", '{"a": {"seed": 1, "seed": 2}}')
    with pytest.raises(ValueError, match="a.json.*seed"):
        read_json(tmp_path / "a.json", "a record")


def damaged(whole: bytes) -> dict[str, bytes]:
    text = json.dumps({"__metadata__": {"info": "{"}}).encode()
    listed = json.dumps({"__metadata__": {"info": "[]"}}).encode()
    deep = json.dumps({"__metadata__": {"info": DEEP}}).encode()
    headers = {
        name: len(h).to_bytes(8, "little") + h
        for name, h in (("info", text), ("list", listed), ("deep", deep))
    }
    return {
        "empty": b"",
        "short": b"abc",
        "cut": whole[:-5],
        "header": whole[:20],
        "other": b"\x89PNG" * 50,
        **headers,
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_tensors_that_are_damaged_are_a_valueerror_that_names_the_file(tmp_path, kind):
    path = tmp_path / "state.safetensors"
    write_tensors(path, tensors(), {"step": 1})
    path.write_bytes(damaged(path.read_bytes())[kind])
    for read in (read_info, read_tensors):
        with pytest.raises(ValueError, match="state.safetensors"):
            read(path)
    assert read_shard(path) is None


def test_tensors_of_no_file_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=tmp_path.name):
        read_tensors(tmp_path)
    assert read_shard(tmp_path / "none.safetensors") is None


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs a list of mapped files")
def test_no_file_stays_mapped_after_it_was_read(tmp_path):
    write_tensors(tmp_path / "mapped.safetensors", {"a": torch.zeros(10_000)})
    found, _ = read_tensors(tmp_path / "mapped.safetensors")
    with open("/proc/self/maps") as maps:
        assert found and "mapped.safetensors" not in maps.read()


@pytest.mark.parametrize("found, fits", [(2**62, True), (2**63, False), (-(10**40), False)])
def test_a_whole_number_that_no_array_holds_is_no_number(found, fits):
    assert (not misfit(found, float)) == fits
    assert not misfit(1e40, float)  # one with a point is
