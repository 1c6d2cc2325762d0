"""Model cards: what a run says of itself, metadata as the Hub reads it, and what only the publisher knows."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load

import nats_zoo
from nats_zoo import Genotype, NatsError, __version__
from nats_zoo.base.run_facts import BaseWeights, RunFacts
from nats_zoo.base.text import code_block
from nats_zoo.cli import main
from nats_zoo.detection import Metrics, TrainConfig, create_detector, save_detector
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.runs.facts import base_weights
from nats_zoo.publishing.card_options import CardOptions

SIZES = {"fpn_channels": 8, "head_size": 8, "min_size": 64, "max_size": 96}
BOXES = {"cat": {"ap": 12.26, "ap50": 30.0}, "a | b": {"ap": None, "ap50": None}}
MASKS = Metrics(9.5, 20.0, None, *[None] * 9, per_class={"cat": {"ap": 9.5, "ap50": 20.0}})
METRICS = Metrics(12.25, 30.0, None, *[None] * 9, per_class=BOXES, mask=MASKS)
BASE = BaseWeights(name="timm's resnet18.tv_in1k", hub_id="timm/resnet18.tv_in1k", license="bsd-3-clause")
RUN = RunFacts(
    command="nats train --data pets",
    settings={"data": "pets", "train_split": "train", "note": "```\n# not a heading"},
    dataset="Pets 2",
    split="val",
    data={"train": "7 images, 9 boxes, 2 classes"},
    hardware={"device": "CPU", "processes": "1"},
    base=BASE,
)


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """The folder of a detector with masks and a run's facts."""
    options = {**SIZES, "mask_channels": 8, "weights": None, "classes": ("cat", "a | b"), "category_ids": (1, 2)}
    detector = create_detector("maskrcnn", "mobilenetv3_small_050", 3, **options)
    return save_detector(detector, tmp_path_factory.mktemp("cards") / "model", METRICS, "Pets 2 val", RUN)


def facts(card: ModelCard) -> list[tuple]:
    return [
        (r.task_type, r.dataset_name, r.dataset_type, r.dataset_split, r.metric_type, r.metric_name, r.metric_value)
        for r in card.data.eval_results
    ]


def test_the_metadata_round_trips_through_the_hubs_own_reader(masked):
    path = masked / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "nats-zoo"
    assert card.data.pipeline_tag == "image-segmentation"
    assert (card.data.license, card.data.base_model) == ("bsd-3-clause", "timm/resnet18.tv_in1k")
    assert {"nats-zoo", "nats-zoo-detector", "maskrcnn", "instance-segmentation"} <= set(card.data.tags)
    on = ("Pets 2 val", "pets-2", "val")
    assert facts(card) == [
        ("object-detection", *on, "mAP", "box AP", 12.25),
        ("object-detection", *on, "mAP@0.5", "box AP50", 30.0),
        ("image-segmentation", *on, "mAP", "mask AP", 9.5),
        ("image-segmentation", *on, "mAP@0.5", "mask AP50", 20.0),
    ]
    assert metadata_load(path) == card.data.to_dict()
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_card_states_what_the_run_was(masked):
    card = (masked / "README.md").read_text(encoding="utf-8")
    for words in (
        *(
            "## Metrics on Pets 2 val",
            "| ap | 12.2 |",
            "| mask ap | 9.5 |",
            "| class | AP | AP50 | mask AP | mask AP50 |",
        ),
        *("| cat | 12.3 | 30.0 | 9.5 | 20.0 |", "| a \\| b | - | - | - | - |"),
        *("Trained on 7 images, 9 boxes, 2 classes: what these do not show", "```bash\nnats train --data pets\n```"),
        *("| device | CPU |", "| this model | bsd-3-clause, as its base weights |", "| training data | not stated |"),
        *("| base weights | bsd-3-clause (timm/resnet18.tv_in1k) |", "## Intended use and limits", "@inproceedings{"),
    ):
        assert words in card
    # a setting with a code fence in it does not end the block
    settings = re.search(r"^````yaml\n(.*?)\n````$", card, re.DOTALL | re.MULTILINE)[1]
    assert yaml.safe_load(settings) == RUN.settings


@pytest.mark.parametrize(("text", "fence"), [("a", "```"), ("a ``` b", "````"), ("`````", "``````")])
def test_no_text_ends_its_code_block(text, fence):
    assert code_block(text, "x") == f"{fence}x\n{text}\n{fence}"


@pytest.mark.usefixtures("fresh_accelerate", "one_thread")
def test_a_trained_folder_has_the_whole_card_and_its_settings_repeat_the_run(tmp_path, monkeypatch, capsys):
    draw_dataset(tmp_path / "drawn", train=4, val=2, test=0, size=64)
    Genotype("resnet18", {"layer4.0.conv2": [[512, 1, 2]]}).save(tmp_path / "genotype.json")
    arguments = ["train", "--data", "drawn", "--backbone", "nats_resnet18", "--genotype", "genotype.json"]
    arguments += ["--weights", "null", "--epochs", "1", "--workers", "0", "--output", "run", "--roi_samples", "16"]
    for key, value in SIZES.items():
        arguments += [f"--{key}", str(value)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nats", *arguments])
    assert main(arguments) == 0
    text = Path("run/model/README.md").read_text(encoding="utf-8")
    assert shlex.split(re.search(r"```bash\n(nats train .*?)\n```", text)[1]) == ["nats", *arguments]
    recipe = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL)[1]
    run = json.loads(Path("run/run.json").read_text())
    assert yaml.safe_load(recipe) == run
    metrics = json.loads(Path("run/metrics.json").read_text())
    for words in (
        *("## Metrics on drawn val", "- train: 4 images, ", "- val: 2 images, ", "| processes | 1 |"),
        *(f"| torch | {torch.__version__} |", f"| timm | {timm.__version__} |", f"| nats-zoo | {__version__} |"),
        *("| precision | float32 |", "| base weights | none: it began with random ones |", "license: unknown\n"),
    ):
        assert words in text
    for name, row in metrics["per_class"].items():
        assert re.search(rf"^\| {name} \| {'-' if row['ap'] is None else format(row['ap'], '.1f')} \|", text, re.M)

    Path("recipe.yaml").write_text(recipe)
    assert main(["train", "--config", "recipe.yaml", "--output", "again"]) == 0
    assert json.loads(Path("again/metrics.json").read_text()) == metrics
    assert {**json.loads(Path("again/run.json").read_text()), "output": "run"} == run


def test_the_base_weights_are_named_with_timms_licence(tmp_path):
    detector = create_detector("fasterrcnn", "mobilenetv3_small_050", 2, weights=None, **SIZES)
    options = {"data": "d", "output": "o", "backbone": "mobilenetv3_small_050"}
    found = base_weights(TrainConfig(**options), detector)
    assert (found.hub_id, found.license) == ("timm/mobilenetv3_small_050.lamb_in1k", "apache-2.0")
    assert base_weights(TrainConfig(**options, weights=None), detector) is None
    assert base_weights(TrainConfig(**options, weights="org/name"), detector).hub_id == "org/name"
    begun = base_weights(TrainConfig(**options, init="org/other@v2"), detector)
    assert begun == BaseWeights(name="org/other@v2", hub_id="org/other")
    local = base_weights(TrainConfig(**options, weights=str(tmp_path)), detector)
    assert local == BaseWeights(name=tmp_path.name)
    gone = base_weights(TrainConfig(**options, weights=str(tmp_path / "gone")), detector)
    assert gone == BaseWeights(name="gone")


def test_a_backbones_figures_are_stated_with_their_data(tmp_path):
    model = timm.create_model("nats_resnet18", channels=(4, 4, 8, 8), genotype=Genotype("resnet18", {}), num_classes=2)
    folder = nats_zoo.save_backbone(model, tmp_path / "model", {"AP": 31.5, "note": "short"}, evaluated_on="Pets val")
    card = ModelCard.load(folder / "README.md")
    assert facts(card) == [("image-feature-extraction", "Pets val", "pets-val", None, "AP", "AP", 31.5)]
    assert (card.data.library_name, card.data.license) == ("timm", "bsd-3-clause")
    for words in ("## Metrics on Pets val", "| note | short |", "if it began with them", "Output channels of these"):
        assert words in card.text


# --- what only the publisher knows ------------------------------------------------------------------------------------


def test_what_the_publisher_states_goes_into_metadata_and_table(masked):
    before = (masked / "README.md").read_text(encoding="utf-8")
    assert CardOptions().fill(before, "card") == before
    options = CardOptions(
        license="other",
        license_name="pets-1.0",
        license_link="https://example.org/pets",
        data_license="CC BY 4.0 | by hand",
        dataset="org/pets",
        weights_license="mit",
    )
    text = options.fill(before, "card")
    card = ModelCard(text)
    assert (card.data.license, card.data.license_name) == ("other", "pets-1.0")
    assert card.data.license_link == "https://example.org/pets"
    assert card.data.datasets == ["org/pets"]
    assert {result.dataset_type for result in card.data.eval_results} == {"org/pets"}
    assert card.data.base_model == "timm/resnet18.tv_in1k"
    for row in (
        "| this model | [pets-1.0](https://example.org/pets) |",
        "| training data | CC BY 4.0 \\| by hand (org/pets) |",
        "| base weights | mit (timm/resnet18.tv_in1k) |",
    ):
        assert row in text
    assert options.fill(text, "card") == text, "it can be stated twice"

    changed = CardOptions(license="cc-by-4.0", base_model="org/base").fill(text, "card")
    data = ModelCard(changed).data
    assert (data.license, data.license_name, data.license_link, data.base_model) == (
        "cc-by-4.0",
        None,
        None,
        "org/base",
    )
    assert "| base weights | mit (org/base) |" in changed
    assert "| training data | CC BY 4.0 \\| by hand (org/pets) |" in changed


def test_what_was_written_into_a_card_by_hand_stays(masked):
    before = (masked / "README.md").read_text(encoding="utf-8")
    card = (
        before.replace("## Use\n", "## Thanks\n\n| this model | is Ann's |\n\n## Use\n")
        + "\n## See also\n\nThe paper.\n"
    )
    text = CardOptions(license="mit").fill(card, "card")
    assert "| this model | mit |" in text
    stated = CardOptions(license="mit").fill(before, "card")
    assert (
        text
        == stated.replace("## Use\n", "## Thanks\n\n| this model | is Ann's |\n\n## Use\n")
        + "\n## See also\n\nThe paper.\n"
    )


@pytest.mark.parametrize("kind", ["any", "variant", "detector", "genotype"])
def test_a_card_of_an_earlier_version_is_filled_in_from_what_it_says(kind):
    path = Path(__file__).parents[1] / "whole" / "saved_by_0_1_0" / kind / "README.md"
    card = path.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (this model|training data|base weights) \| (.*) \|$", card, re.M))
    text = CardOptions(license="mit", dataset="org/pets").fill(card, str(path))
    expected = {**rows, "this model": "mit", "training data": f"{rows['training data']} (org/pets)"}
    assert dict(re.findall(r"^\| (this model|training data|base weights) \| (.*) \|$", text, re.M)) == expected
    assert ModelCard(text).data.license == "mit"
    assert (
        text.partition("\n# ")[2].partition("## Licences")[0] == card.partition("\n# ")[2].partition("## Licences")[0]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"license": "MIT"}, "license: expected a name as the Hub writes it"),
        ({"license": "other"}, "license_name: goes with the license 'other'"),
        ({"license_name": "mine", "license_link": "https://x.y"}, "license_name: goes with the license 'other'"),
        ({"license": "other", "license_name": "mine"}, "license_link: goes with the license 'other'"),
        (
            {"license": "other", "license_name": "My own", "license_link": "https://x.y"},
            "license_name: expected a name",
        ),
        ({"license": "other", "license_name": "mine", "license_link": "LICENSE"}, "license_link: expected the address"),
        ({"data_license": " "}, "data_license: expected the licence's name"),
        ({"weights_license": "a b"}, "weights_license: expected a name"),
        ({"dataset": "a/b/c"}, "dataset: expected an id on the Hub"),
        ({"base_model": "a b"}, "base_model: expected an id on the Hub"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_by_its_option(options, words):
    with pytest.raises(NatsError, match=re.escape(words)) as error:
        CardOptions(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("# By hand\n", "has no line '| this model | ... |'"),
        ("---\nmodel-index: 3\n---\n| this model | x |\n", "the metadata at its head can not be read"),
        ("---\n- a\n---\n| this model | x |\n", "the metadata at its head can not be read"),
        ("---\na: [\n---\n| this model | x |\n", "the metadata at its head can not be read"),
    ],
)
def test_a_card_that_can_not_be_filled_in_is_named(card, words):
    with pytest.raises(NatsError, match=re.escape(f"my/README.md: {words}")) as error:
        CardOptions(license="mit").fill(card, "my/README.md")
    assert "\n" not in str(error.value)
