"""Training runs: killed, interrupted and resumed, in one process and in two, and what they leave in their folder."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules.batchnorm import _BatchNorm

from nats_zoo import NatsError
from nats_zoo.detection import DataError, TrainConfig, Trainer, evaluate, from_pretrained, predict
from nats_zoo.detection.data.augment import train_transforms
from nats_zoo.detection.data.dataset import CocoDataset
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.evaluation.evaluate import evaluate_model
from nats_zoo.detection.runs.folder import RunError
from nats_zoo.detection.runs.loop import EpochLoader, Interrupted
from nats_zoo.detection.runs.setup import synchronise_norms
from tests.support.two_processes import launch_two

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")

BACKBONE = "mobilenetv3_small_050"  # small files and fast steps, with batch norm
TRAIN_IMAGES, BATCH, EPOCHS = 8, 2, 3
LR = 0.002
STEPS = TRAIN_IMAGES // BATCH  # per epoch


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> SimpleNamespace:
    """A drawn data set, and a folder of weights with random BN statistics."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = timm.create_model(BACKBONE)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    timm.models.save_for_hf(model, root / "weights", safe_serialization=True)
    data = draw_dataset(root / "data", train=TRAIN_IMAGES, val=3, test=0, size=64, distance=8)
    return SimpleNamespace(data=str(data), weights=str(root / "weights"))


def create_config(inputs: SimpleNamespace, output: Path, **options) -> TrainConfig:
    settings = {
        "data": inputs.data,
        "output": str(output),
        "backbone": BACKBONE,
        "weights": inputs.weights,
        "fpn_channels": 16,
        "head_size": 16,
        "roi_samples": 32,
        "calibration_images": 4,
        "min_size": 64,
        "anchor_sizes": (8, 16, 32, 64, 128),
        "batch_size": BATCH,
        "workers": 0,
        "epochs": EPOCHS,
        "eval_every": 2,
        "lr_per_image": LR,
        "warmup_steps": 6,
        "lr_steps": (1, 2),
    }
    return TrainConfig(**{**settings, **options})


@torch.no_grad()
def run(detector: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """Outputs on two images, however the detector's mode was, which stays."""
    training = [(module, module.training) for module in detector.modules()]
    generator = torch.Generator().manual_seed(0)
    outputs = detector.eval()([torch.rand(3, 64, 80, generator=generator), torch.rand(3, 70, 64, generator=generator)])
    for module, mode in training:
        module.training = mode
    return outputs


def check_equal(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    assert sum(len(output["boxes"]) for output in one), "nothing to compare"
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("boxes", "labels", "scores"))


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (output / "checkpoints").glob("step_*"))


class WatchedTrainer(Trainer):
    """Notes the checkpoints that lie on disk before each step, and the detector's outputs after each epoch."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.seen: dict[int, list[int]] = {}
        self.outputs: dict[int, list[dict[str, torch.Tensor]]] = {}

    def train_step(self, *batches: tuple) -> dict[str, float]:
        self.seen[self.step] = checkpoints(self.folder.path)
        return super().train_step(*batches)

    def end_epoch(self) -> None:
        super().end_epoch()
        self.outputs[self.step] = run(self.plain_detector)


def read_log(output: Path) -> list[dict]:
    """The records of steps and evaluations, behind the one of the data."""
    first, *records = (json.loads(line) for line in (output / "log.jsonl").read_text().splitlines())
    assert (first["step"], first.keys()) == (0, {"step", "epoch", "data", "hardware"})
    return records


@pytest.fixture(scope="module")
def short(inputs, tmp_path_factory) -> SimpleNamespace:
    """A run of two steps with a larger batch, without evaluation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("run") / "short"
    trainer = Trainer(create_config(inputs, output, epochs=1, batch_size=4, val_split=None))
    assert trainer.run() is None
    return SimpleNamespace(trainer=trainer, output=output, records=read_log(output))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("run") / "finished"
    trainer = WatchedTrainer(create_config(inputs, output, checkpoint_every=5))
    metrics = trainer.run()
    return SimpleNamespace(trainer=trainer, output=output, metrics=metrics, records=read_log(output))


def check_same_results(output: Path, expected: Path) -> None:
    """Log, metrics, models and the last state are bit for bit the same."""
    for name in ("log.jsonl", "metrics.json"):
        assert (output / name).read_bytes() == (expected / name).read_bytes(), name
    assert checkpoints(output) == checkpoints(expected)
    last = f"checkpoints/step_{checkpoints(expected)[-1]:06d}"
    assert {path.name for path in (output / last).iterdir()} == {path.name for path in (expected / last).iterdir()}
    states = [f"{last}/{path.stem}" for path in (expected / last).glob("*.safetensors")]
    for name in ("model/model", "best/model", *states):
        found, wanted = (load_file(folder / f"{name}.safetensors") for folder in (output, expected))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


# --- batches ----------------------------------------------------------------------------------------------------------


def epoch_batches(data: CocoDataset, epoch: int, skip: int = 0, seed: int = 0) -> list[tuple[int, str]]:
    """Image ids and checksums of the augmented pixels, in the order in which the images come."""
    loader = EpochLoader(data, Accelerator(), batch_size=2, workers=0, seed=seed)
    items = [item for images, targets in loader.batches(epoch, skip) for item in zip(images, targets, strict=True)]
    return [(target["image_id"], hashlib.sha256(image.numpy().tobytes()).hexdigest()) for image, target in items]


def test_order_and_augmentation_are_a_function_of_seed_and_epoch(inputs):
    root = Path(inputs.data)
    transforms = train_transforms(flip=0.0, jitter=0.5)
    data = CocoDataset(root / "annotations" / "instances_train.json", root / "images", transforms)
    first, second = epoch_batches(data, 0), epoch_batches(data, 1)
    for epoch in (first, second):
        assert sorted(number for number, _ in epoch) == list(range(1, TRAIN_IMAGES + 1))
    assert not set(first) & set(second), "every image is augmented anew"
    assert [number for number, _ in first] != [number for number, _ in second]
    assert epoch_batches(data, 0) == first
    assert epoch_batches(data, 0, seed=1) != first
    for skip in (1, STEPS - 1):
        assert epoch_batches(data, 1, skip) == second[skip * 2 :]


# --- an uninterrupted run ---------------------------------------------------------------------------------------------


def test_a_run_leaves_models_log_metrics_and_one_checkpoint(finished):
    names = {str(path.relative_to(finished.output)) for path in finished.output.rglob("*") if path.is_file()}
    model = {"README.md", "config.json", "model.safetensors"}
    checkpoint = {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert names == {
        *("run.json", "log.jsonl", "metrics.json", "curves.png"),
        *(f"{folder}/{name}" for folder in ("best", "model") for name in model),
        *(f"checkpoints/step_{EPOCHS * STEPS:06d}/{name}" for name in checkpoint),
    }
    assert json.loads((finished.output / "metrics.json").read_text()) == finished.metrics.to_dict()
    assert json.loads((finished.output / "run.json").read_text()) == json.loads(
        json.dumps(finished.trainer.config.to_dict())
    )


def test_the_model_folder_holds_the_trained_detector(finished):
    detector = from_pretrained(finished.output / "model")
    check_equal(run(detector), run(finished.trainer.plain_detector))
    assert detector.config.classes == ("blue", "vermilion", "yellow")
    assert detector.config.category_ids == (1, 2, 3)
    assert (detector.config.norm, detector.config.trainable_layers) == ("frozen", 3)


def test_a_run_without_evaluation_leaves_the_model(short):
    names = {path.name for path in short.output.iterdir()}
    assert names == {"run.json", "log.jsonl", "curves.png", "model", "checkpoints"}
    check_equal(run(from_pretrained(short.output / "model")), run(short.trainer.plain_detector))


def test_the_best_folder_holds_the_first_detector_of_the_highest_ap(finished):
    precisions = {record["step"]: record["AP"] for record in finished.records if "AP" in record}
    assert list(precisions) == [2 * STEPS, 3 * STEPS], "after every second epoch and after the last"
    best = max(precisions, key=precisions.get)
    check_equal(run(from_pretrained(finished.output / "best")), finished.trainer.outputs[best])


def test_only_the_stages_that_train_have_changed(finished, inputs):
    before = load_file(f"{inputs.weights}/model.safetensors")
    for name, tensor in load_file(finished.output / "model" / "model.safetensors").items():
        part = name.removeprefix("backbone.body.")
        if part in before and "running" not in part:
            frozen = "bn" in part or part.startswith(("conv_stem", "blocks.0."))
            assert torch.equal(tensor, before[part]) == frozen, name


def test_checkpoints_come_every_so_many_steps_and_after_each_epoch(finished):
    newest = {step: seen[-1] if seen else None for step, seen in finished.trainer.seen.items()}
    assert newest == {**dict.fromkeys(range(4)), 4: 4, 5: 5, 6: 5, 7: 5, 8: 8, 9: 8, 10: 10, 11: 10}
    assert all(len(seen) <= 1 for seen in finished.trainer.seen.values())


def test_the_learning_rate_is_scaled_and_falls_after_its_epochs(finished):
    rates = {record["step"]: record["lr"] for record in finished.records if "lr" in record}
    assert rates.keys() == {10, 12}
    assert rates[10] == pytest.approx(LR * BATCH * 0.1**2)


def test_the_cosine_schedule_falls_to_zero_after_the_warm_up(inputs, tmp_path):
    config = create_config(inputs, tmp_path / "run", lr_schedule="cosine", warmup_steps=2, lr_steps=(1,))
    trainer = Trainer(config)
    rates = []
    for trainer.step in range(EPOCHS * STEPS + 1):
        rates.append(trainer._lr() / (LR * BATCH))
    after = EPOCHS * STEPS - 2
    expected = [0.001, 0.5005] + [(1 + math.cos(math.pi * step / after)) / 2 for step in range(after + 1)]
    assert rates == pytest.approx(expected, abs=1e-12)
    assert rates[-1] == 0


def test_a_warm_up_longer_than_the_run_leaves_nothing_for_the_schedule(inputs, tmp_path):
    config = create_config(inputs, tmp_path / "run", lr_schedule="cosine", warmup_steps=100)
    trainer = Trainer(config)
    trainer.step = trainer.total_steps
    assert trainer._lr() == pytest.approx(LR * BATCH * (0.001 + 0.999 * EPOCHS * STEPS / 100))


def test_the_learning_rate_warms_up(short):
    (record,) = short.records
    assert record["step"] == 2, "the second step, with index 1, is the last"
    assert record["lr"] == pytest.approx(LR * 4 * (0.001 + 0.999 / 6))


def test_the_evaluation_is_that_of_the_saved_detector(finished, inputs):
    data = CocoDataset(Path(inputs.data) / "annotations/instances_val.json", Path(inputs.data) / "images")
    results = predict(from_pretrained(finished.output / "model"), data, Accelerator(), progress=False)
    assert evaluate(data, results) == finished.metrics


def test_a_finished_run_resumes_to_nothing_new(finished, tmp_path):
    output = Path(shutil.copytree(finished.output, tmp_path / "run"))
    metrics = Trainer(replace(finished.trainer.config, output=str(output), resume=True)).run()
    assert metrics == finished.metrics
    check_same_results(output, finished.output)


# --- sizes and norms --------------------------------------------------------------------------------------------------


class MeasuredTrainer(Trainer):
    """Notes the short sides of the images that the backbone sees, in training and in evaluation."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.sides: dict[bool, list[int]] = {True: [], False: []}
        self.plain_detector.transform.register_forward_hook(self._note)

    def _note(self, transform: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
        self.sides[transform.training] += [min(size) for size in outputs[0].image_sizes]


def test_short_sides_are_drawn_in_training_only(inputs, tmp_path):
    sizes = (48, 80)
    trainers = [
        MeasuredTrainer(create_config(inputs, tmp_path / str(run), train_min_sizes=sizes, epochs=1)) for run in range(2)
    ]
    for trainer in trainers:
        trainer.run()
    first, again = (trainer.sides for trainer in trainers)
    assert set(first[True]) == set(sizes), "both come among eight images"
    assert set(first[False]) == {64}, "evaluation is at min_size"
    assert first == again
    config = from_pretrained(tmp_path / "0" / "model").config
    assert config.min_size == 64


def test_synchronised_norms_of_one_process_are_live_ones(inputs, tmp_path):
    options = {"epochs": 1, "val_split": None, "weights": None}
    for norm in ("live", "sync"):
        Trainer(create_config(inputs, tmp_path / norm, norm=norm, **options)).run()
        assert from_pretrained(tmp_path / norm / "model").config.norm == norm
    live, sync = (load_file(tmp_path / norm / "model" / "model.safetensors") for norm in ("live", "sync"))
    assert live.keys() == sync.keys()
    assert all(torch.equal(live[key], sync[key]) for key in live)


def test_synchronised_norms_keep_the_layout_and_are_refused_between_processes_on_the_cpu(inputs, tmp_path):
    trainer = Trainer(create_config(inputs, tmp_path / "run", norm="sync"))
    cpu = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(NatsError, match=r"^norm: sync is for processes on GPUs, found 2 on the device 'cpu'"):
        synchronise_norms(trainer.plain_detector, cpu)
    before = trainer.plain_detector.state_dict()
    synchronise_norms(trainer.plain_detector, SimpleNamespace(num_processes=2, device=torch.device("cuda")))
    norms = [m for m in trainer.plain_detector.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert norms
    after = trainer.plain_detector.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


# --- the transposed twin, and memory format ---------------------------------------------------------------------------


def test_a_transposed_run_trains_calibrates_and_evaluates_on_the_twin(inputs, tmp_path):
    """As a plain run does on files that were transposed."""
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for split in ("train", "val"):
        twin = CocoDataset(*find_split(inputs.data, split), transpose=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(twin.to_coco()))
        for index in range(len(twin)):
            with Image.open(twin.path(index)) as image:
                image.transpose(Image.Transpose.TRANSPOSE).save(root / "images" / twin.path(index).name)
    options = {"epochs": 1, "jitter": 0.2}
    Trainer(create_config(inputs, tmp_path / "twin", transpose=True, **options)).run()
    Trainer(create_config(SimpleNamespace(data=str(root), weights=inputs.weights), tmp_path / "plain", **options)).run()
    check_same_results(tmp_path / "twin", tmp_path / "plain")
    model = str(tmp_path / "twin" / "model")
    found = []
    for number, (data, transpose) in enumerate([(root, False), (inputs.data, True), (inputs.data, False)]):
        output = tmp_path / str(number)
        evaluate_model(model, str(data), "val", output=str(output), transpose=transpose)
        assert json.loads((output / "metrics.json").read_text())["transpose"] == transpose
        found.append(json.loads((output / "results.json").read_text()))
    assert found[0]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert "val, transposed" in (tmp_path / "twin" / "model" / "README.md").read_text()


def test_channels_last_trains_the_same_detector_and_resumes_bit_for_bit(inputs, tmp_path):
    options = {"epochs": 1, "checkpoint_every": 2, "val_split": None, "lr_per_image": 1e-4}
    outputs = [tmp_path / name for name in ("contiguous", "last", "stopped")]
    Trainer(create_config(inputs, outputs[0], **options)).run()
    trainer = Trainer(create_config(inputs, outputs[1], channels_last=True, **options))
    kernels = [p for p in trainer.detector.parameters() if p.dim() == 4]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    trainer.run()
    assert all(p.grad is None for p in kernels)
    plain, last = (load_file(output / "model" / "model.safetensors") for output in outputs[:2])
    for key, tensor in plain.items():
        torch.testing.assert_close(last[key], tensor, rtol=1e-3, atol=1e-4)

    config = create_config(inputs, outputs[2], channels_last=True, **options)
    with pytest.raises(Interrupted):
        StoppedTrainer(config).run()
    resumed = Trainer(replace(config, resume=True))
    resumed.run()
    for name in ("model/model", f"checkpoints/step_{STEPS:06d}/optimizer"):
        found, wanted = (load_file(folder / f"{name}.safetensors") for folder in (outputs[2], outputs[1]))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


class StoppedTrainer(Trainer):
    """Ends as on Ctrl-C, after its first steps."""

    def train_step(self, *batches: tuple) -> dict[str, float]:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(*batches)


# --- killed, interrupted, resumed -------------------------------------------------------------------------------------

TWICE = """
import json, sys
from nats_zoo.detection import TrainConfig, Trainer
from nats_zoo.detection.runs.loop import Interrupted

for resume in (False, True):
    try:
        Trainer(TrainConfig(**json.loads(sys.argv[1]), resume=resume)).run()
    except Interrupted as stop:
        print(stop, flush=True)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}


def options_of(config: TrainConfig) -> str:
    return json.dumps({key: value for key, value in config.to_dict().items() if key != "resume"})


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def interrupt_and_kill(config: TrainConfig, after: int) -> SimpleNamespace:
    """Begin a run, send Ctrl-C after its first step, resume it, and kill it after a step."""
    output = Path(config.output)
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE, options_of(config)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal sends Ctrl-C to the workers too
    )
    try:
        wait_for(lambda: bool(checkpoints(output)), process)
        os.killpg(process.pid, signal.SIGINT)
        message = process.stdout.readline().strip()
        stopped_at = checkpoints(output)
        wait_for(lambda: checkpoints(output)[-1:] > [after], process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return SimpleNamespace(config=config, output=output, message=message, stopped_at=stopped_at, at=checkpoints(output))


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory) -> SimpleNamespace:
    """A run that got Ctrl-C after its first step, was resumed, and was killed in the middle of its second epoch."""
    output = tmp_path_factory.mktemp("run") / "killed"
    return interrupt_and_kill(create_config(inputs, output, checkpoint_every=1, workers=1), after=STEPS)


def test_an_interrupted_run_stops_behind_a_checkpoint_and_says_how_to_go_on(killed):
    (step,) = killed.stopped_at
    assert 1 <= step < STEPS
    assert killed.message == f"stopped at step {step} of {EPOCHS * STEPS}; continue with --resume true"


def test_a_run_interrupted_and_killed_ends_as_if_it_had_not_been(killed, finished):
    assert STEPS < killed.at[-1] < EPOCHS * STEPS
    assert not (killed.output / "model").exists()
    trainer = Trainer(replace(killed.config, resume=True, checkpoint_every=None, workers=0))
    assert trainer.run() == finished.metrics
    check_same_results(killed.output, finished.output)


STATEFUL = {
    **{"ema": 0.9, "early_stop": 2, "train_min_sizes": (48, 64, 80), "eval_every": 1, "jitter": 0.2},
    **{"lr_per_image": 1e-6, "epochs": 6},  # AP stays what it is at first, so that the run ends early
}


@pytest.fixture(scope="module")
def ended_early(inputs, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted run with all options that carry a state, which ends after three of six epochs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("run") / "early"
    trainer = Trainer(create_config(inputs, output, **STATEFUL))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        metrics = trainer.run()
    return SimpleNamespace(output=output, metrics=metrics, trainer=trainer, errors=errors.getvalue())


@pytest.fixture(scope="module")
def killed_late(inputs, tmp_path_factory) -> SimpleNamespace:
    """The same, interrupted and then killed between the evaluations that end it."""
    output = tmp_path_factory.mktemp("run") / "killed"
    return interrupt_and_kill(create_config(inputs, output, checkpoint_every=1, **STATEFUL), after=2 * STEPS)


def test_early_stop_ends_a_run_that_gets_no_better_and_says_so(ended_early):
    records = read_log(ended_early.output)
    precisions = [(record["step"], record["AP"]) for record in records if "AP" in record]
    assert [step for step, _ in precisions] == [STEPS, 2 * STEPS, 3 * STEPS]
    best = precisions[0][1]
    assert all(ap <= best for _, ap in precisions)
    assert records[-1] == {"step": 3 * STEPS, "epoch": 3.0, "early_stop": 2, "best_AP": best}
    (line,) = [line for line in ended_early.errors.splitlines() if line.startswith("ended")]
    assert line == f"ended after 3 of 6 epochs (early_stop): 2 evaluations without an AP above {best:.1f}"
    written = {"model", "best", "curves.png", "metrics.json"}
    assert written <= {path.name for path in ended_early.output.iterdir()}
    assert json.loads((ended_early.output / "metrics.json").read_text()) == ended_early.metrics.to_dict()


def test_averages_early_stop_and_drawn_sizes_survive_a_kill(killed_late, ended_early, tmp_path):
    assert 2 * STEPS < killed_late.at[-1] < 3 * STEPS
    twin = Path(shutil.copytree(killed_late.output, tmp_path / "twin"))
    trainer = Trainer(replace(killed_late.config, resume=True, checkpoint_every=None))
    assert trainer.run() == ended_early.metrics
    check_same_results(killed_late.output, ended_early.output)

    path = twin / "checkpoints" / f"step_{killed_late.at[-1]:06d}" / "averaged.safetensors"
    forgotten = load_file(path)
    forgotten["roi_heads.box_predictor.cls_score.bias"] += 1.0
    save_file(forgotten, path)
    Trainer(replace(killed_late.config, output=str(twin), resume=True, checkpoint_every=None)).run()
    with pytest.raises(AssertionError):
        check_same_results(twin, ended_early.output)


def test_a_run_that_ended_early_resumes_to_nothing_new(ended_early, tmp_path, capsys):
    output = Path(shutil.copytree(ended_early.output, tmp_path / "run"))
    metrics = Trainer(replace(ended_early.trainer.config, output=str(output), resume=True)).run()
    assert metrics == ended_early.metrics
    check_same_results(output, ended_early.output)
    assert "ended after 3 of 6 epochs" in capsys.readouterr().err


def test_a_run_is_not_begun_again_or_resumed_with_other_options(finished):
    config = finished.trainer.config
    with pytest.raises(RunError, match="already holds a run; add --resume true"):
        Trainer(config)
    with pytest.raises(RunError, match=r"run\.json: the run was begun with momentum=0\.9 and can not go on with 0\.5"):
        Trainer(replace(config, resume=True, momentum=0.5))


def test_a_checkpoint_of_another_network_is_one_line(short, tmp_path):
    output = Path(shutil.copytree(short.output, tmp_path / "run"))
    options = {**json.loads((output / "run.json").read_text()), "head_size": 8}
    (output / "run.json").write_text(json.dumps(options))
    config = replace(short.trainer.config, output=str(output), head_size=8, resume=True)
    with pytest.raises(RunError, match=r"the checkpoint does not fit this run: .*box_head") as error:
        Trainer(config).run()
    assert "\n" not in str(error.value)


# --- two processes ----------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys
from pathlib import Path
from nats_zoo.detection import TrainConfig, Trainer, predict

trainer = Trainer(TrainConfig(**json.loads(sys.argv[1])))
metrics = trainer.run()
accelerator = trainer.accelerator
results = predict(trainer.result, trainer.val_data, accelerator, progress=False)
found = {"processes": accelerator.num_processes, "metrics": metrics.to_dict(), "results": results}
Path(sys.argv[2]).with_suffix(f".{accelerator.process_index}").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launched(inputs, tmp_path_factory) -> SimpleNamespace:
    """A run in two processes on the CPU, as `accelerate launch` starts them, with averaged weights."""
    root = tmp_path_factory.mktemp("launched")
    script = root / "train.py"
    script.write_text(PROCESS)
    config = create_config(inputs, root / "run", epochs=1, checkpoint_every=1, ema=0.9)
    result = launch_two(script, options_of(config), root / "found", timeout=600)
    assert result.returncode == 0, result.stderr
    found = [json.loads((root / f"found.{rank}").read_text()) for rank in (0, 1)]
    return SimpleNamespace(output=root / "run", found=found, config=config)


def test_two_processes_share_the_images_and_write_one_set_of_files(launched, finished):
    steps = TRAIN_IMAGES // (2 * BATCH)
    names = {path.name for path in launched.output.iterdir()}
    assert names == {path.name for path in finished.output.iterdir()}
    assert checkpoints(launched.output) == [steps]
    records = read_log(launched.output)
    assert [record["step"] for record in records] == [steps, steps]
    assert records[0]["lr"] == pytest.approx(LR * 2 * BATCH * (0.001 + 0.999 / 6))


def test_two_processes_evaluate_as_one(launched, inputs):
    data = CocoDataset(Path(inputs.data) / "annotations/instances_val.json", Path(inputs.data) / "images")
    results = predict(from_pretrained(launched.output / "model"), data, Accelerator(), progress=False)
    assert results
    for found in launched.found:
        assert found["processes"] == 2
        assert found["results"] == results
        assert found["metrics"] == evaluate(data, results).to_dict()


# --- precision and losses ---------------------------------------------------------------------------------------------


def test_bf16_computes_otherwise_and_keeps_float32_weights(short, tmp_path):
    output = tmp_path / "run"
    Trainer(replace(short.trainer.config, output=str(output), precision="bf16")).run()
    (record,) = read_log(output)
    assert record["loss"] == pytest.approx(short.records[0]["loss"], rel=0.05)
    assert record["loss"] != short.records[0]["loss"]
    assert {tensor.dtype for tensor in load_file(output / "model" / "model.safetensors").values()} == {torch.float32}


def test_a_precision_that_can_not_be_had_is_one_line(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(NatsError, match=r"^precision: fp16 is not for the device 'cpu'"):
        Trainer(create_config(inputs, tmp_path / "run", precision="fp16"))
    with pytest.raises(NatsError, match=r"^precision: .*already been initialized") as error:
        Trainer(create_config(inputs, tmp_path / "run", precision="bf16"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(inputs, tmp_path):
    options = {"lr_per_image": 1e30, "clip_grad": None, "warmup_steps": 0, "checkpoint_every": 1}
    with pytest.raises(RunError, match=r"loss_\w+ is (nan|inf) at step [123], in epoch 1 of 3; the last") as error:
        Trainer(create_config(inputs, tmp_path / "run", **options)).run()
    assert "\n" not in str(error.value)
    assert f"at step {checkpoints(tmp_path / 'run')[-1]}," in str(error.value)
    assert not (tmp_path / "run" / "model").exists()


# --- what can not be begun --------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"data": "no/such/folder"}, "no/such/folder"),
    ({"train_split": "training"}, "split 'training'"),
    ({"val_split": "validation"}, "split 'validation'"),
    ({"images": "pictures"}, "images: expected a folder"),
    ({"framework": "yolo"}, "framework: 'yolo' is unknown"),
    ({"backbone": "resnet19"}, "timm has no model 'resnet19'"),
    ({"backbone": "resnet18"}, "weights of another network"),
    ({"weights": "no/such/weights.safetensors"}, "weights.safetensors"),
    ({"weights": None, "norm": "frozen"}, "freezing batch norms or stages of a random backbone"),
    ({"backbone": "nats_resnet18", "genotype": "no/such/genotype.json"}, "genotype.json"),
    ({"anchor_sizes": (8, 16)}, "anchor_sizes: expected 5"),
    ({"flip": 2.0}, "flip: expected a number in 0..1"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_a_run_that_can_not_begin_is_one_line_and_leaves_no_folder(inputs, tmp_path, options, words):
    with pytest.raises(NatsError, match=words) as error:
        Trainer(create_config(inputs, tmp_path / "run", **options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key", ["batch_size", "eval_batch_size", "epochs", "eval_every", "checkpoint_every", "early_stop"]
)
def test_numbers_below_one_are_refused(inputs, tmp_path, key):
    for value in (0, -1):
        with pytest.raises(NatsError, match=f"{key}: expected 1 or more, found {value}"):
            create_config(inputs, tmp_path / "run", **{key: value})


def test_early_stop_needs_something_to_evaluate_on(inputs, tmp_path):
    with pytest.raises(NatsError, match=r"^early_stop: needs a val_split"):
        create_config(inputs, tmp_path / "run", early_stop=1, val_split=None)


def test_entries_that_can_not_be_used_are_refused_or_left_out_and_told(inputs, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    (data / "images").symlink_to(Path(inputs.data) / "images")
    content = json.loads((Path(inputs.data) / "annotations" / "instances_train.json").read_text())
    content["images"].append({**content["images"][0], "id": 99, "file_name": "missing.png"})
    content["annotations"][0]["bbox"] = [5, 5, 0, 0]
    (data / "annotations" / "instances_train.json").write_text(json.dumps(content))

    options = {"data": str(data), "epochs": 1, "batch_size": 8, "val_split": None}
    with pytest.raises(DataError, match=r"missing\.png"):
        Trainer(create_config(inputs, tmp_path / "run", **options))
    content["annotations"][1]["bbox"][0] = -5
    (data / "annotations" / "instances_train.json").write_text(json.dumps(content))
    trainer = Trainer(create_config(inputs, tmp_path / "run", skip_bad=True, **options))
    trainer.run()
    assert trainer.train_data.skipped == {"missing image file": 1, "degenerate box": 1}
    assert trainer.step == trainer.total_steps == 1
    boxes = len(content["annotations"]) - 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: 8")]
    assert line.startswith(f"train: 8 images, {boxes} boxes, 3 classes; left out: ")
    assert all(words in line for words in ("1 with missing image file", "1 with degenerate box", "1 boxes clipped"))
    told = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["data"]["train"]
    assert (told["images"], told["boxes"], told["classes"]) == (8, boxes, ["blue", "vermilion", "yellow"])
    assert told["left out"] == trainer.train_data.skipped
    assert told["notes"]["boxes clipped"] == 1
