"""Each framework on a tiny drawn data set: trains, resumes, saves, loads, evaluates, predicts, publishes."""

import json
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.models import save_for_hf

from nats_zoo.cli import commands as cli
from nats_zoo.detection import TrainConfig, Trainer, create_detector, from_pretrained, save_detector
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.models.config import FRAMEWORKS
from nats_zoo.detection.runs.loop import Interrupted
from tests.support.hub_server import OWNER_TOKEN, HubProcess, run_script

pytestmark = pytest.mark.usefixtures("one_thread")

GENOTYPE = {
    "format": 1,
    "architecture": "resnet18",
    "convs": {"layer2.0.conv2": [[32, 1, 1], [96, 1, 3]], "layer3.1.conv2": [[128, 3, 1], [128, 2, 2]]},
}
EPOCHS, STEPS = 2, 3  # per epoch
WITH_MASKS = ("maskrcnn", "cascade_rcnn")
LOSSES = {
    "fasterrcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "maskrcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask"},
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, randomise_bn) -> Path:
    """Data, weights and a genotype."""
    folder = tmp_path_factory.mktemp("home")
    draw_dataset(folder / "data", train=2 * STEPS, val=3, test=1, size=64, distance=10)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3, zero_init_last=False)
    save_for_hf(randomise_bn(model, torch.Generator().manual_seed(1)), folder / "weights", safe_serialization=True)
    (folder / "genotype.json").write_text(json.dumps(GENOTYPE))
    return folder


def config(home: Path, framework: str, output: str, **options) -> TrainConfig:
    values = dict(
        data=str(home / "data"),
        output=str(home / f"{framework}_{output}"),
        weights=str(home / "weights"),
        framework=framework,
        backbone="nats_resnet18",
        genotype=str(home / "genotype.json"),
        fpn_channels=64 if framework == "fcos" else 32,
        head_size=16,
        mask_channels=16,
        roi_samples=32,
        masks=framework in WITH_MASKS,
        calibration_images=4,
        min_size=64,
        max_size=96,
        anchor_sizes=(8, 16, 32, 48, 64),
        score_thresh=0.0,
        detections=5,
        epochs=EPOCHS,
        eval_every=EPOCHS,
        batch_size=2,
        lr_per_image=0.001,
        warmup_steps=2,
        lr_steps=(1,),
        workers=0,
        checkpoint_every=2,
    )
    return TrainConfig(**values | options)


class Stopped(Trainer):
    """Is asked to stop, as by Ctrl-C, during its third step."""

    def train_step(self, batches):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().train_step(batches)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def finished(home, request) -> tuple[str, Path]:
    """A framework and the folder of its run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = config(home, request.param, "whole")
    Trainer(settings).run()
    return request.param, Path(settings.output)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@torch.no_grad()
def run(detector):
    return detector.eval()([torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))])[0]


def test_it_trains_and_logs_its_losses(finished):
    framework, folder = finished
    (record,) = [record for record in log(folder) if record.get("step") == EPOCHS * STEPS and "loss" in record]
    losses = {key for key in record if key.startswith(("loss_", "classification", "bbox_"))}
    if framework == "cascade_rcnn":
        stages = {name for name in losses if "classifier" in name or "box_reg" in name}
        assert len(stages - {"loss_rpn_box_reg"}) == 6
        assert {"loss_objectness", "loss_rpn_box_reg", "loss_mask"} <= losses
    else:
        assert losses == LOSSES[framework]
    assert all(record[name] > 0 for name in losses)


def test_an_interrupted_run_resumes_to_the_same_weights(finished, home):
    framework, folder = finished
    settings = config(home, framework, "interrupted")
    with pytest.raises(Interrupted):
        Stopped(settings).run()
    assert not (Path(settings.output) / "model").exists()
    Trainer(config(home, framework, "interrupted", resume=True)).run()
    whole, resumed = (load_file(path / "model" / "model.safetensors") for path in (folder, Path(settings.output)))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_its_folder_holds_a_detector_that_computes_the_genotype(finished, home):
    framework, folder = finished
    detector = from_pretrained(folder / "model")
    assert detector.config.framework == framework
    assert detector.config.classes == ("blue", "vermilion", "yellow")
    assert detector.config.genotype["convs"] == GENOTYPE["convs"]
    found = run(detector)
    assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) == 5
    assert ("masks" in found) == detector.config.masks
    conv = detector.backbone.body.get_submodule("layer3.1.conv2")
    assert [list(one) for one in conv.runs] == GENOTYPE["convs"]["layer3.1.conv2"]


def test_it_is_evaluated_by_the_command(finished, home, tmp_path):
    framework, folder = finished
    arguments = [str(folder / "model"), str(home / "data"), "--split", "val", "--workers", "0"]
    assert cli.main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 < len(results) <= 15
    assert all(("segmentation" in result) == (framework in WITH_MASKS) for result in results)
    saved = json.loads((folder / "metrics.json").read_text())
    again = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {key: again[key] for key in ("ap", "ap50", "per_class")} == {
        key: saved[key] for key in ("ap", "ap50", "per_class")
    }


def test_it_predicts_by_the_command(finished, home, tmp_path):
    _, folder = finished
    image = str(next((home / "data" / "images").glob("test_*.png")))
    arguments = [str(folder / "model"), image, "--threshold", "0", "--output", str(tmp_path / "drawn")]
    assert cli.main(["predict", *arguments]) == 0
    assert (tmp_path / "drawn" / "test_00000.png").is_file()
    (found,) = json.loads((tmp_path / "drawn" / "predictions.json").read_text()).values()
    assert len(found) == 5


PUBLISH_AND_PULL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from nats_zoo.cli import commands as cli
from nats_zoo.detection import from_pretrained

root, token = Path(sys.argv[1]), sys.argv[2]
import os
image, found = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0)), {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    os.environ["HF_TOKEN"] = token
    assert cli.main(["publish", str(folder), f"org/{folder.name}"]) == 0
    del os.environ["HF_TOKEN"]
    with torch.no_grad():
        output = from_pretrained(f"org/{folder.name}", cache_dir=root.parent / "cache")([image])[0]
    found |= {f"{folder.name} {key}": value.contiguous() for key, value in output.items()}
save_file(found, root.parent / "found.safetensors")
"""


def test_all_are_published_and_pulled_by_another_process(tmp_path):
    options = {"fpn_channels": 64, "head_size": 16, "mask_channels": 16, "min_size": 64, "max_size": 96}
    few = {"score_thresh": 0.0, "detections": 3, "anchor_sizes": (8, 16, 32, 48, 64)}
    detectors = {}
    for framework in FRAMEWORKS:
        torch.manual_seed(1)
        masks = True if framework == "cascade_rcnn" else None
        detector = create_detector(framework, "nats_resnet18", 4, GENOTYPE, weights=None, masks=masks, **options, **few)
        save_detector(detector, tmp_path / "folders" / framework)
        detectors[framework] = detector
    with HubProcess(tmp_path / "hub") as server:
        environment = server.client_environment(tmp_path / "home", token=None)
        run_script(PUBLISH_AND_PULL, environment, tmp_path / "folders", OWNER_TOKEN, timeout=600)
    found = load_file(tmp_path / "found.safetensors")
    for framework, detector in detectors.items():
        expected = run(detector)
        assert len(expected["boxes"])
        assert all(torch.equal(found[f"{framework} {key}"], value) for key, value in expected.items())
