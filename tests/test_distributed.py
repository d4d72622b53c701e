"""Several processes make the run of one: the same losses, the same targets, the same query encoder,
and files written once.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import isa_lite
from isa_lite import distill
from isa_lite.commands import main
from isa_lite.models.vl_model import load_vl_model
from isa_lite.query_encoder import QueryEncoder
from isa_lite.support import distributed
from isa_lite.world.scenes import render_many, sample_scenes

# No batch normalisation in this backbone, and LAR on all images: these would be the differences.
SETTINGS = "--backbone test_convnext --num-tokens 3 --width 32 --depth 1 --steps 4 --warmup 2 --batch-size 8 --validation 4"
SETTINGS += " --validate-every 2 --dtype float32 --lar-weight 0.5 --lar-share 1"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(render_many(sample_scenes(21, 0), range(21), 64)):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02}.png")
    return tmp_path


def arguments(folder: Path, vl: Path, out: str) -> list[str]:
    return [
        "--images",
        str(folder / "images"),
        "--out",
        str(folder / out),
        "--vl-model",
        str(vl),
        *SETTINGS.split(),
    ]


def torchrun(processes: int, *given: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(Path(isa_lite.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*command, "-m", "isa_lite", "distill", *given],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("matching", [True, False])
def test_two_processes_make_the_run_of_one(folder, vl_folder, matching, capsys):
    vl_folder = Path(shutil.copytree(vl_folder, folder / "vl"))
    if not matching:  # LAR is late interaction then
        for file in vl_folder.glob("matching*"):
            file.unlink()
    main(["distill", *arguments(folder, vl_folder, "one")])
    said = capsys.readouterr().out
    ran = torchrun(2, *arguments(folder, vl_folder, "two"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.replace("/two:", "/one:") == said and said.count("own image found in") == 1

    one, two = (json.loads((folder / name / "history.json").read_text()) for name in ("one", "two"))
    for term in ("gcd", "lar", "matched"):
        assert np.allclose(one[term], two[term], atol=1e-4), (term, one, two)
    assert bool(one["matched"]) == matching and "NaN" not in json.dumps(one)
    assert one["recall"] == two["recall"] and len(one["gcd"]) == 4
    for name in ("embeddings", "patches"):
        a, b = (np.load(next((folder / out).rglob(f"*.{name}.npy"))) for out in ("one", "two"))
        assert np.allclose(a, b, atol=1e-3)
    assert not list(folder.rglob("*.part*"))

    vl = load_vl_model(str(vl_folder))
    images = render_many(sample_scenes(6, 1), range(6), 64)
    a, b = (
        QueryEncoder.load(folder / name, vl).sentences(images).tokens for name in ("one", "two")
    )
    before = (
        QueryEncoder.for_model(vl, backbone="test_convnext", num_tokens=3, width=32, depth=1)
        .sentences(images)
        .tokens
    )
    assert (a - b).abs().max() < 0.02 * (a - before).abs().max()
    info = json.loads((folder / "two" / "query_encoder.json").read_text())["info"]
    assert info["processes"] == 2 and info["images"] == 21 and info["config"]["batch_size"] == 8


def test_what_several_processes_cannot_share_is_refused(vl, monkeypatch):
    images, encoder = (
        render_many(sample_scenes(20, 0), range(20), 64),
        QueryEncoder.for_model(vl, num_tokens=2),
    )
    config = distill.DistillConfig(steps=1, batch_size=8, validation=4)
    monkeypatch.setattr(distributed, "count", lambda: 3)
    with pytest.raises(ValueError, match="batch_size 8.*multiple of 3"):
        distill.distill(images, vl, encoder, config, progress=False)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(ValueError, match="give a cache folder"):
        distill.distill(images, vl, encoder, config, progress=False)
    config = distill.DistillConfig(steps=1, batch_size=32, validation=5)
    with pytest.raises(ValueError, match="batch_size 32.*15 images.*multiple of 2"):
        distill.distill(images, vl, encoder, config, progress=False)


def test_processes_that_see_other_files_stop_and_do_not_wait_for_each_other(
    vl, monkeypatch, tmp_path
):
    images, encoder = (
        render_many(sample_scenes(20, 0), range(20), 64),
        QueryEncoder.for_model(vl, num_tokens=2),
    )
    config = distill.DistillConfig(steps=2, batch_size=8, validation=4)
    distill.distill(images, vl, encoder, config, tmp_path, tmp_path / "state", progress=False)

    def gather(values, value):  # another process has neither images nor states
        values[:] = [value, strange.get(type(value), value)]

    monkeypatch.setattr(distributed.distributed, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "told", lambda value: value)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    strange = {tuple: ("0123", False)}
    with pytest.raises(ValueError, match="2 processes differ.*targets"):
        distill.distill(images, vl, encoder, config, tmp_path, tmp_path / "state", progress=False)
    strange = {int: 0}
    with pytest.raises(ValueError, match=r"step.*state.*\[2, 0\]"):
        distill.distill(images, vl, encoder, config, tmp_path, tmp_path / "state", progress=False)


def test_a_process_without_a_gpu_is_told_and_one_that_fails_does_not_wait_for_the_others(
    monkeypatch,
):
    said = []
    monkeypatch.setattr(
        distributed.distributed, "init_process_group", lambda _: said.append("joined")
    )
    monkeypatch.setattr(
        distributed.distributed, "destroy_process_group", lambda: said.append("left")
    )
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1.*GPU"), distributed.joined("cuda"):
        pass
    with pytest.raises(ValueError, match="'cuda:0'.*device cuda"), distributed.joined("cuda:0"):
        pass
    with pytest.raises(OSError, match="broken"), distributed.joined("cpu"):
        raise OSError("broken")
    assert said == ["joined"]
    with distributed.joined("cpu"):
        pass
    assert said == ["joined", "joined", "left"]


def test_bad_input_on_the_command_line_is_an_error_in_words(folder, capsys):
    for change, message in {
        ("--images", "nowhere"): "nowhere",
        ("--vl-model", "ViT-B-23"): "ViT-B-32",
        ("--backbone", "mobilnet"): "mobilenet",
        ("--device", "cuda:99"): "device 'cuda:99' cannot be used",
        ("--temperature", "-1"): "temperature must be a number above 0, not -1.0",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main(["distill", *arguments(folder, Path("scenes-clip"), "out"), *change])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and message in said
    assert not (folder / "out").exists()
