"""The folder of a run: what may be begun or resumed in it, and checkpoints that survive being killed."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import AdaBelief
from torch import nn

from nats_zoo import NatsError
from nats_zoo.detection import TrainConfig
from nats_zoo.detection.runs.folder import (
    FREE_OPTIONS,
    Checkpoint,
    RunError,
    RunFolder,
    pack_optimizer,
    read_checkpoint,
    unpack_optimizer,
)


def logged(folder):
    return [json.loads(line) for line in folder.log_path.read_text().splitlines()]


CONFIG = {"lr": 0.1, "sizes": (32, 64), "weights": None, "workers": 2}


def begun(path: Path, config: dict = CONFIG) -> RunFolder:
    folder = RunFolder(path, config, resume=False)
    folder.begin()
    return folder


def checkpoint(step: int, elements: int = 4) -> Checkpoint:
    """Every number in it says the step."""
    tensors = {"model": {"a.b": torch.full((elements,), float(step)), "n": torch.tensor(step)}, "optimizer": {}}
    return Checkpoint(step, tensors, {"best_ap": step / 3, "nothing": None})


def check_is_of_step(found: Checkpoint, step: int, elements: int = 4) -> None:
    expected = checkpoint(step, elements)
    assert (found.step, found.state) == (step, expected.state)
    assert found.tensors["optimizer"] == {}
    assert found.tensors["model"].keys() == expected.tensors["model"].keys()
    for name, tensor in expected.tensors["model"].items():
        assert torch.equal(found.tensors["model"][name], tensor)


# --- begin and resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_an_absent_or_empty_folder_is_begun(tmp_path, resume, exists):
    path = tmp_path / "runs" / "one"
    if exists:
        path.mkdir(parents=True)
    folder = RunFolder(path, CONFIG, resume)
    assert path.exists() == exists, "nothing is written before the run begins"
    folder.begin()
    assert json.loads((path / "run.json").read_text()) == {**CONFIG, "sizes": [32, 64]}
    assert folder.latest_checkpoint() is None


def test_a_folder_with_a_run_is_only_resumed(tmp_path):
    begun(tmp_path)
    with pytest.raises(RunError, match="already holds a run; add --resume true"):
        RunFolder(tmp_path, CONFIG, resume=False)
    RunFolder(tmp_path, CONFIG, resume=True).begin()


def test_processes_that_come_later_find_the_same_as_the_first(tmp_path):
    """Each looks into the folder before any of them begins."""
    folders = [RunFolder(tmp_path / "run", CONFIG, resume=False, writer=rank == 0) for rank in (0, 1)]
    for folder in folders:
        folder.begin()
        folder.log({"step": 1})
        folder.save_checkpoint(checkpoint(1))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1
    check_is_of_step(folders[1].latest_checkpoint(), 1)


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG, resume=False, writer=False)
    folder.begin()
    folder.log({"step": 1})
    folder.rewind_log(0)
    folder.save_checkpoint(checkpoint(1))
    assert not list(tmp_path.iterdir())


def test_what_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunError, match="not a run's folder"):
            RunFolder(tmp_path, CONFIG, resume)
        with pytest.raises(RunError, match="expected a folder, found a file"):
            RunFolder(tmp_path / "thesis.tex", CONFIG, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("key", "value"), [("lr", 0.2), ("sizes", [32, 65]), ("weights", "folder"), ("new", 1)])
def test_a_changed_option_is_named(tmp_path, key, value):
    begun(tmp_path)
    with pytest.raises(RunError) as error:
        RunFolder(tmp_path, {**CONFIG, key: value}, resume=True)
    before = json.loads(json.dumps(CONFIG.get(key)))
    assert str(error.value) == (
        f"{tmp_path / 'run.json'}: the run was begun with {key}={before!r} and can not go on with {value!r}"
    )


def test_options_that_do_not_change_the_result_may_change(tmp_path):
    begun(tmp_path)
    RunFolder(tmp_path, {**CONFIG, **dict.fromkeys(FREE_OPTIONS, "other")}, resume=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000])
def test_damaged_options_are_one_line(tmp_path, content):
    begun(tmp_path)
    (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=r"run\.json: ") as error:
        RunFolder(tmp_path, CONFIG, resume=True)
    assert "\n" not in str(error.value)


# --- log --------------------------------------------------------------------------------------------------------------


def test_the_log_is_rewound_to_the_checkpoint(tmp_path):
    folder = begun(tmp_path)
    records = [{"step": step, "loss": step / 7} for step in (10, 20, 20, 30)]
    for record in records:
        folder.log(record)
    with folder.log_path.open("a") as file:
        file.write('{"step": 3')  # killed while it wrote
    folder.rewind_log(20)
    assert logged(folder) == records[:3]
    folder.log(records[3])
    assert logged(folder) == records
    folder.rewind_log(0)
    assert logged(folder) == []


def test_a_run_without_a_log_has_nothing_to_rewind(tmp_path):
    folder = begun(tmp_path)
    folder.rewind_log(10)
    assert not folder.log_path.exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag, as TensorBoard shows them."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def begin_logging(path, resume, step=0, writer=True) -> RunFolder:
    folder = RunFolder(path, {"lr": 0.1}, resume, writer, tensorboard=True)
    folder.begin()
    folder.rewind_log(step)
    return folder


def test_tensorboard_shows_the_numbers_of_the_log(tmp_path):
    folder = begin_logging(tmp_path / "run", resume=False)
    folder.log({"step": 10, "epoch": 0.5, "loss": 2.5, "lr": 0.25})
    folder.log({"step": 20, "epoch": 1.0, "AP": None, "alpha": {"conv": [[0.5]]}, "accepted": True, "changes": 3})
    assert events(tmp_path / "run") == {"loss": [(10, 2.5)], "lr": [(10, 0.25)], "changes": [(20, 3)]}
    folder.close()


def test_a_resumed_run_goes_on_in_tensorboard_and_shows_no_step_twice(tmp_path):
    path = tmp_path / "run"
    folder = begin_logging(path, resume=False)
    for step in (10, 20, 30):
        folder.log({"step": step, "epoch": step / 20, "loss": float(step)})
    folder.close()  # killed here, behind the checkpoint of step 20
    folder = begin_logging(path, resume=True, step=20)
    for step in (30, 40):
        folder.log({"step": step, "epoch": step / 20, "loss": step + 0.5})
    folder.close()
    assert events(path)["loss"] == [(10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5)]
    assert [record["loss"] for record in logged(folder)] == [10.0, 20.0, 30.5, 40.5]


def test_tensorboard_is_written_by_one_process_and_on_request_only(tmp_path):
    begin_logging(tmp_path / "run", resume=False, writer=False).log({"step": 1, "epoch": 1, "loss": 1.0})
    assert not (tmp_path / "run").exists()
    folder = RunFolder(tmp_path / "run", {"lr": 0.1}, resume=False)
    folder.begin()
    folder.rewind_log(0)
    folder.log({"step": 1, "epoch": 1, "loss": 1.0})
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_tensorboard_a_run_that_asks_for_it_is_refused(tmp_path, monkeypatch):
    options = {"data": "data", "output": str(tmp_path / "run")}
    TrainConfig(**options, tensorboard=True)
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(NatsError, match=r"^tensorboard: needs the package .*nats-zoo\[tracking\]") as error:
        TrainConfig(**options, tensorboard=True)
    assert "\n" not in str(error.value)
    TrainConfig(**options)


@pytest.mark.parametrize("steps", [(1, 2), (9, 10), (999_999, 1_000_000), (2_000_000, 10_000_000)])
def test_the_newest_checkpoint_alone_is_kept(tmp_path, steps):
    folder = begun(tmp_path)
    for step in steps:
        folder.save_checkpoint(checkpoint(step))
        check_is_of_step(folder.latest_checkpoint(), step)
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_of_several_checkpoints_the_newest_counts(tmp_path):
    begun(tmp_path / "a").save_checkpoint(checkpoint(999_999))
    begun(tmp_path / "b").save_checkpoint(checkpoint(1_000_000))
    for source in (tmp_path / "a" / "checkpoints").iterdir():
        source.rename(tmp_path / "b" / "checkpoints" / source.name)
    (tmp_path / "b" / "checkpoints" / "step_2000000_kept_by_hand").mkdir()
    check_is_of_step(RunFolder(tmp_path / "b", CONFIG, resume=True).latest_checkpoint(), 1_000_000)


def test_nothing_in_the_folder_is_pickled(tmp_path):
    folder = begun(tmp_path)
    folder.log({"step": 1})
    folder.save_checkpoint(checkpoint(1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            json.loads(path.read_text())


@pytest.fixture
def saved(tmp_path) -> RunFolder:
    folder = begun(tmp_path)
    folder.save_checkpoint(checkpoint(7))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {
    "no state": (lambda f: (f / "state.json").unlink(), r"state\.json: can not be read"),
    "cut state": (lambda f: cut(f / "state.json"), r"state\.json: not JSON"),
    "state is a list": (lambda f: (f / "state.json").write_text("[]"), r"state\.json: expected an object"),
    "no step": (lambda f: (f / "state.json").write_text("{}"), "an integer 'step'"),
    "step is text": (lambda f: (f / "state.json").write_text('{"step": "7"}'), "an integer 'step'"),
    "cut tensors": (lambda f: cut(f / "model.safetensors"), "damaged checkpoint"),
    "empty tensors": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged checkpoint"),
    "a pickle": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04\x95" * 9), "damaged checkpoint"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_that_names_it(saved, kind):
    spoil, words = DAMAGES[kind]
    spoil(saved.path / "checkpoints" / "step_000007")
    with pytest.raises(RunError, match=words) as error:
        saved.latest_checkpoint()
    assert "step_000007" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_older_checkpoint(saved, failure):
    class Unwritable(dict):
        def items(self):
            raise failure

    with pytest.raises(failure):
        saved.save_checkpoint(Checkpoint(8, {"model": checkpoint(8).tensors["model"], "rest": Unwritable()}, {}))
    check_is_of_step(saved.latest_checkpoint(), 7)
    assert [path.name for path in (saved.path / "checkpoints").iterdir()] == ["step_000007"]


def save_until_killed(folder: RunFolder, elements: int) -> None:
    try:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        for step in range(8, 10_000):
            folder.save_checkpoint(checkpoint(step, elements))
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("milliseconds", [1, 5, 20, 45, 80])
def test_a_process_killed_while_it_writes_leaves_a_whole_checkpoint(saved, milliseconds):
    elements = 2_000_000
    child = os.fork()
    if child == 0:
        save_until_killed(saved, elements)
    while (saved.path / "checkpoints" / "step_000007").exists():
        time.sleep(0.001)
    time.sleep(milliseconds / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    resumed = RunFolder(saved.path, CONFIG, resume=True)
    found = resumed.latest_checkpoint()
    check_is_of_step(found, found.step, elements)
    resumed.begin()
    resumed.save_checkpoint(checkpoint(found.step + 1))
    check_is_of_step(resumed.latest_checkpoint(), found.step + 1)
    assert len(list((saved.path / "checkpoints").iterdir())) == 1, "nothing half-written stays"


# --- optimisers -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-5),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.8), amsgrad=True),
    "AdaBelief": lambda p: AdaBelief(p, lr=0.01),  # it counts its steps in plain numbers
    "two groups": lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.3}, {"params": p[1:]}], lr=0.1, momentum=0.5),
}


def create(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, OPTIMIZERS[kind](list(model.parameters()))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)  # a schedule's work is part of the state
        model(torch.full((5, 3), number / 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("done", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_optimizer_steps_as_the_saved_one(tmp_path, kind, done):
    model, optimizer = create(kind)
    steps(model, optimizer, range(done))
    tensors, data = pack_optimizer(optimizer)
    folder = begun(tmp_path)
    folder.save_checkpoint(Checkpoint(done, {"optimizer": tensors, "model": model.state_dict()}, {"optimizer": data}))

    again, other = create(kind)
    steps(again, other, range(5, 7))
    found = read_checkpoint(tmp_path / "checkpoints" / f"step_{done:06d}")
    again.load_state_dict(found.tensors["model"])
    unpack_optimizer(other, found.tensors["optimizer"], found.state["optimizer"])
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]

    for pair in ((model, optimizer), (again, other)):
        steps(*pair, range(done, done + 3))
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_restored_momentum_has_its_parameter_s_memory_format():
    parameter = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    one, other = (torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for _ in range(2))
    parameter.square().sum().backward()
    one.step()
    tensors, data = pack_optimizer(one)
    unpack_optimizer(other, {name: tensor.contiguous() for name, tensor in tensors.items()}, data)
    (found,), (wanted,) = (list(optimizer.state[parameter].values()) for optimizer in (other, one))
    assert torch.equal(found, wanted)
    assert found.stride() == parameter.stride() == wanted.stride()


def test_the_state_of_another_optimizer_is_refused():
    tensors, data = pack_optimizer(create("two groups")[1])
    with pytest.raises(ValueError, match="parameter group"):
        unpack_optimizer(create("SGD")[1], tensors, data)


@settings(max_examples=30, deadline=None)
@given(numbers=st.dictionaries(st.text(), st.floats(allow_nan=False) | st.integers() | st.none() | st.text()))
def test_plain_data_comes_back_exactly(tmp_path_factory, numbers):
    folder = begun(tmp_path_factory.mktemp("run"))
    numbers.pop("step", None)
    folder.save_checkpoint(Checkpoint(3, {}, numbers))
    assert folder.latest_checkpoint() == Checkpoint(3, {}, numbers)
