"""A detector's options: declared once, and the same for configs, runs and commands."""

from dataclasses import asdict, fields

import pytest
from jsonargparse import ArgumentParser

from nats_zoo.detection import DetectorConfig, TrainConfig, create_detector
from nats_zoo.detection.models.options import DETECTOR_OPTIONS, FIXED_OPTIONS, DetectorOptions
from nats_zoo.search import SearchConfig

TINY = {"fpn_channels": 16, "head_size": 16, "min_size": 64, "max_size": 96, "anchor_sizes": (8, 16, 32, 64, 128)}


def test_a_detector_is_created_by_all_of_the_options():
    options = DetectorOptions(framework="fasterrcnn", backbone="resnet18", roi_samples=7, detections=3, **TINY)
    config = create_detector(num_classes=3, weights=None, **asdict(options)).config
    assert {name: getattr(config, name) for name in TINY} == TINY
    assert (config.roi_samples, config.detections, config.backbone) == (7, 3, "resnet18")


@pytest.mark.parametrize("kind", [DetectorConfig, TrainConfig, SearchConfig])
def test_what_inherits_the_options_declares_none_of_them_with_another_default(kind):
    own = {field.name: field.default for field in fields(kind)}
    base = {field.name: field.default for field in fields(DetectorOptions)}
    changed = {name for name in DETECTOR_OPTIONS if own[name] != base[name]}
    assert changed <= {"framework", "backbone", "trainable_layers"}


def test_what_the_weights_belong_to_is_fixed():
    assert set(FIXED_OPTIONS) < set(DETECTOR_OPTIONS)
    loaded = {"framework", "backbone", "masks", "fpn_channels", "head_size", "mask_channels", "anchor_sizes"}
    assert set(FIXED_OPTIONS) == loaded


@pytest.mark.parametrize("kind", [TrainConfig, SearchConfig])
def test_the_help_of_each_option_comes_from_its_declaration(kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    helps = {action.dest: action.help for action in parser._actions}
    missing = [field.name for field in fields(kind) if not (helps.get(field.name) or "").strip()]
    assert missing == []
    assert helps["anchor_sizes"].startswith("side of the anchors in pixels")
