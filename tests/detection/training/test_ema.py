"""The moving average of the weights: against its recurrence, and which weights a run evaluates and saves."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from nats_zoo import NatsError
from nats_zoo.detection import TrainConfig, Trainer, from_pretrained
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.evaluation.evaluate import evaluate_detector

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

DECAY = 0.5
STEPS = 8

OPTIONS = {
    **{"backbone": "mobilenetv3_small_050", "weights": None, "norm": "live", "fpn_channels": 16, "head_size": 16},
    **{"roi_samples": 32, "min_size": 64, "anchor_sizes": (8, 16, 32, 64, 128), "batch_size": 2, "workers": 0},
    **{"epochs": 2, "lr_per_image": 0.01, "warmup_steps": 0, "lr_steps": ()},
}


class RecordingTrainer(Trainer):
    """Keeps the state of the trained detector after each step."""

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.start = self.snapshot()
        self.states: list[dict[str, Tensor]] = []

    def snapshot(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.plain_detector.state_dict().items()}

    def train_step(self, *batches: list[tuple]) -> dict[str, float]:
        record = super().train_step(*batches)
        self.states.append(self.snapshot())
        return record


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(draw_dataset(tmp_path_factory.mktemp("ema") / "data", train=8, val=3, test=0, size=64, distance=8))


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory) -> RecordingTrainer:
    """A finished run with a short memory and live batch norms."""
    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("ema") / "run"
    trainer = RecordingTrainer(TrainConfig(data=data, output=str(output), ema=DECAY, **OPTIONS))
    trainer.run()
    assert len(trainer.states) == STEPS
    return trainer


def expected_average(trainer: RecordingTrainer) -> dict[str, Tensor]:
    """The recurrence in float64: each step's decay is DECAY, or less in the first ones; buffers are the last step's."""
    parameters = {name for name, _ in trainer.plain_detector.named_parameters()}
    average = {name: value.double() for name, value in trainer.start.items()}
    for step, state in enumerate(trainer.states):
        decay = min(DECAY, 1 - (1 + step) ** (-2 / 3))
        for name, value in state.items():
            average[name] = decay * average[name] + (1 - decay) * value if name in parameters else value
    return average


def test_the_average_follows_its_recurrence_and_buffers_are_copied(averaged):
    expected, found = expected_average(averaged), averaged.result.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-6)
    norms = [m for m in averaged.result.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert all(norm.num_batches_tracked == STEPS for norm in norms)


def test_the_average_is_neither_the_first_nor_the_last_step(averaged):
    """Else the test above would show nothing."""
    name = "roi_heads.box_predictor.cls_score.weight"
    found = averaged.result.state_dict()[name]
    for other in (averaged.start, averaged.states[0], averaged.states[-1]):
        assert (found - other[name]).abs().max() > 1e-4


def test_the_averaged_weights_are_saved_and_evaluated(averaged):
    folder = averaged.folder.path
    saved = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in averaged.result.state_dict().items())
    detector = from_pretrained(folder / "model")
    assert evaluate_detector(detector, averaged.val_data, Accelerator(), averaged.config) == averaged.metrics


def test_the_checkpoint_holds_both(averaged):
    folder = averaged.folder.path / "checkpoints" / f"step_{STEPS:06d}"
    for name, state in (("model", averaged.states[-1]), ("averaged", averaged.result.state_dict())):
        found = load_file(folder / f"{name}.safetensors")
        assert all(torch.equal(found[key], value) for key, value in state.items())


def test_averaging_leaves_training_as_it_is(averaged, data, tmp_path):
    plain = RecordingTrainer(TrainConfig(data=data, output=str(tmp_path / "run"), **OPTIONS))
    plain.run()
    assert plain.result is plain.plain_detector
    assert not (tmp_path / "run" / "checkpoints" / f"step_{STEPS:06d}" / "averaged.safetensors").exists()
    for mine, other in zip(averaged.states, plain.states, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_in_bf16_the_average_is_kept_in_float32_and_evaluated_as_it_was_trained(data, tmp_path):
    trainer = Trainer(
        TrainConfig(data=data, output=str(tmp_path / "run"), ema=DECAY, precision="bf16", **{**OPTIONS, "epochs": 1})
    )
    seen: set[torch.dtype] = set()
    trainer.result.backbone.fpn.register_forward_hook(lambda module, inputs, output: seen.add(output["0"].dtype))
    trainer.run()
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in trainer.result.parameters()} == {torch.float32}


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 2.0])
def test_a_decay_that_is_none_is_refused(tmp_path, decay):
    with pytest.raises(NatsError, match="ema: expected a decay between 0 and 1"):
        TrainConfig(data="", output=str(Path(tmp_path) / "run"), ema=decay)
