"""The demo from end to end on a few images: its stages, what they leave, its figures, and going on after a stop."""

import dataclasses
import json
import re

import pytest
import timm
import torch
import yaml
from PIL import Image

from nats_zoo import Genotype
from nats_zoo.cli import commands as cli
from nats_zoo.detection import CocoDataset
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.data.relations import draw_relations, relation_images
from nats_zoo.search import SearchConfig
from nats_zoo.search.demo import stages
from nats_zoo.search.demo.pretraining import normalised, pretrain
from nats_zoo.search.demo.results import share_right

SHOWN = ("detections.png", "genotype.png", "receptive_fields.png")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which a demo of a few images stopped before its last two networks, and then went on."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "IMAGES", {"classifier": 128, "small": 8, "train": 8, "test": 5})
        whole = stages._stages
        patch.setattr(stages, "_stages", lambda *where: whole(*where)[:5])
        patch.setattr(stages, "write_results", lambda *_: "stopped here")
        assert cli.main(["demo", "--output", str(folder), "--seed", "1"]) == 0
        patch.undo()
        patch.setattr(stages, "IMAGES", {"classifier": 128, "small": 8, "train": 8, "test": 5})
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
        assert cli.main(["demo", "--output", str(folder), "--seed", "1"]) == 0
        assert before
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())
        yield folder


def test_it_ends_in_a_table_of_equal_networks_and_pictures(demo):
    figures = json.loads((demo / "results.json").read_text())
    assert list(figures) == ["plain", "random", "nats"]
    for name in ("parameters", "multiply_adds"):
        assert len({row[name] for row in figures.values()}) == 1
    rows = (demo / "table.txt").read_text().splitlines()
    assert rows[0].split() == ["AP", "classes", "right", "parameters", "multiply-adds", "ms"]
    assert [row.split()[0] for row in rows[1:]] == ["plain", "random", "NATS"]
    assert f"{figures['nats']['right']:.0f}%" in rows[3]
    for name in SHOWN:
        with Image.open(demo / name) as picture:
            assert min(picture.size) > 300
    assert Genotype.load(demo / "search" / "genotype.json").provenance["freeze_weights"] is True


def test_a_finished_demo_only_shows_its_table(demo, capsys):
    assert cli.main(["demo", "--output", str(demo), "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert (demo / "table.txt").read_text().rstrip() in said
    assert "[1/" not in said


def test_a_demo_of_another_seed_needs_another_folder(demo, capsys):
    before = (demo / "table.txt").read_text()
    assert cli.main(["demo", "--output", str(demo), "--seed", "2"]) == 2
    assert re.search("^nats: .*small_data: expected a data set drawn with .*'seed': 2", capsys.readouterr().err)
    assert (demo / "table.txt").read_text() == before


def test_lines_say_which_stage_runs_and_what_is_left(capsys, tmp_path, monkeypatch):
    clock = iter([0.0, 60.0, 120.0])
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(clock))
    done = tmp_path / "done"
    done.touch()
    places = {
        "first": (5, done),
        "second": (1, tmp_path / "a"),
        "third": (1, tmp_path / "b"),
        "last": (3, tmp_path / "c"),
    }
    stages._run_stages([stages.Stage(title, *place, lambda: None) for title, place in places.items()])
    assert capsys.readouterr().out.splitlines() == [
        "[2/4] second",
        "[3/4] third, about 4 min left",
        "[4/4] last, about 3 min left",
    ]


def test_the_searches_of_the_demo_and_of_the_recipe_for_small_data_are_the_same():
    with open("recipes/small_data_search.yaml", encoding="utf-8") as file:
        recipe = yaml.safe_load(file)
    shared = {key: value for key, value in stages.SEARCH.items() if key != "basic_block"}
    assert {key: recipe[key] for key in shared} == shared
    assert recipe.keys() <= {field.name for field in dataclasses.fields(SearchConfig)}


def test_the_classifier_learns_the_relation(tmp_path):
    network = timm.create_model("test_resnet", num_classes=8)
    folder = pretrain(tmp_path / "classifier", "test_resnet", images=6400, seed=0)
    network = timm.create_model("test_resnet", pretrained=True, num_classes=8, pretrained_cfg_overlay={
        "file": str(folder / "model.safetensors"), "num_classes": 8}).eval()  # fmt: skip
    images, directions = zip(*relation_images(64, seed=99), strict=True)
    with torch.no_grad():
        found = network(normalised(torch.stack([torch.from_numpy(image) for image in images]), network.pretrained_cfg))
    assert (found.argmax(1) == torch.tensor(directions)).float().mean() > 0.8


def test_the_share_of_right_classes_is_that_of_the_best_box_on_each_object(tmp_path):
    data = CocoDataset(*find_split(draw_relations(tmp_path / "drawn", train=4, test=0), "train"))
    rows = []
    for index in range(len(data)):
        target = data[index][1]
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            row = {"image_id": int(target["image_id"]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            rows.append({**row, "category_id": label, "score": 0.6})
            rows.append({**row, "category_id": label % 8 + 1, "score": 0.5})
            far = [(x1 + 40) % 150, y1, 20, 20]
            rows.append({**row, "bbox": far, "category_id": label % 8 + 1, "score": 0.9})
    assert share_right(data, rows) == 1
    worse = [{**row, "score": 1.0 if row["score"] == 0.5 and row["image_id"] == 1 else row["score"]} for row in rows]
    objects = [int(data[index][1]["image_id"]) for index in range(len(data)) for _ in data[index][1]["boxes"]]
    assert share_right(data, worse) == pytest.approx(1 - objects.count(1) / len(objects))
    assert share_right(data, []) == 0
