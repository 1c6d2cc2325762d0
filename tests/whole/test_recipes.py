"""Recipes: each parses with the command at its head, and those for COCO start on data of COCO's shape."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from nats_zoo import NatsError
from nats_zoo.detection import TrainConfig, Trainer, from_pretrained
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.genotype.catalogue import default_genotype
from nats_zoo.search import SearchConfig
from tests.support.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
COCO_TRAINING = [path for path in RECIPES if re.fullmatch(r"coco_.*_1x", path.stem)]
CONFIGS = {"train": TrainConfig, "search": SearchConfig}

# Of PAPER.md's rows: AP on COCO, plain and NATS.
PUBLISHED = {
    "coco_fasterrcnn_r50_1x": ("fasterrcnn", "resnet50", 36.4, 38.4),
    "coco_fasterrcnn_r101_1x": ("fasterrcnn", "resnet101", 38.6, 40.4),
    "coco_fasterrcnn_x101_32x4d_1x": ("fasterrcnn", "resnext101_32x4d", 40.5, 41.6),
    "coco_maskrcnn_r50_1x": ("maskrcnn", "resnet50", 37.5, 39.3),
    "coco_cascade_rcnn_r50_1x": ("cascade_rcnn", "resnet50", 40.7, 42.0),
    "coco_retinanet_r50_1x": ("retinanet", "resnet50", 36.0, 37.3),
}

# Small images and heads, random weights, and no precision but float32.
TINY = {
    **{"weights": None, "fpn_channels": 16, "head_size": 16, "mask_channels": 16, "roi_samples": 16},
    **{"min_size": 64, "max_size": 96, "precision": "no", "workers": 0, "batch_size": 1, "val_split": None},
}


def head(path: Path) -> list[str]:
    """The comment at a recipe's head, a line each."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]


def command_lines(path: Path) -> list[list[str]]:
    """The words of each command at the head that begins with what one types."""
    found = [re.search(r"(?:nats|-m nats_zoo) (train|search|evaluate) .*", line) for line in head(path)]
    return [shlex.split(match[0].removeprefix("-m nats_zoo ").removeprefix("nats ")) for match in found if match]


def parse(words: list[str]) -> TrainConfig | SearchConfig:
    """The config that `nats train` or `nats search` makes of its options."""
    config = CONFIGS[words[0]]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config, as_group=False)
    options = parser.instantiate(parser.parse_args(words[1:])).as_dict()
    options.pop("config")
    return config(**options)


def own_words(path: Path) -> list[str]:
    """A training or search with the recipe, by the head or, where that names a benchmark, by the recipe's name."""
    for words in command_lines(path):
        if words[0] in CONFIGS and f"recipes/{path.name}" in words:
            return words
    raise AssertionError(f"{path.name}: its head shows no command with it")


def as_words(options: dict) -> list[str]:
    """As one types them."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text)]


@pytest.fixture
def at_root(monkeypatch):
    """Commands name recipes from the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_with_the_command_at_its_head(path, at_root):
    words = own_words(path)
    config = parse(words)
    for key, value in yaml.safe_load(path.read_text()).items():
        found = getattr(config, key)
        assert (list(found) if isinstance(found, tuple) else found) == value, key
    for option in ("data", "output"):
        assert getattr(config, option) == words[words.index(f"--{option}") + 1]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_tells_the_time_the_ap_and_the_command(path):
    text = " ".join(head(path))
    assert "Expected time" in text
    assert re.search(r"Command(, NATS)?: ", text)
    assert "AP" in text or "search" in path.stem or "scratch" in path.stem


def test_an_option_that_does_not_exist_is_refused(tmp_path, at_root):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[0].read_text() + "epoch: 3\n")
    with pytest.raises(Exception, match="epoch"):
        parse([own_words(RECIPES[0])[0], "--config", str(recipe), "--data", "x", "--output", "y"])


def test_there_is_a_recipe_for_each_published_row():
    assert {path.stem for path in COCO_TRAINING} == PUBLISHED.keys()


@pytest.mark.parametrize("path", COCO_TRAINING, ids=lambda path: path.stem)
def test_a_coco_recipe_is_the_published_training(path, at_root):
    framework, network, plain, nats = PUBLISHED[path.stem]
    config = parse(own_words(path))
    assert config.framework == framework
    assert config.backbone.partition(".")[0] == f"nats_{network}"
    assert default_genotype(network)
    assert (config.epochs, config.lr_steps, config.weight_decay, config.momentum) == (13, (8, 11), 1e-4, 0.9)
    assert (config.train_split, config.val_split, config.norm) == ("train2017", "val2017", "sync")
    assert config.batch_size * 8 == 16
    assert config.lr_per_image == pytest.approx(0.00125 if framework != "retinanet" else 0.01 / 16)
    assert f"plain {plain}, NATS {nats}." in " ".join(head(path))
    assert "--num_processes 8" in " ".join(head(path))


@pytest.fixture(scope="module")
def coco_sample(tmp_path_factory) -> Path:
    """Drawn images under COCO's names, with sparse category ids as COCO has them."""
    root = tmp_path_factory.mktemp("coco_sample")
    drawn = draw_dataset(root / "drawn", train=3, val=1, test=0, size=64, distance=8)
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        content = json.loads((drawn / "annotations" / f"instances_{split}.json").read_text())
        for entry in content["categories"]:
            entry["id"] *= 30
        for entry in content["annotations"]:
            entry["category_id"] *= 30
        (root / "coco" / f"{split}2017").mkdir()
        for entry in content["images"]:
            name = f"{entry['id']:012d}.png"
            (drawn / "images" / entry["file_name"]).rename(root / "coco" / f"{split}2017" / name)
            entry["file_name"] = name
        (root / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root / "coco"


def starting(path: Path):
    """The larger networks take over half a minute on a busy machine."""
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if "101" in path.stem else [])


@pytest.mark.parametrize("path", map(starting, COCO_TRAINING))
def test_a_coco_recipe_starts(path, coco_sample, tmp_path, at_root):
    words = own_words(path)
    words[words.index("--data") + 1] = str(coco_sample)
    words[words.index("--output") + 1] = str(tmp_path / "run")
    Trainer(parse(words + as_words({**TINY, "epochs": 1}))).run()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["data"]["train2017"]["images"] == 3
    assert records[-1]["step"] == 3
    detector = from_pretrained(tmp_path / "run" / "model")
    assert detector.config.category_ids == (30, 60, 90)
    assert detector.config.genotype is not None
    assert detector.config.masks == ("loss_mask" in records[-1]) == ("maskrcnn" in path.stem)


def test_the_recipe_for_small_data_starts_and_evaluates(coco_sample, tmp_path, at_root):
    words = own_words(ROOT / "recipes" / "small_data.yaml")
    words[words.index("--data") + 1] = str(coco_sample)
    words[words.index("--output") + 1] = str(tmp_path / "run")
    options = {**TINY, "backbone": "nats_resnet18", "epochs": 2, "train_min_sizes": [48, 64], "batch_size": 2}
    options |= {"train_split": "train2017", "val_split": "val2017"}
    config = parse(words + as_words(options))
    assert config.ema
    assert Trainer(config).run() is not None
    with pytest.raises(NatsError, match="already holds a run"):
        Trainer(config)
