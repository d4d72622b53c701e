"""Long runs: one process works on a state at a time; what is saved when; Ctrl-C and SIGTERM lose
nothing.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import isa_lite
from isa_lite.support.checkpoint import read_tensors, resume_run, save_run, write_tensors
from isa_lite.support.runs import Keeper, Lock

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(isa_lite.__file__).parents[1])}


def other_process(code: str, *given) -> subprocess.Popen:
    """A process that says a line when it is ready, and then waits for its end."""
    command = [sys.executable, "-c", code, *map(str, given)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == "ready"
    return process


HOLD = """
import sys; from pathlib import Path; from isa_lite.support.runs import Lock
with Lock(Path(sys.argv[1])):
    print("ready", flush=True); sys.stdin.read()
"""


def test_a_state_in_use_is_refused_with_its_owner_and_free_when_the_owner_is_killed(tmp_path):
    state = tmp_path / "new" / "run.safetensors"
    process = other_process(HOLD, state)
    with pytest.raises(ValueError, match=rf"run.safetensors.*\b{process.pid}\b"), Keeper(state):
        pass
    process.kill()
    process.wait()
    with Lock(state):  # what it left behind holds nobody up
        assert list(state.parent.iterdir())
    assert not list(state.parent.iterdir())


def test_a_state_is_in_use_within_its_own_process_too_and_free_behind_an_error(tmp_path):
    with pytest.raises(OSError, match="broken"), Lock(tmp_path / "a"), Lock(tmp_path / "b"):
        with pytest.raises(ValueError, match=str(os.getpid())), Lock(tmp_path / "x" / ".." / "a"):
            pass
        raise OSError("broken")
    with Lock(tmp_path / "a"):
        pass
    assert [p.name for p in tmp_path.iterdir()] in ([], ["x"])


@pytest.mark.parametrize("minutes", [-1, float("nan"), "5", None])
def test_minutes_that_cannot_work_are_named(tmp_path, minutes):
    with pytest.raises(ValueError, match="checkpoint_minutes"):
        Keeper(tmp_path / "a", minutes)


@pytest.mark.parametrize(
    "minutes, saved", [(0, [0, 1, 2, 3]), (5, [0, 3]), (1e-9, [0, 1, 2, 3]), (float("inf"), [0, 3])]
)
def test_a_state_is_saved_at_the_start_by_time_and_at_the_end(tmp_path, minutes, saved):
    found = []
    with Keeper(tmp_path / "a", minutes) as keeper:
        keeper.begin(found.append, 0)
        for step in range(3):
            keeper.after(step + 1, last=step == 2)
    assert found == saved


def test_without_a_file_nothing_is_saved_and_signals_stay_as_they_are():
    before, found = signal.getsignal(signal.SIGINT), []
    with Keeper(None, 0) as keeper:
        keeper.begin(found.append, 0)
        assert signal.getsignal(signal.SIGINT) is before
        keeper.after(1, last=True)
    assert not found


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_saves_it_and_stops(tmp_path, number):
    before, found = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), Keeper(tmp_path / "a") as keeper:
        keeper.begin(found.append, 4)
        keeper.after(5)
        os.kill(os.getpid(), number)
        found.append("the rest of the step")
        keeper.after(6)
    assert found == ["the rest of the step", 6] and signal.getsignal(number) is before


@POSIX
def test_a_second_signal_stops_at_once(tmp_path):
    found = []
    with pytest.raises(KeyboardInterrupt), Keeper(tmp_path / "a") as keeper:
        keeper.begin(found.append, 4)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        found.append("more")
    assert not found


@POSIX
def test_signals_are_as_before_behind_an_error(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="broken"), Keeper(tmp_path / "a") as keeper:
        keeper.begin(lambda _: None, 0)
        raise OSError("broken")
    assert signal.getsignal(signal.SIGINT) is before


# --------------------------------------------------------------------------------------------- the
# state


def model(seed: int = 0) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return {"net": net}, torch.optim.AdamW(net.parameters(), lr=0.1)


def train(modules, optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        torch.manual_seed(step)
        optimizer.zero_grad()
        modules["net"](torch.randn(8, 3)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def state(tmp_path) -> Path:
    modules, optimizer = model()
    train(modules, optimizer, 0, 3)
    save_run(
        tmp_path / "s",
        modules,
        optimizer,
        {"identity": {"config": {"lr": 0.1, "seed": 0}}, "step": 3},
    )
    return tmp_path / "s"


SAME = {"config": {"lr": 0.1, "seed": 0}}


def test_a_run_that_was_saved_goes_on_to_the_same_bits(state):
    whole = model()
    train(*whole, 0, 6)
    again = model(seed=9)
    assert resume_run(state, *again, SAME, 6)["step"] == 3
    train(*again, 3, 6)
    for a, b in zip(
        whole[0]["net"].state_dict().values(), again[0]["net"].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_another_run_is_named_by_every_setting_with_both_values(state):
    with pytest.raises(ValueError, match="config.lr: 0.1.*0.2.*images: None.*'abc'"):
        resume_run(state, *model(), {"config": {"lr": 0.2, "seed": 0}, "images": "abc"}, 6)


def test_another_count_of_threads_is_said(state):
    tensors, info = read_tensors(state)
    write_tensors(state, tensors, info | {"threads": info["threads"] + 1})
    with pytest.warns(UserWarning, match="threads"):
        resume_run(state, *model(), SAME, 6)


def spoiled_tensors(tensors: dict, how: str) -> dict:
    moment = "optimizer.net.0.weight.exp_avg"
    return {
        "moment": tensors | {moment: tensors[moment] * float("nan")},
        "weight": tensors | {"net.0.weight": tensors["net.0.weight"] * float("inf")},
        "shape": tensors | {moment: tensors[moment][:1]},
        "lost": {k: v for k, v in tensors.items() if k != "net.1.running_mean"},
        "type": tensors | {"net.0.bias": tensors["net.0.bias"].half()},
        "more": tensors | {"unknown": torch.zeros(1)},
    }[how]


@pytest.mark.parametrize("how", ["moment", "weight", "shape", "lost", "type", "more"])
def test_a_state_with_damaged_tensors_is_named_and_nothing_is_loaded(state, how):
    tensors, info = read_tensors(state)
    write_tensors(state, spoiled_tensors(tensors, how), info)
    modules, optimizer = model(seed=5)
    before = {k: v.clone() for k, v in modules["net"].state_dict().items()}
    with pytest.raises(ValueError, match=state.name):
        resume_run(state, modules, optimizer, SAME, 6)
    assert (
        all(torch.equal(v, before[k]) for k, v in modules["net"].state_dict().items())
        and not optimizer.state
    )


@pytest.mark.parametrize(
    "info",
    [{}, {"identity": []}, {"step": 3}, *({"step": s} for s in (-1, 7, "3", None, True, 2.5))],
)
def test_a_state_with_damaged_info_is_named(state, info):
    tensors, whole = read_tensors(state)
    write_tensors(state, tensors, ({} if info in ({}, {"step": 3}) else whole) | info)
    with pytest.raises(ValueError, match=state.name):
        resume_run(state, *model(), SAME, 6)


# ------------------------------------------------------------------------------------------ a whole
# training


CHILD = """
import sys, time; from pathlib import Path; import numpy as np, torch; sys.path.insert(0, sys.argv[1])
import test_distill as t; from isa_lite.models.vl_model import load_vl_model
torch.set_num_threads(int(sys.argv[4]))
folder, vl = Path(sys.argv[3]), load_vl_model(sys.argv[2])
encoder = t.fresh(vl); pixels = encoder.pixels; print("ready", flush=True)
encoder.pixels = lambda images: time.sleep(0.2) or pixels(images)
t.trained(np.load(folder / "images.npy"), vl, encoder, folder / "cache", folder / "run.safetensors", 100, steps=40)
"""


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_distillation_that_is_stopped_in_its_first_steps_and_taken_up_again_equals_one_that_was_not(
    vl, vl_folder, tmp_path, number
):
    from test_distill import fresh, same, trained

    from isa_lite.world.scenes import render_many, sample_scenes

    images = render_many(sample_scenes(20, 0), range(20), 64)
    np.save(tmp_path / "images.npy", images)
    process = other_process(
        CHILD, Path(__file__).parent, vl_folder, tmp_path, torch.get_num_threads()
    )
    run = tmp_path / "run.safetensors"
    while not run.exists() and process.poll() is None:
        time.sleep(0.05)
    # nobody else may work on it meanwhile
    with pytest.raises(ValueError, match=str(process.pid)), Keeper(run):
        pass
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(timeout=100) != 0
    stopped = read_tensors(run)[1]["step"]
    assert 0 < stopped < 40
    resumed, _ = trained(images, vl, fresh(vl, seed=7), tmp_path / "cache", run, steps=40)
    assert same(resumed, trained(images, vl, steps=40)[0])
