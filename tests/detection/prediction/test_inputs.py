"""The command's path on a tiny drawn data set: train on a genotype, evaluate, predict, publish (dry run)."""

import json
import shutil
from functools import partial

import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timm.models import save_for_hf
from torchvision.transforms.v2 import functional as F

from nats_zoo import Genotype, NatsError
from nats_zoo.cli import commands as cli
from nats_zoo.detection import from_pretrained
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.prediction.predict import detect, find_images, open_image, predict_images

GENOTYPE = {
    "format": 1,
    "architecture": "resnet18",
    "convs": {"layer2.0.conv2": [[32, 1, 1], [96, 1, 3]], "layer3.1.conv2": [[128, 3, 1], [128, 2, 2]]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, randomise_bn):
    """Data, weights, a genotype, and `run`, what `nats train` made of them in the folder's own terms."""
    folder = tmp_path_factory.mktemp("home")
    draw_dataset(folder / "data", train=4, val=3, test=2, size=64, distance=10)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3, zero_init_last=False)
    randomise_bn(model, torch.Generator().manual_seed(1))
    save_for_hf(model, folder / "weights", safe_serialization=True)
    (folder / "genotype.json").write_text(json.dumps(GENOTYPE))
    options = {
        **{"data": "data", "weights": "weights", "output": "run", "backbone": "nats_resnet18"},
        **{"genotype": "genotype.json", "fpn_channels": 16, "head_size": 16, "min_size": 64, "max_size": 96},
        **{"anchor_sizes": "[8, 16, 32, 48, 64]", "calibration_images": 4, "epochs": 2, "lr_per_image": 0.002},
        **{"batch_size": 2, "workers": 0, "warmup_steps": 2},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]) == 0
    return folder


@pytest.fixture(scope="module")
def detector(home):
    return from_pretrained(home / "run" / "model")


@pytest.fixture
def here(home, monkeypatch):
    """`home` as the working folder."""
    monkeypatch.chdir(home)
    return home


def read(path):
    return json.loads(path.read_text())


# --- train and evaluate -----------------------------------------------------------------------------------------------


def test_training_writes_a_detector_that_runs_the_genotype(home, detector):
    names = {path.name for path in (home / "run").iterdir()}
    assert names == {"run.json", "log.jsonl", "checkpoints", "model", "best", "metrics.json", "curves.png"}
    genotype = Genotype.from_dict(detector.config.genotype)
    assert genotype.convs == Genotype.from_dict(GENOTYPE).convs
    assert detector.backbone.body.get_submodule("layer3.1.conv2").runs == genotype.convs["layer3.1.conv2"]
    assert detector.config.classes == ("blue", "vermilion", "yellow")


def evaluate(home, split):
    """The folder that `nats evaluate` wrote."""
    arguments = ["evaluate", "run/model", "data", "--split", split, "--workers", "0", "--output", f"on_{split}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(arguments) == 0
    return home / f"on_{split}"


def test_evaluation_of_the_saved_detector_is_that_of_the_trained_one(home):
    metrics = read(evaluate(home, "val") / "metrics.json")
    assert [metrics.pop(key) for key in ("split", "transpose", "batch_size")] == ["val", False, 1]
    assert metrics == read(home / "run" / "metrics.json")
    assert list(metrics["per_class"]) == ["blue", "vermilion", "yellow"]


def write_truth_it_finds(home, detector, split, keep):
    """Annotations of the validation images: what the detector itself finds there, a part of it by rank of score."""
    content = read(home / "data" / "annotations" / "instances_val.json")
    content["annotations"] = []
    for image in content["images"]:
        found = detect(detector, open_image(home / "data" / "images" / image["file_name"]), 0.0)
        content["annotations"] += [_annotation(image["id"], row) for row in found]
    ranked = sorted(content["annotations"], key=lambda entry: -entry.pop("score"))
    content["annotations"] = [{"id": n, **entry} for n, entry in enumerate(ranked[keep], start=1)]
    (home / "data" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _annotation(image_id, row):
    x1, y1, x2, y2 = row["box"]
    box = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image_id, "category_id": row["label"], "bbox": box, "iscrowd": 0, "score": row["score"]}


def test_what_the_detector_finds_itself_it_finds_perfectly(home, detector):
    write_truth_it_finds(home, detector, "own", slice(0, 12))
    assert read(evaluate(home, "own") / "metrics.json")["ap"] == pytest.approx(100)


def test_results_are_in_cocos_format_and_give_the_metrics(home, detector):
    write_truth_it_finds(home, detector, "half", slice(0, None, 2))
    evaluated = evaluate(home, "half")
    content = read(home / "data" / "annotations" / "instances_half.json")
    truth = COCO()
    truth.dataset = content
    for entry in content["annotations"]:
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(str(evaluated / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = read(evaluated / "metrics.json")
    assert 10 < metrics["ap"] < 90
    assert [metrics["ap"], metrics["ap50"]] == pytest.approx([100 * value for value in evaluation.stats[:2]])


def test_evaluation_prints_a_table_and_writes_nothing_unasked(here, capsys):
    before = sorted(here.iterdir())
    assert cli.main(["evaluate", "run/model", "data", "--split", "val", "--workers", "0"]) == 0
    table = capsys.readouterr().out
    for word in ("AP", "AP50", "APl", "vermilion"):
        assert word in table
    assert sorted(here.iterdir()) == before


# --- predict ----------------------------------------------------------------------------------------------------------


def expected_boxes(detector, file, threshold):
    """What the detector itself finds on the file's pixels."""
    with Image.open(file) as image:
        pixels = F.pil_to_tensor(image.convert("RGB")).float() / 255
    with torch.no_grad():
        (output,) = detector([pixels])
    near = partial(pytest.approx, abs=1e-5)  # float32: processors of other kinds add in other orders
    names = detector.config.classes
    rows = zip(output["boxes"].tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True)
    return [
        {"box": pytest.approx(box, abs=1e-3), "label": label, "name": names[label - 1], "score": near(score)}
        for box, label, score in rows
        if score >= threshold
    ]


def test_predictions_are_the_detectors(here, detector, tmp_path, capsys):
    files = ["data/images/val_00000.png", "data/images/val_00001.png"]
    found = expected_boxes(detector, files[0], 0)
    scores = sorted(row["score"].expected for row in found)
    threshold = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2  # leaves half of them out
    out = tmp_path / "out"
    assert cli.main(["predict", "run/model", *files, "--output", str(out), "--threshold", str(threshold)]) == 0
    predictions = read(out / "predictions.json")
    assert predictions == {file: expected_boxes(detector, file, threshold) for file in files}
    assert 0 < len(predictions[files[0]]) < len(found)

    *said, speed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == files
    assert speed.startswith("2 images, too few to tell a speed")
    assert {path.name for path in out.iterdir()} == {"predictions.json", "val_00000.png", "val_00001.png"}
    with Image.open(out / "val_00000.png") as picture, Image.open(files[0]) as image:
        assert picture.format == "PNG"
        assert picture.width % image.width == 0  # small images are enlarged by a whole factor
        enlarged = image.convert("RGB").resize(picture.size, Image.Resampling.NEAREST)
        assert picture.convert("RGB").tobytes() != enlarged.tobytes()


def test_boxes_above_a_threshold_that_none_reaches(here, tmp_path):
    *lines, _ = predict_images("run/model", ["data/images/val_00000.png"], str(tmp_path / "out"), 1.0)
    assert lines == [
        f"data/images/val_00000.png: no box with a score of 1 or more, drawn in {tmp_path / 'out' / 'val_00000.png'}"
    ]
    assert read(tmp_path / "out" / "predictions.json") == {"data/images/val_00000.png": []}


def test_a_folder_stands_for_its_images(home):
    images = home / "data" / "images"
    assert find_images([str(images)]) == sorted(images.glob("*.png"))
    one = images / "val_00000.png"
    others = [file for file in sorted(images.glob("*.png")) if file != one]
    assert find_images([str(one), str(images)]) == [one, *others]  # each once


def test_images_of_one_name_get_pictures_of_their_own(here, tmp_path):
    twin = tmp_path / "twin"
    twin.mkdir()
    with Image.open("data/images/test_00000.png") as image:
        image.convert("RGB").save(twin / "val_00000.jpg")
    files = ["data/images/val_00000.png", str(twin / "val_00000.jpg")]
    *lines, _ = predict_images("run/model", files, str(tmp_path / "out"), 0.0)
    assert [line.split()[-1] for line in lines] == [
        str(tmp_path / "out" / name) for name in ("val_00000.png", "val_00000_2.png")
    ]
    assert (tmp_path / "out" / "val_00000_2.png").is_file()
    assert list(read(tmp_path / "out" / "predictions.json")) == files


def test_images_are_turned_upright_and_made_rgb(tmp_path, detector):
    flat = Image.new("L", (80, 64))
    flat.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    flat.save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert (image.mode, image.size) == ("RGB", (64, 80))
    assert image.getpixel((63, 0)) == (255, 255, 255)
    boxes = [row["box"] for row in detect(detector, image, 0.0)]
    assert boxes
    assert max(box[3] for box in boxes) <= 80
    assert max(box[2] for box in boxes) <= 64


def test_other_files_in_the_output_folder_stay(here, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    list(predict_images("run/model", ["data/images/val_00000.png"], str(tmp_path), 0.5))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "predictions.json", "val_00000.png"}


def test_a_bad_model_leaves_no_folder_behind(here, tmp_path):
    with pytest.raises(NatsError, match="framework"):
        list(predict_images("weights", ["data/images"], str(tmp_path / "out"), 0.5))
    assert not (tmp_path / "out").exists()


# --- publish ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_be_published(here, capsys):
    assert cli.main(["publish", "run/model", "org/tiny", "--tag", "v1", "--dry_run", "true"]) == 0
    listing = capsys.readouterr().out
    assert listing.startswith("org/tiny (public), branch main, tag v1:\n")
    listed = {name: size for name, size, unit in map(str.split, listing.splitlines()[1:-1]) if unit == "bytes"}
    files = {path.name: f"{path.stat().st_size:,}" for path in (here / "run" / "model").iterdir()}
    files["README.md"] = listed["README.md"]  # the repository's name goes into it
    assert listed == files


@pytest.mark.parametrize(("repo", "expected"), [("tiny", "tiny: neither"), ("a/b/c", "a/b/c: neither")])
def test_a_repository_needs_an_owner_and_a_name(repo, expected, here, capsys):
    assert cli.main(["publish", "run/model", repo, "--dry_run", "true"]) == 2
    assert capsys.readouterr().err.startswith(f"nats: {expected}")


def test_weights_of_another_genotype_are_neither_evaluated_nor_used(here, tmp_path, capsys):
    model = shutil.copytree("run/model", tmp_path / "model")
    config = read(model / "config.json")
    config["genotype"]["convs"]["layer2.0.conv2"][1][1] += 1
    (model / "config.json").write_text(json.dumps(config))
    for arguments in (["evaluate", str(model), "data"], ["predict", str(model), "data/images", "--output", "out"]):
        assert cli.main(arguments) == 2
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1
        assert "belong to another genotype" in errors
    assert not (here / "out").exists()
