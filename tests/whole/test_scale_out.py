"""Accumulated gradients, several processes, and what becomes of a run when one of its processes dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import save_for_hf

from nats_zoo import NatsError
from nats_zoo.detection import TrainConfig, Trainer
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.runs.folder import RunError
from nats_zoo.detection.runs.loop import Interrupted
from tests.support.mean_loop import MeanLoop

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCRIPT = Path(__file__).parents[1] / "support" / "mean_loop.py"
IMAGES = 7


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, randomise_bn) -> SimpleNamespace:
    """Drawn images, an odd number of them, and a small ResNet's weights."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    save_for_hf(randomise_bn(model, torch.Generator().manual_seed(1)), root / "weights", safe_serialization=True)
    data = draw_dataset(root / "data", train=IMAGES, val=3, test=1, size=64, distance=8)
    return SimpleNamespace(data=str(data), weights=str(root / "weights"))


def run_options(inputs: SimpleNamespace, output: Path, **changes) -> dict:
    """What training and search share."""
    return {
        "data": inputs.data,
        "output": str(output),
        "weights": inputs.weights,
        "backbone": "test_resnet",
        "fpn_channels": 16,
        "head_size": 16,
        "roi_samples": 32,
        "calibration_images": 4,
        "min_size": 64,
        "anchor_sizes": [8, 16, 32, 64, 128],
        "batch_size": 1,
        "workers": 0,
        **changes,
    }


def train_options(inputs: SimpleNamespace, output: Path, **changes) -> dict:
    rest = {"epochs": 2, "eval_every": 2, "lr_per_image": 0.002, "warmup_steps": 3, "lr_steps": [1], "accumulate": 2}
    return run_options(inputs, output, **{**rest, **changes})


def check_same_files(output: Path, expected: Path) -> None:
    """Bit for bit the same log, weights, best weights and optimiser."""
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*.safetensors"))
    assert names == sorted(str(path.relative_to(output)) for path in output.rglob("*.safetensors"))
    assert (output / "log.jsonl").read_bytes() == (expected / "log.jsonl").read_bytes()
    for name in names:
        found, wanted = load_file(output / name), load_file(expected / name)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


# --- accumulation, one process ----------------------------------------------------------------------------------------


def mean_loop(inputs, output, **options) -> MeanLoop:
    loop = MeanLoop(Accelerator(), str(output), inputs.data, options)
    loop.run()
    return loop


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accumulated_batches_have_the_gradient_of_one_large_batch(inputs, tmp_path, batch_size):
    """Also in the last step of an epoch, of three images: two batches of which the second is smaller."""
    whole = mean_loop(inputs, tmp_path / "whole", batch_size=4)
    parts = mean_loop(inputs, tmp_path / "parts", batch_size=batch_size, accumulate=4 // batch_size)
    assert parts.total_steps == whole.total_steps == len(parts.losses) == 4
    assert parts.images_per_step == whole.images_per_step == 4
    sizes = [[len(batch) for batch in step] for step in parts.images]
    assert sizes == 2 * {1: [[1, 1, 1, 1], [1, 1, 1]], 2: [[2, 2], [2, 1]]}[batch_size]
    flat = [[[number for batch in step for number in batch] for step in loop.images] for loop in (parts, whole)]
    assert flat[0] == flat[1]
    for found, wanted in zip(parts.losses, whole.losses, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
        assert found["loss"] == pytest.approx(found["one"] + found["two"], rel=1e-5)
    for found, wanted in zip(parts.detector.parameters(), whole.detector.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
        assert not torch.equal(found, torch.zeros_like(found))


def test_what_is_added_to_the_loss_counts_once_per_step_and_is_not_reported(inputs, tmp_path):
    gradients, records = [], []
    for accumulate in (1, 3):
        loop = MeanLoop(Accelerator(), str(tmp_path / "run"), inputs.data, {"accumulate": accumulate})
        batches = list(loop.loaders[0].batches(0, 0))[:3]
        parameter = torch.nn.Parameter(torch.tensor(2.0))
        records.append(loop.backward(batches, lambda p=parameter: p.square()))
        gradients.append(parameter.grad.item())
    assert gradients == pytest.approx([4.0, 4.0])
    assert records[0].keys() == {"loss", "one", "two"}
    assert records[0]["loss"] == pytest.approx(records[0]["one"] + records[0]["two"])


class StoppedTrainer(Trainer):
    """Gets SIGTERM in the middle of its first epoch."""

    def train_step(self, *batches):
        if self.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(*batches)


def test_a_run_with_accumulation_resumes_in_the_middle_of_an_epoch(inputs, tmp_path):
    options = {"accumulate": 3, "val_split": None, "checkpoint_every": 1, "tensorboard": True}
    whole = Trainer(TrainConfig(**train_options(inputs, tmp_path / "whole", **options)))
    assert (whole.steps_per_epoch, whole.images_per_step) == (3, 3)
    whole.run()
    stopped = train_options(inputs, tmp_path / "stopped", **options)
    with pytest.raises(Interrupted, match="stopped at step 1 of 6"):
        StoppedTrainer(TrainConfig(**stopped)).run()
    Trainer(TrainConfig(**stopped, resume=True)).run()
    check_same_files(tmp_path / "stopped", tmp_path / "whole")
    _, record = (json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines())
    for name in ("stopped", "whole"):
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == [(6, pytest.approx(record["loss"]))]


def test_the_learning_rate_counts_the_images_of_all_accumulated_batches(inputs, tmp_path):
    options = train_options(inputs, tmp_path / "run", batch_size=2, accumulate=3, warmup_steps=0, lr_per_image=1e-3)
    assert Trainer(TrainConfig(**options))._lr() == pytest.approx(6e-3)
    with pytest.raises(NatsError, match="accumulate: expected 1 or more, found 0"):
        TrainConfig(**{**options, "accumulate": 0})


# --- what is not finite -----------------------------------------------------------------------------------------------


class BrokenLoop(MeanLoop):
    """From its fourth step on, the second of three batches has a loss or a gradient that is not finite."""

    kind = "loss"

    def train_step(self, batches):
        if self.step == 3:
            self.plain_detector.register_forward_hook(self._spoil)
        return super().train_step(batches)

    def _spoil(self, module, inputs, losses):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls != 2:
            return losses
        if self.kind == "loss":
            return {**losses, "two": losses["two"] * float("inf")}
        return {**losses, "two": losses["two"] + (losses["one"] * 0).sqrt()}  # 0, of infinite slope


@pytest.mark.parametrize(("kind", "what"), [("loss", "two is inf"), ("gradient", "the gradient's norm is nan")])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_weights(inputs, tmp_path, kind, what, clip_grad):
    options = {"accumulate": 3, "epochs": 2, "clip_grad": clip_grad}
    loop = BrokenLoop(Accelerator(), str(tmp_path / "run"), inputs.data, options)
    loop.kind, loop.checkpoint_every = kind, 1
    where = f"{what} at step 3, in epoch 2 of 2; the last checkpoint is kept"
    with pytest.raises(RunError, match=re.escape(where)) as error:
        loop.run()
    assert "\n" not in str(error.value)
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step_000003" / "model.safetensors")
    for name, tensor in loop.plain_detector.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, checkpoint[name])


def test_a_step_that_the_fp16_scaler_leaves_out_is_no_error(inputs, tmp_path):
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop = BrokenLoop(accelerator, str(tmp_path / "run"), inputs.data, {"accumulate": 3, "epochs": 2})
    loop.kind, loop.checkpoint_every = "gradient", 1
    loop.run()
    assert loop.step == loop.total_steps
    assert accelerator.scaler.get_scale() == 512, "left out once"
    assert all(tensor.isfinite().all() for tensor in loop.plain_detector.state_dict().values())


class HopelessLoop(BrokenLoop):
    """All gradients from its fourth step on."""

    def _spoil(self, module, inputs, losses):
        return {**losses, "two": losses["two"] + (losses["one"] * 0).sqrt()}


def test_a_gradient_that_is_not_finite_at_any_scale_is_one(inputs, tmp_path):
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-8)
    loop = HopelessLoop(accelerator, str(tmp_path / "run"), inputs.data, {"epochs": 2})
    with pytest.raises(RunError, match="the gradient's norm is nan at step 6, in epoch 1 of 2"):  # scale 2**-11
        loop.run()
    assert all(tensor.isfinite().all() for tensor in loop.plain_detector.state_dict().values())


# --- two processes ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


class Launched:
    """Two processes under torch.distributed.run, each with a log of its own."""

    def __init__(self, logs: Path, *arguments: str):
        self.logs = logs
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        self.process = subprocess.Popen(
            [*launcher, "--redirects", "3", "--log-dir", str(logs), *arguments],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self.errors()
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.005)

    def end(self) -> int:
        self.said, _ = self.process.communicate(timeout=300)
        return self.process.returncode

    def errors(self) -> dict[int, str]:
        """What each process wrote on stderr."""
        return {int(path.parent.name): path.read_text() for path in self.logs.rglob("stderr.log")}

    def process_of(self, rank: int) -> int:
        """Process id of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (found,) = (pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())
        return int(found)

    def exit_codes(self) -> dict[int, int]:
        """As the launcher reports them of the processes that failed."""
        found = re.findall(r"rank\s*: (\d+) .*\n\s*exitcode\s*: (-?\d+)", self.said)
        return {int(rank): int(code) for rank, code in found}


linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")


def own_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("nats:")]


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory) -> SimpleNamespace:
    """A training run of two processes, the second of which was killed in the middle."""
    root = tmp_path_factory.mktemp("killed")
    options = train_options(inputs, root / "run", epochs=6, checkpoint_every=1)
    (root / "recipe.yaml").write_text(json.dumps(options))  # JSON is YAML
    with Launched(root / "logs", "-m", "nats_zoo", "train", "--config", str(root / "recipe.yaml")) as launched:
        launched.wait_for(lambda: bool(list((root / "run" / "checkpoints").glob("step_*"))))
        os.kill(launched.process_of(1), signal.SIGKILL)
        code = launched.end()
    return SimpleNamespace(
        options=options, output=root / "run", code=code, errors=launched.errors(), codes=launched.exit_codes()
    )


@pytest.fixture(scope="module")
def together(inputs, killed, tmp_path_factory) -> SimpleNamespace:
    """Runs of two processes, one after the other: among them the killed one's rest, and the same uninterrupted."""
    root = tmp_path_factory.mktemp("together")
    search = {"space": "A", "groups": 4, "epochs": 2, "alpha_start": 0, "accumulate": 2, "level": "bilevel"}
    jobs = [
        ["mean_run", [str(root / "mean"), inputs.data, {"batch_size": 2, "accumulate": 2}]],
        ["train_run", [{**killed.options, "resume": True}]],
        ["train_run", [{**killed.options, "output": str(root / "whole")}]],
        ["search_run", [run_options(inputs, root / "search", **search)]],
        ["search_run", [run_options(inputs, root / "again", **search)]],
    ]
    steps_left = len(list(killed.output.glob("checkpoints/step_*"))), (killed.output / "model").exists()
    with Launched(root / "logs", str(SCRIPT), json.dumps(jobs)) as launched:
        assert launched.end() == 0, launched.errors()
    return SimpleNamespace(root=root, before=steps_left)


@linux
def test_when_a_process_is_killed_the_others_say_so_and_end(killed):
    assert killed.code != 0
    assert killed.codes[1] == -signal.SIGKILL
    assert killed.codes.get(0, 2) == 2  # some launchers report the first one only
    assert "Traceback" not in killed.errors[0]
    (line,) = own_lines(killed.errors[0])
    (checkpoint,) = killed.output.glob("checkpoints/step_*")
    step = int(checkpoint.name.removeprefix("step_"))
    assert line == (
        "nats: another process of the run ended, or no longer answers;"
        f" the last checkpoint is step {step} in {killed.output}; continue with --resume true"
    )


@linux
def test_a_run_whose_process_was_killed_resumes_to_the_end_of_an_uninterrupted_one(killed, together):
    assert together.before == (1, False), "it was killed in the middle"
    check_same_files(killed.output, together.root / "whole")


@linux
def test_two_processes_with_accumulation_compute_one_large_step(inputs, together, tmp_path):
    """7 images: the last batch is short and filled up with images of the first, alike on both processes."""
    found = [json.loads((together.root / f"mean.{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["exchanges"] == found[1]["exchanges"] == len(found[0]["losses"]) == 2

    by_hand = MeanLoop(Accelerator(), str(tmp_path / "run"), inputs.data, {})
    data = by_hand.loaders[0].dataset
    places = {number: index for index, number in enumerate(data.image_ids)}
    for step in range(2):
        numbers = [number for rank in found for batch in rank["images"][step] for number in batch]
        assert len(numbers) == 8
        assert set(numbers) == set(data.image_ids)
        images, targets = zip(*(data[places[number]] for number in numbers), strict=True)
        sum(by_hand.detector(images, targets).values()).backward()
        by_hand.optimizer.step()
        by_hand.optimizer.zero_grad()
    for rank in (0, 1):
        weights = load_file(together.root / f"mean.{rank}.safetensors")
        for name, tensor in by_hand.plain_detector.state_dict().items():
            torch.testing.assert_close(weights[name], tensor)


@linux
def test_a_search_of_two_processes_repeats_itself(together):
    genotypes = [json.loads((together.root / run / "genotype.json").read_text()) for run in ("search", "again")]
    assert genotypes[0]["convs"] == genotypes[1]["convs"]
    assert genotypes[0]["provenance"]["images_per_step"] == 4
    check_same_files(together.root / "search", together.root / "again")
    records = [json.loads(line) for line in (together.root / "search" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "alpha" in record] == [1, 2]  # halves of 3 and 4 images


def silent(inputs, root: Path, group_timeout: float | None) -> Launched:
    jobs = [["silent_run", [str(root / "run"), inputs.data, group_timeout, 1.0]]]
    return Launched(root / "logs", str(SCRIPT), json.dumps(jobs))


def test_processes_that_do_not_find_each_other_are_refused(inputs, tmp_path, monkeypatch):
    """As torchrun starts them on a machine without a GPU: each would take itself for the only one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NatsError, match=r"started as one of 2 processes, .* ACCELERATE_USE_CPU=true") as error:
        Trainer(TrainConfig(**train_options(inputs, tmp_path / "run")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


LOST = "nats: another process of the run ended, or no longer answers; there is no checkpoint yet in "


@linux
def test_a_launcher_can_end_processes_that_wait_in_vain(inputs, tmp_path):
    """As it does when it sees one die: with SIGTERM, which Python can not handle inside an exchange."""
    with silent(inputs, tmp_path, None) as launched:
        launched.wait_for(lambda: len(list(tmp_path.glob("run.at_*"))) == 2)
        begun = time.monotonic()
        launched.process.send_signal(signal.SIGTERM)
        launched.end()
        assert time.monotonic() - begun < 20, "not by SIGKILL, which comes after 30 seconds"
    for errors in launched.errors().values():
        assert own_lines(errors) == [f"{LOST}{tmp_path / 'run'}; continue with --resume true"]
        assert "Traceback" not in errors


@linux
def test_a_process_that_falls_silent_is_given_up_after_the_group_s_timeout(inputs, tmp_path):
    with silent(inputs, tmp_path, 3.0) as launched:
        assert launched.end() == 1
    assert launched.exit_codes()[0] == 2
    assert own_lines(launched.errors()[0]) == [f"{LOST}{tmp_path / 'run'}; continue with --resume true"]
    assert "Traceback" not in launched.errors()[0]
