"""benchmarks/planted.py: genotypes planted into a ResNet are found, on crops large enough, and counted honestly."""

import contextlib
import csv
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nats_zoo import NatsError, RegroupedConv2d
from nats_zoo.search import SPACES, find_space
from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "planted.py"
CONVS = ("layer2.0.conv2", "layer3.0.conv2")


@pytest.fixture(scope="module")
def planted_resnet():
    spec = importlib.util.spec_from_file_location("planted_resnet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Images of noise, one of them small, in two folders, and a space for which crops of 96 pixels are enough."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images" / "more").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index, (name, size) in enumerate({"a.png": (128, 112), "b.PNG": (40, 64), "more/c.png": (100, 100)}.items()):
        noise = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
        image = Image.fromarray(noise.numpy())
        (image.convert("L") if index == 2 else image).save(folder / "images" / name)
    (folder / "images" / "notes.txt").write_text("no image")
    (folder / "space.yaml").write_text("2: [1, [1, 3], [3, 1]]\n3: [1, 2]\n")
    return folder


@pytest.fixture
def tiny(inputs):
    """Flags of a small problem."""
    flags = ["--images", str(inputs / "images"), "--space", str(inputs / "space.yaml"), "--model", "test_resnet"]
    return [*flags, "--crop", "96", "--batch", "4", "--groups", "3"]


# --- images -----------------------------------------------------------------------------------------------------------


def test_crops_are_functions_of_the_seed_and_their_number(planted_resnet, inputs):
    def crops(seed):
        return planted_resnet.Crops(inputs / "images", 96, 8, seed, (0.5, 0.5, 0.5), (0.25, 0.5, 0.5))

    own = crops(0)
    assert [path.name for path in own.paths] == ["a.png", "b.PNG", "c.png"]
    assert own(3).shape == (8, 3, 96, 96)
    assert own(3).equal(crops(0)(3))
    assert not own(3).equal(own(4))
    assert not own(3).equal(crops(1)(3))
    values = torch.stack([own(number) for number in range(4)])
    assert (values[:, :, 0].max(), values[:, :, 1].max()) == (2, 1)  # white, normalised


def test_a_crop_is_a_window_of_its_image(planted_resnet, inputs, tmp_path):
    with Image.open(inputs / "images" / "a.png") as image:
        image.save(tmp_path / "a.png")
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)
    crops = planted_resnet.Crops(tmp_path, 108, 8, 0, (0, 0, 0), (1, 1, 1))
    windows = pixels.unfold(1, 108, 1).unfold(2, 108, 1)
    mirrored = 0
    for crop in (255 * crops(0)).round().to(torch.uint8):
        matches = [(windows == each[:, None, None]).all(-1).all(-1).all(0).any() for each in (crop, crop.flip(2))]
        assert any(matches)
        mirrored += bool(matches[1])
    assert 0 < mirrored < 8


def test_images_that_are_not(planted_resnet, tmp_path):
    with pytest.raises(NatsError, match="expected a folder with jpg or png files"):
        planted_resnet.Crops(tmp_path, 96, 1, 0, (0,), (1,))
    (tmp_path / "bad.jpg").write_text("no image")
    with pytest.raises(NatsError, match=r"bad\.jpg: not an image"):
        planted_resnet.Crops(tmp_path, 96, 1, 0, (0,), (1,))(0)


def test_least_side(planted_resnet, inputs):
    assert planted_resnet.least_side(find_space(inputs / "space.yaml")) == 96
    assert planted_resnet.least_side(SPACES["C"]) == 3 * 5 * 32


# --- what is planted --------------------------------------------------------------------------------------------------


def test_every_group_takes_any_candidate(planted_resnet):
    plain = planted_resnet.create_plain("resnet18", None, 0)
    planted = planted_resnet.plant(plain, SPACES["C"], 64, 3)
    assert len(planted.truth) == 6
    assert set(torch.cat([planted.truth["layer4.0.conv2"], planted.truth["layer4.1.conv2"]]).tolist()) == set(range(9))
    for name, chosen in planted.truth.items():
        conv = planted.teacher.get_submodule(name)
        assert isinstance(conv, RegroupedConv2d)
        size = conv.out_channels // 64
        dilations = [run.dilation for run in conv.runs for _ in range(run.channels)]
        assert dilations == [planted.candidates[name][index] for index in chosen.tolist() for _ in range(size)]
        assert conv.weight.equal(plain.get_submodule(name).weight)
    assert planted.chance() == pytest.approx((4 / 5 + 2 / 9) / 6)
    again = planted_resnet.plant(plain, SPACES["C"], 64, 3)
    assert all(again.truth[name].equal(chosen) for name, chosen in planted.truth.items())
    assert any(
        not planted_resnet.plant(plain, SPACES["C"], 64, 4).truth[name].equal(planted.truth[name])
        for name in again.truth
    )


@pytest.mark.parametrize(("at", "count"), [("layers", 3), ("blocks", 6)])
def test_which_maps_are_compared(planted_resnet, at, count):
    plain = planted_resnet.create_plain("resnet18", None, 0).eval()
    teacher = planted_resnet.plant(plain, SPACES["C"], 4, 0).teacher
    distillation = planted_resnet.Distillation(teacher, at, contextlib.nullcontext)
    images = torch.randn(1, 3, 64, 64)
    x, maps = distillation.prepare(images)
    assert len(maps) == count
    assert maps[-1].equal(teacher.forward_features(images))
    pairs = zip(distillation.maps(plain, x), maps, strict=True)
    expected = torch.stack([((y - t) ** 2).mean() / t.var() for y, t in pairs])
    torch.testing.assert_close(distillation.loss(plain, x, maps), expected.mean())
    assert (expected > 0).all()


@pytest.mark.parametrize("norm", ["live", "calibrated"])
def test_the_planted_genotype_is_what_has_no_loss(planted_resnet, tiny, norm):
    args = planted_resnet.parse_args([*tiny, "--norm", norm, "--calibration-batches", "2"])
    own = planted_resnet.prepare("sensitivity", 0, args)
    for name, conv in own.searched.items():
        conv.current.copy_(own.planted.truth[name])

    def loss():
        return own._held_back_loss([own._batch(0)])

    exact = loss()
    assert exact < 1e-10
    conv = own.searched[CONVS[1]]
    conv.current[1] = 1 - conv.current[1]
    assert loss() > 1e-3
    assert [int(rights.sum()) for rights in own.recovered().values()] == [3, 2]
    (miss,) = planted_resnet.find_misses(own)
    assert (miss.conv, miss.group) == (CONVS[1], 1)
    assert {miss.planted, miss.found} == {"1x1", "2x2"}
    assert miss.alike == pytest.approx(own._held_back_loss([own._batch(planted_resnet.HELD_BACK)]), rel=1e-3)


# --- the command ------------------------------------------------------------------------------------------------------


def test_finds_the_genotype_and_goes_on_where_it_stopped(planted_resnet, tiny, tmp_path, capsys):
    target = tmp_path / "planted.csv"

    def run(*flags):
        assert planted_resnet.main([*tiny, "--csv", str(target), "--steps", "40", *flags]) == 0
        with target.open(newline="") as file:
            return list(csv.DictReader(file)), capsys.readouterr().out.splitlines()

    rows, lines = run()
    assert [row["mode"] for row in rows] == ["mixture", "sampled", "sensitivity"]
    for row, line in zip(rows, lines[2:], strict=True):
        assert (row["recovered"], row["groups_in_all"], row["misses"]) == ("6", "6", "")
        assert (row["recovered_layer2"], row["recovered_layer3"]) == ("3 of 3", "3 of 3")
        assert float(row["chance"]) == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-4)
        assert "6 of 6" in line
        assert float(row["seconds"]) > 0
    again, lines = run("--seed", "0", "1", "--mode", "sensitivity")
    assert again[:3] == rows
    assert [(row["mode"], row["seed"]) for row in again[3:]] == [("sensitivity", "1")]
    assert [line.endswith("(there)") for line in lines if line.startswith("sensitivity")] == [True, False]
    other, _ = run("--mode", "sampled", "--lr", "0.05", "--norm", "calibrated", "--train-kernels")
    assert other[:4] == again
    assert (other[4]["lr"], other[4]["norm"], other[4]["train_kernels"]) == ("0.05", "calibrated", "True")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--crop", "95"],
            "--crop 95: expected at least 96, 3 times the largest dilation times the stride",
        ),
        (["--space", "C"], "--crop 96: expected at least 480"),
        (["--space", "D"], "space: D: expected A, B, C or a YAML file"),
        (["--images", "absent"], "--images absent: expected a folder with jpg or png files"),
        (["--model", "absent"], "--model: timm has no model 'absent'"),
        (["--model", "vgg11"], "--model vgg11: expected a ResNet"),
        (["--weights", "absent"], "absent"),
        (["--groups", "5"], "layer2.0.conv2: its 48 output channels can not be split into 5 groups"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(planted_resnet, tiny, flags, words, tmp_path, capsys):
    assert planted_resnet.main([*tiny, *flags, "--csv", str(tmp_path / "planted.csv")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_of_this_benchmark_is_kept(planted_resnet, tiny, tmp_path, capsys):
    path = tmp_path / "planted.csv"
    path.write_text("network,ratio\nplain,1\n")
    assert planted_resnet.main([*tiny, "--csv", str(path)]) == 2
    assert "expected the rows of an earlier run, with a column 'mode'" in capsys.readouterr().err
    assert path.read_text() == "network,ratio\nplain,1\n"


def test_the_command(tiny, tmp_path):
    flags = [*tiny, "--mode", "sensitivity", "--threads", "1", "--precision", "bf16", "--score-batches", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False, timeout=400, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "1 threads, bf16" in done.stdout
    assert " of 6" in done.stdout
