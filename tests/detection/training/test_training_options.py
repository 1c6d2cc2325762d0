"""Options of a training run that are the detector's: frameworks, masks, thresholds."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from nats_zoo import NatsError
from nats_zoo.detection import TrainConfig, Trainer, from_pretrained
from nats_zoo.detection.data.drawn import draw_dataset

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

OPTIONS = {
    **{"backbone": "mobilenetv3_small_050", "weights": None, "fpn_channels": 16, "head_size": 16, "roi_samples": 32},
    **{"min_size": 64, "anchor_sizes": (8, 16, 32, 64, 128), "batch_size": 2, "workers": 0, "epochs": 3},
    **{"lr_per_image": 0.002, "warmup_steps": 2, "lr_steps": ()},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("options") / "data"
    return str(draw_dataset(root, train=8, val=3, test=0, size=64, distance=8))


def create_config(data: str, output: Path, **options) -> TrainConfig:
    return TrainConfig(data=data, output=str(output), **{**OPTIONS, **options})


def read_log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_the_detector_has_the_options_of_the_run_and_masks_where_it_finds_them(data, tmp_path):
    options = {"framework": "maskrcnn", "mask_channels": 8, "score_thresh": 0.01, "nms_thresh": 0.4, "detections": 7}
    trainer = Trainer(create_config(data, tmp_path / "run", epochs=1, **options))
    trainer.run()
    saved = from_pretrained(tmp_path / "run" / "model").config
    assert all(getattr(saved, key) == value for key, value in options.items())
    assert saved.masks
    records = read_log(tmp_path / "run")
    assert "mask_AP" in records[-1]
    assert trainer.metrics.mask is not None
    AcceleratorState._reset_state(reset_partial_state=True)
    again = Trainer(create_config(data, tmp_path / "run", epochs=1, resume=True, **options))
    assert again.run() == trainer.metrics


@pytest.mark.parametrize("framework", ["retinanet", "fcos", "cascade_rcnn"])
def test_each_framework_trains_with_its_own_anchors(data, tmp_path, framework):
    options = {"framework": framework, "anchor_sizes": None, "fpn_channels": 32, "epochs": 1, "val_split": None}
    trainer = Trainer(create_config(data, tmp_path / "run", **options))
    before = {key: value.clone() for key, value in trainer.plain_detector.state_dict().items()}
    trainer.run()
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(saved[key], before[key]) for key in before)
    smallest = 8 if framework == "fcos" else 32
    assert from_pretrained(tmp_path / "run" / "model").config.anchor_sizes[0] == smallest


def test_masks_of_a_framework_without_are_refused(data, tmp_path):
    with pytest.raises(NatsError, match="masks: fasterrcnn never finds masks"):
        Trainer(create_config(data, tmp_path / "run", masks=True))
