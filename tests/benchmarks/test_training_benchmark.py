"""benchmarks/training.py: both loops train the same detector on the same images, and what is reported adds up."""

import csv
import importlib.util
from dataclasses import replace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from torch.nn.modules.batchnorm import _BatchNorm

from nats_zoo.detection.data.drawn import draw_dataset
from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "training.py"
TINY = ["--min-size", "64", "--max-size", "96", "--fpn-channels", "16", "--head-size", "16", "--roi-samples", "16"]
TINY += ["--batch", "2", "--steps", "2", "--rounds", "2", "--warmup", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("training_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_before():
    """accelerate keeps its first state, and the script sets the number of threads."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Drawn data with sparse ids, and weights with random batch norm statistics."""
    root = tmp_path_factory.mktemp("training_benchmark")
    data = draw_dataset(root / "data", train=6, val=1, test=0, size=64, distance=8)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", zero_init_last=False)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    timm.models.save_for_hf(model, root / "weights", safe_serialization=True)
    return ["--data", str(data), "--weights", str(root / "weights"), *TINY]


class Rounds:
    """Takes the place of a measurement: keeps what it is given."""

    def __init__(self, rounds: int, done: type[Exception]):
        self.rounds, self.done, self.found = rounds, done, []

    genotype = None

    def add_backbones(self, passes) -> None:
        assert not passes

    def add(self, images, ours, bare, checkpoint) -> None:
        self.found.append((images, ours, bare, checkpoint))
        if len(self.found) == self.rounds:
            raise self.done


def test_the_bare_detector_is_ours(benchmark, flags, tmp_path):
    config = benchmark.create_config(benchmark.parse_args(flags), str(tmp_path))
    trainer = benchmark.TimedTrainer(config, Rounds(1, benchmark.Done), 2)
    ours, bare = trainer.plain_detector, trainer.bare.detector
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (ours, bare)]
    assert trained[0] == trained[1]
    images, targets = zip(*(trainer.train_data[index] for index in range(3)), strict=True)
    losses = []
    for model in (ours, bare):
        torch.manual_seed(0)
        losses.append(model.train()([*images], [dict(target) for target in targets]))
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][key], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        next(p for p in bare.parameters() if p.requires_grad).mul_(1.5)
    torch.manual_seed(0)
    changed = bare([*images], [dict(target) for target in targets])
    assert any((changed[key] - value).abs() > 1e-3 for key, value in losses[0].items())


def test_both_loops_take_the_same_images_and_train(benchmark, flags, tmp_path):
    config = benchmark.create_config(benchmark.parse_args(flags), str(tmp_path))
    rounds = Rounds(3, benchmark.Done)
    trainer = benchmark.TimedTrainer(config, rounds, 2)
    before = [[p.detach().clone() for p in model.parameters()] for model in (trainer.detector, trainer.bare.detector)]
    seen, run = [], trainer.bare.run
    trainer.bare.run = lambda batches: (seen.append([list(batch) for batch in batches]), run(batches))
    with pytest.raises(benchmark.Done):
        trainer.run()
    ids = [image_id for batches in seen for batch in batches for image_id in batch]
    assert [len(batches) for batches in seen] == [2, 2, 2]
    assert sorted(ids) == sorted([*range(1, 7)] * 2), "two epochs of six images"
    assert [images for images, *_ in rounds.found] == [4, 4, 4]
    assert all(seconds.cpu > 0 and seconds.wall > 0 for _, *times in rounds.found for seconds in times)
    for model, old in zip((trainer.detector, trainer.bare.detector), before, strict=True):
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True))


def test_boxes_and_labels_are_those_of_our_data_set(benchmark, flags, tmp_path):
    config = replace(benchmark.create_config(benchmark.parse_args(flags), str(tmp_path)), flip=0.0)
    trainer = benchmark.TimedTrainer(config, Rounds(1, benchmark.Done), 2)
    for index, image_id in enumerate(trainer.train_data.image_ids):
        (image, target), (pixels, found) = trainer.train_data[index], trainer.bare.data[image_id]
        assert torch.equal(image, pixels)
        assert torch.equal(target["labels"], found["labels"])
        torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor), found["boxes"].as_subclass(torch.Tensor))


def test_a_checkpoint_is_charged_by_the_share_of_the_split(benchmark):
    args = benchmark.parse_args(["--data", "x", "--warmup", "1", "--rounds", "2"])
    measurement = benchmark.Measurement(args)
    measurement.split_images = 40
    seconds = benchmark.Seconds
    measurement.add(10, seconds(99, 99), seconds(1, 1), seconds(4, 4))  # warms up
    measurement.add(10, seconds(9, 19), seconds(8, 20), seconds(4, 4))
    with pytest.raises(benchmark.Done):
        measurement.add(10, seconds(7, 19), seconds(8, 10), seconds(4, 4))
    cpu, wall = measurement.rows()
    assert (cpu["ratio"], wall["ratio"]) == (
        pytest.approx((8 / 10 + 8 / 8) / 2),
        pytest.approx((20 / 20 + 10 / 20) / 2),
    )
    assert cpu["nats_images_per_second"] == pytest.approx(20 / 18)
    assert cpu["bare_images_per_second"] == pytest.approx(20 / 16)
    assert benchmark.goal_line([cpu, wall]) == "goal of at least 0.95: missed by the clock: cpu, wall"
    assert benchmark.goal_line([{"clock": "cpu", "ratio": 0.95}]) == "goal of at least 0.95: met"


def test_the_command_prints_a_table_and_writes_the_csv_file(benchmark, flags, tmp_path, capsys):
    path = tmp_path / "training.csv"
    assert benchmark.main([*flags, "--csv", str(path)]) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["clock"] for row in rows] == ["cpu", "wall"]
    assert all(row["rounds"] == "2" and row["images"] == "8" and row["weights"] == "weights" for row in rows)
    for row in rows:
        assert 0 < float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
    printed = capsys.readouterr().out
    assert "goal of at least 0.95: " in printed
    assert f"{float(rows[0]['ratio']):.3f}" in printed


def test_the_backbones_differ_in_their_dilations_alone(benchmark, flags, tmp_path):
    measurement = benchmark.Measurement(benchmark.parse_args(flags))
    measurement.genotype = benchmark.choose_genotype("uniform", "nats_resnet18", 0)
    config = benchmark.create_config(measurement.args, str(tmp_path))
    trainer = benchmark.TimedTrainer(config, measurement, 2)
    plain, nats = (trainer.backbones[name].detector for name in ("plain", "nats"))
    assert nats.backbone.body.genotype == measurement.genotype
    assert plain.state_dict().keys() == nats.state_dict().keys()
    assert all(torch.equal(tensor, nats.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert plain is not trainer.plain_detector
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (plain, nats)]
    assert trained[0] == trained[1]
    images = torch.rand(1, 3, 64, 64)
    a, b = (model.eval().backbone(images)["0"] for model in (plain, nats))
    assert (a - b).abs().max() > 1e-3


def test_passes_are_compared_backbone_to_backbone(benchmark, flags, tmp_path, capsys):
    path = tmp_path / "training.csv"
    assert benchmark.main([*flags, "--genotype", "default", "--csv", str(path)]) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["clock"], row["passes"]) for row in rows[2:]] == [
        (clock, passes) for passes in ("forward", "backward", "forward and backward") for clock in ("cpu", "wall")
    ]
    assert [row["passes"] for row in rows[:2]] == ["", ""]
    for row in rows[2:]:
        assert row["genotype"] == "default"
        assert row["rounds"] == "2"
        assert 0 < float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
    forward, backward, both = (float(row["nats_ms_per_image"]) for row in rows[2::2])
    assert forward + backward == pytest.approx(both)
    assert "forward and backward" in capsys.readouterr().out


def test_the_ratio_of_passes_is_taken_per_round(benchmark):
    measurement = benchmark.Measurement(benchmark.parse_args(["--data", "x", "--warmup", "1"]))
    seconds = benchmark.Seconds
    for ours in (9, 2, 3, 6):  # the first warms up
        measurement.add_backbones({"nats": dict.fromkeys(benchmark.PASSES, seconds(ours, 1)),
                                   "plain": dict.fromkeys(benchmark.PASSES, seconds(2, 1))})  # fmt: skip
        measurement.left = 0
    measurement.images = [5, 5, 5]
    row = measurement._pass_row("cpu", ("forward",))
    assert (row["ratio"], row["nats_ms_per_image"], row["plain_ms_per_image"]) == (
        1.5,
        pytest.approx(1000 * 11 / 15),
        400,
    )


def test_bad_input_is_one_line(benchmark, tmp_path, capsys):
    assert benchmark.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("training: ")
