"""`nats predict` on images: what it takes, what does not depend on the batch, masks, classes, precision and speed."""

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.v2 import functional as F

from nats_zoo import NatsError
from nats_zoo.cli import commands as cli
from nats_zoo.detection import create_detector, from_pretrained, save_detector
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.data.images import measure_image
from nats_zoo.detection.models.mixed_precision import mixed_precision
from nats_zoo.detection.prediction.inputs import find_images, plan_batches
from nats_zoo.detection.prediction.pipeline import Speed, run_ahead
from nats_zoo.detection.prediction.predict import detect, draw_found, open_image, predict_images

SMALL = {"fpn_channels": 8, "head_size": 16, "mask_channels": 8, "min_size": 64, "max_size": 128, "detections": 40}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`model`, a Mask R-CNN with random weights, and `photos` in two sizes, also in a folder inside."""
    folder = tmp_path_factory.mktemp("prediction")
    torch.manual_seed(0)
    detector = create_detector("maskrcnn", "resnet18", 4, weights=None, classes=("a", "b", "c"), **SMALL)
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.bias.zero_()
        detector.roi_heads.box_predictor.cls_score.weight *= 0.1  # else one class would win everywhere
    save_detector(detector, folder / "model")
    images = sorted((draw_dataset(folder / "data", train=6, val=0, test=0, size=96, distance=10) / "images").iterdir())
    (folder / "photos" / "inside").mkdir(parents=True)
    for number, file in enumerate(images):
        with Image.open(file) as image:
            size = (96, 96) if number % 2 else (128, 80)
            image.resize(size).save(folder / "photos" / ("inside" if number > 4 else ".") / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def detector(home):
    return from_pretrained(home / "model")


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def predict(*arguments):
    return cli.main(["predict", "model", *map(str, arguments)])


def read(folder):
    return json.loads((folder / "predictions.json").read_text())


# --- inputs -----------------------------------------------------------------------------------------------------------


def names(*paths, **options):
    return [file.as_posix() for file in find_images(paths, **options)]


def test_folders_and_patterns_stand_for_their_images(here):
    top = [f"photos/{number}.png" for number in range(5)]
    assert names("photos") == top
    assert names("photos", recursive=True) == [*top, "photos/inside/5.png"]
    assert names("photos/[01].png") == top[:2]
    assert names("photos/*") == top
    assert names("photos/**/*.png") == sorted([*top, "photos/inside/5.png"])
    assert names("photos/3.png", "photos/*.png") == ["photos/3.png", *top[:3], top[4]]  # each once


def test_a_file_with_a_patterns_letters_in_its_name_is_that_file(here, tmp_path):
    odd = tmp_path / "[1].png"
    shutil.copy("photos/1.png", odd)
    assert find_images([str(odd)]) == [odd]


def test_hidden_files_are_not_images(here, tmp_path):
    shutil.copy("photos/1.png", tmp_path / "1.png")
    (tmp_path / "._1.png").write_bytes(b"what macOS puts beside it")
    (tmp_path / ".cache").mkdir()
    shutil.copy("photos/1.png", tmp_path / ".cache" / "2.png")
    assert find_images([str(tmp_path)], recursive=True) == [tmp_path / "1.png"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("photos/*.jpg", "photos/*.jpg: matches no image or video"),
        ("model/*", "model/*: matches no image or video, but 3 other files"),
        ("photos/9.png", "photos/9.png: no such image or folder"),
        ("model", "model: no images in this folder; --recursive looks into the folders in it too"),
    ],
)
def test_what_stands_for_no_image_is_named(here, path, expected, tmp_path, capsys):
    assert predict("photos", path, "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"nats: {expected}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_damaged_image_is_named_before_anything_is_written(here, suffix, tmp_path, capsys):
    with Image.open("photos/1.png") as image:
        image.convert("RGB").save(tmp_path / f"cut.{suffix}")
    content = (tmp_path / f"cut.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    assert predict("photos", tmp_path / f"cut.{suffix}", "--output", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nats: {tmp_path}/cut.{suffix}: can not be decoded: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_size_is_that_of_the_upright_image(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (31, 3)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert measure_image(tmp_path / f"a.{suffix}") == open_image(tmp_path / f"a.{suffix}").size


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_masks_are_the_detectors_as_run_lengths(here, detector, tmp_path):
    assert predict("photos/0.png", "--output", tmp_path, "--threshold", 0) == 0
    rows = read(tmp_path)["photos/0.png"]
    with Image.open("photos/0.png") as image, torch.no_grad():
        (output,) = detector([F.pil_to_tensor(image.convert("RGB")).float() / 255])
    assert len(rows) == len(output["masks"]) > 0
    for row, mask, box in zip(rows, output["masks"][:, 0].numpy(), output["boxes"], strict=True):
        assert row["mask"]["size"] == [80, 128]
        np.testing.assert_array_equal(coco_mask.decode(row["mask"]), mask > 0.5)
        assert row["box"] == pytest.approx(box.tolist(), abs=1e-3)
    assert any(coco_mask.area(row["mask"]) > 0 for row in rows)


def test_the_picture_is_that_of_the_json(here, detector, tmp_path):
    assert predict("photos/0.png", "--output", tmp_path, "--threshold", 0) == 0
    image = open_image("photos/0.png")
    rows = read(tmp_path)["photos/0.png"]
    with Image.open(tmp_path / "0.png") as picture:
        drawn = np.asarray(picture)
    np.testing.assert_array_equal(drawn, np.asarray(draw_found(image, rows, detector.config.classes)))
    bare = [{key: value for key, value in row.items() if key != "mask"} for row in rows]
    assert (drawn != np.asarray(draw_found(image, bare, detector.config.classes))).any()
    assert rows == detect(detector, image, 0.0)


def close(one, other):
    """Whether two lists of found objects are equal up to rounding."""
    return [row["label"] for row in one] == [row["label"] for row in other] and all(
        np.allclose(a["box"], b["box"], atol=1e-2) and abs(a["score"] - b["score"]) < 1e-4
        for a, b in zip(one, other, strict=True)
    )


def test_what_is_found_does_not_depend_on_the_batch_size(here, tmp_path, capsys):
    for size in (1, 2, 5):
        assert predict("photos", "--output", tmp_path / str(size), "--batch_size", size, "--threshold", 0) == 0
    one = read(tmp_path / "1")
    for size in (2, 5):
        other = read(tmp_path / str(size))
        assert list(other) == list(one)  # in the order of the files, whatever the order of the batches
        assert all(close(one[file], other[file]) for file in one)
    assert not close(one["photos/0.png"], one["photos/2.png"])
    assert {path.name for path in (tmp_path / "5").iterdir()} == {path.name for path in (tmp_path / "1").iterdir()}


def test_batches_hold_images_of_one_padded_size_only():
    sizes = [(10, 10), (20, 20), (10, 11), (20, 20), (10, 10), (20, 20)]
    batches = list(plan_batches(sizes, 2, lambda size: size[0]))
    assert batches == [[0, 2], [1, 3], [4], [5]]
    assert list(plan_batches(sizes, 1, lambda size: size[0])) == [[index] for index in range(6)]


def test_only_the_named_classes_are_found(here, tmp_path):
    everything = {}
    for name, arguments in {"all": [], "b": ["--classes", "b"], "both": ["--classes", "a", "3"]}.items():
        assert predict("photos", "--output", tmp_path / name, "--threshold", 0, "--draw", "false", *arguments) == 0
        everything[name] = [row["label"] for rows in read(tmp_path / name).values() for row in rows]
    assert set(everything["all"]) == {1, 2, 3}
    assert everything["b"] == [label for label in everything["all"] if label == 2]
    assert everything["both"] == [label for label in everything["all"] if label != 2]


def test_no_pictures_on_request(here, tmp_path):
    assert predict("photos", "--output", tmp_path / "out", "--draw", "false") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "dog"], "classes: 'dog' is unknown to this detector, expected some of a, b, c"),
        (["--device", "cuda:99"], "device: 'cuda:99' can not be used on this machine"),
        (["--device", "toaster"], "device: 'toaster' can not be used on this machine"),
        (["--device", "cpu", "--precision", "fp16"], "precision: fp16 is not for the device 'cpu'"),
        (["--batch_size", "0"], "batch_size: expected"),
        (["--every", "0"], "every: expected"),
    ],
)
def test_options_that_can_not_be_met_are_named(here, arguments, expected, tmp_path, capsys):
    assert predict("photos", "--output", tmp_path / "out", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nats: {expected}")
    assert not (tmp_path / "out").exists()


def test_a_failing_detector_leaves_no_json_and_whole_pictures_only(here, detector, tmp_path):
    class Fails(torch.nn.Module):
        """Finds what the detector does, and breaks down at the fourth image."""

        config, transform = detector.config, detector.transform

        def __init__(self):
            super().__init__()
            self.detector, self.calls = detector, 0

        def forward(self, images):
            self.calls += 1
            if self.calls == 4:
                raise RuntimeError("out of memory")
            return self.detector(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        list(predict_images(Fails(), ["photos"], str(tmp_path), device="cpu"))
    pictures = sorted(tmp_path.iterdir())
    assert {path.suffix for path in pictures} == {".png"}
    assert len(pictures) <= 3
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()


def torchvision_mask_rcnn(num_classes):
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    anchors = AnchorGenerator(((16,), (32,), (48,), (64,), (96,)), ((1.0,),) * 5)
    options = {"min_size": 64, "max_size": 128, "box_detections_per_img": 5}
    return MaskRCNN(backbone, num_classes, rpn_anchor_generator=anchors, **options)


def test_torchvisions_own_detector_predicts_with_classes_of_ours(here, detector, tmp_path):
    """Any network with torchvision's interface and a config serves `predict_images`."""
    torch.manual_seed(1)
    theirs = torchvision_mask_rcnn(4)
    theirs.config = detector.config
    *lines, _ = predict_images(theirs, ["photos/1.png"], str(tmp_path), threshold=0.0)
    theirs.eval()
    with Image.open("photos/1.png") as image, torch.no_grad():
        (output,) = theirs([F.pil_to_tensor(image.convert("RGB")).float() / 255])
    rows = read(tmp_path)["photos/1.png"]
    assert lines == [f"photos/1.png: {len(rows)} boxes, drawn in {tmp_path / '1.png'}"]
    assert [row["box"] for row in rows] == [pytest.approx(box.tolist(), abs=1e-3) for box in output["boxes"]]


# --- precision --------------------------------------------------------------------------------------------------------


def hooks(detector):
    return [len(module._forward_hooks) for module in detector.modules()]


@pytest.mark.parametrize("framework", ["maskrcnn", "cascade_rcnn", "retinanet", "fcos"])
def test_in_bf16_boxes_keep_their_precision(framework):
    """bf16 itself has steps of 4 pixels beyond 512."""
    torch.manual_seed(0)
    options = {**SMALL, "fpn_channels": 32, "min_size": 640, "max_size": 640, "detections": 20, "score_thresh": 0.0}
    detector = create_detector(framework, "resnet18", 4, weights=None, **options).eval()
    image = torch.rand(3, 640, 640)
    before = hooks(detector)
    with torch.no_grad(), mixed_precision(detector, "bf16"):
        (output,) = detector([image])
    assert {output[key].dtype for key in ("boxes", "scores")} == {torch.float32}
    assert (output["boxes"] == output["boxes"].to(torch.bfloat16)).float().mean() < 0.7
    assert hooks(detector) == before


def test_under_autocast_alone_torchvisions_boxes_lose_their_precision():
    """What mixed_precision is for."""
    torch.manual_seed(0)
    detector = torchvision_mask_rcnn(4).eval()
    image = torch.rand(3, 128, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (plain,) = detector([image])
    with torch.no_grad(), mixed_precision(detector, "bf16"):
        (exact,) = detector([image])
    assert plain["boxes"].dtype == torch.bfloat16
    assert exact["boxes"].dtype == exact["masks"].dtype == torch.float32


def test_bf16_finds_about_the_same(here, tmp_path):
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        assert predict("photos", "--output", out, "--precision", precision, "--threshold", 0, "--draw", "false") == 0
    exact, rough = (read(tmp_path / precision) for precision in ("no", "bf16"))
    assert exact != rough
    for file, rows in exact.items():
        scores, others = ([row["score"] for row in found] for found in (rows, rough[file]))
        assert np.allclose(scores[:5], others[:5], atol=0.02)


# --- speed ------------------------------------------------------------------------------------------------------------


def test_the_speed_leaves_the_first_batches_out():
    speed = Speed("images")
    for seconds in (0.5, 0.5, 0.02, 0.02, 0.02, 0.02):
        with speed.time_batch(2):
            time.sleep(seconds / 5)
    with speed.time(speed.decoding):
        time.sleep(0.02)
    line = speed.line("batch 2, bf16, cpu")
    rate = r"12 images, (\d+\.\d) images per second \(warm, 8 timed, batch 2, bf16, cpu\)"
    found = re.fullmatch(rf"{rate}; apart from it, each: decode (\d+) ms", line)
    assert found, line
    assert 100 < float(found[1]) <= 500  # 2 images in 4 ms; with the first batches it would be 55
    assert 20 <= int(found[2]) < 200


def test_too_few_images_have_no_speed(here, tmp_path, capsys):
    assert predict("photos/[0-3].png", "--output", tmp_path, "--draw", "false", "--device", "cpu") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("4 images, too few to tell a speed: it takes 5 batches (batch 1, float32, cpu); ")
    assert "per second" not in line
    assert predict("photos", "--output", tmp_path, "--device", "cpu", "--precision", "bf16") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"5 images, \d+\.\d images per second \(warm, 3 timed, batch 1, bf16, cpu\); "
        r"apart from it, each: decode [\d.]+ ms, draw [\d.]+ ms",
        line,
    )


def test_work_ahead_is_in_order_bounded_and_hands_errors_on():
    begun = []

    def work(item):
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        time.sleep(0.001 * (item % 3))
        return 10 * item

    with ThreadPoolExecutor(3) as pool:
        results = run_ahead(work, range(100), pool, ahead=2)
        assert [next(results) for _ in range(5)] == [0, 10, 20, 30, 40]
        with pytest.raises(ValueError, match="five"):
            next(results)
    assert max(begun) <= 7


def test_a_bad_precision_is_refused(detector):
    with pytest.raises(NatsError, match="precision: 'half' is unknown, expected one of no, bf16, fp16"):
        detect(detector, Image.new("RGB", (64, 64)), precision="half")
