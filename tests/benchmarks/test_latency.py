"""benchmarks/latency.py: it times equal computations, in turns, and writes down everything."""

import csv
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from nats_zoo import Genotype, NatsError, RegroupedConv2d
from nats_zoo.search.space import SPACES
from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "latency.py"


@pytest.fixture(scope="module")
def latency():
    spec = importlib.util.spec_from_file_location("latency", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def genotype_file(tmp_path):
    runs = [(32, 1, 1), (64, 3, 3), (32, 1, 1)]
    path = tmp_path / "mine.json"
    Genotype("resnet18", {"layer2.0.conv2": runs}, gains={"layer2.0.conv2": [1.0, 0.9, 1.1]}).save(path)
    return path


# --- genotypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "count"), [("resnet18", 6), ("resnet50", 13), ("resnext50_32x4d", 13)])
def test_uniform_genotype_draws_each_group_from_space_c(latency, architecture, count):
    genotype = latency.uniform_genotype(architecture, seed=3)
    assert len(genotype.convs) == count
    for name, runs in genotype.convs.items():
        assert name.endswith(".conv2")
        group = sum(run.channels for run in runs) // 16
        assert all(run.channels % group == 0 for run in runs)
        assert {run.dilation for run in runs} <= set(SPACES["C"].candidates[int(name[5])])
    drawn = {run.dilation for runs in genotype.convs.values() for run in runs}
    assert drawn == set(SPACES["C"].candidates[4])
    assert genotype == latency.uniform_genotype(architecture, seed=3)
    assert genotype != latency.uniform_genotype(architecture, seed=4)


def test_ic16_genotype_has_all_16_dilations_in_equal_shares(latency):
    genotype = latency.ic16_genotype("resnet50")
    assert len(genotype.convs) == 16
    for shares in genotype.dilation_shares().values():
        assert shares == {(h, w): 1 / 16 for h in range(1, 5) for w in range(1, 5)}


# --- what is compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 16])
@torch.no_grad()
def test_naive_form_equals_the_module(latency, groups, bias):
    conv = nn.Conv2d(16, 32, 3, stride=2, padding=2, dilation=2, groups=groups, bias=bias)
    runs = [(8, 1, 1), (16, 2, 3), (8, 1, 1)]
    regrouped = RegroupedConv2d.from_conv(conv, runs, gains=[1.0, 2.0, 0.5])
    naive = latency.NaiveRegroupedConv2d(regrouped)
    assert [piece.out_channels for piece in naive.pieces] == [8, 16, 8]
    x = torch.randn(2, 16, 21, 20)
    torch.testing.assert_close(naive(x), regrouped(x))
    other = RegroupedConv2d.from_conv(conv, [(8, 1, 1), (16, 2, 2), (8, 1, 1)], gains=[1.0, 2.0, 0.5])
    assert not torch.allclose(naive(x), other(x))


@pytest.mark.parametrize("form", ["eager", "deploy"])
def test_only_equal_networks_are_timed(latency, form):
    images = torch.randn(1, 3, 64, 64)
    genotype = latency.uniform_genotype("resnet18")
    networks = latency.build_networks("nats_resnet18", genotype, form)
    assert not any(module.training for network in networks.values() for module in network.modules())
    latency.check_equal(networks["nats"], networks["naive"], images)
    with pytest.raises(NatsError, match="differ"):
        latency.check_equal(networks["plain"], networks["naive"], images)
    runs = dict(genotype.convs)
    name = "layer4.1.conv2"
    runs[name] = [(512, 2, 2)]
    torch.manual_seed(0)
    networks = latency.build_networks("nats_resnet18", genotype, form)
    torch.manual_seed(0)
    other = latency.build_networks("nats_resnet18", Genotype("resnet18", runs), form)
    with pytest.raises(NatsError, match="map 3"):
        latency.check_equal(other["nats"], networks["naive"], images)


@torch.no_grad()
def test_all_three_are_deployed_alike(latency):
    """The batch norms that are folded in one are folded in all; else the ratio would compare something else."""
    images = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    eager = latency.build_networks("nats_resnet50", latency.uniform_genotype("resnet50"))
    torch.manual_seed(0)
    deployed = latency.build_networks("nats_resnet50", latency.uniform_genotype("resnet50"), "deploy")
    for name, network in deployed.items():
        assert [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["bn1"], name
        latency.check_equal(network, eager[name], images)
    assert any(isinstance(module, latency.NaiveRegroupedConv2d) for module in deployed["naive"].modules())
    assert not any(isinstance(module, RegroupedConv2d) for module in deployed["naive"].modules())


# --- timing -----------------------------------------------------------------------------------------------------------


def test_networks_take_turns_and_warm_up_is_not_counted(latency):
    calls = []
    networks = {name: (lambda images, name=name: calls.append(name)) for name in ("plain", "nats", "naive")}
    times = latency.time_interleaved(networks, torch.zeros(1), repeats=4, warmup=2)
    assert calls == ["plain", "nats", "naive"] * 6
    assert {name: len(values) for name, values in times.items()} == {"plain": 4, "nats": 4, "naive": 4}
    assert all(value > 0 for values in times.values() for value in values)


def test_ratios_are_taken_per_round(latency):
    """The machine slowed down tenfold halfway; the ratios do not know."""
    times = {"plain": [1.0, 1.0, 10.0, 10.0, 10.0], "nats": [1.1, 1.2, 13.0, 14.0, 15.0]}
    plain, nats = latency.summarise(times)
    assert (plain["network"], plain["ratio"], plain["ratio_q1"], plain["ratio_q3"]) == ("plain", 1, 1, 1)
    assert nats["median_ms"] == 13
    assert (nats["ratio_q1"], nats["ratio"], nats["ratio_q3"]) == pytest.approx((1.2, 1.3, 1.4))


# --- the command ------------------------------------------------------------------------------------------------------


def test_prints_a_table_and_writes_csv(genotype_file, tmp_path):
    target = tmp_path / "latency.csv"
    flags = ["--model", "nats_resnet18", "--genotype", "uniform", str(genotype_file), "--size", "64x96"]
    flags += ["--repeats", "2", "--warmup", "1", "--memory-format", "channels_last", "--dtype", "bfloat16"]
    flags += ["--threads", "1", "--batch", "2", "--form", "eager", "deploy", "--max-dilations", "2"]
    flags += ["--network", "nats", "naive", "--csv", str(target)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False, timeout=400, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["plain", "nats", "naive"] * 4
    assert [row["form"] for row in rows] == (["eager"] * 3 + ["deploy"] * 3) * 2
    assert [row["genotype"] for row in rows] == ["uniform"] * 6 + [str(genotype_file)] * 6
    genotype = Genotype.load(genotype_file).merge(2)
    assert rows[6]["fingerprint"] == genotype.fingerprint()[:12]
    assert float(rows[6]["share_changed"]) == genotype.share_changed()
    assert (float(rows[0]["share_moved"]) > 0, float(rows[6]["share_moved"])) == (True, 0)
    expected = dict(
        model="nats_resnet18", size="64x96", batch="2", memory_format="channels_last", dtype="bfloat16", device="cpu"
    )
    expected |= dict(repeats="2", warmup="1", threads="1", max_dilations="2", torch=torch.__version__)
    for row in rows:
        assert expected.items() <= row.items()
        assert row["device_name"]
        assert float(row["median_ms"]) > 0
        assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
    table = done.stdout.splitlines()
    assert rows[0]["device_name"] in table[0]
    assert len(table) == 2 + len(rows)
    assert "nats_resnet18 uniform k=2" in table[3]
    assert f"{float(rows[1]['ratio']):.3f}" in table[3]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "resnet18"], "resnet18: expected one of nats_resnet"),
        (["--model", "nats_vit"], "nats_vit: expected one of nats_resnet"),
        pytest.param(
            ["--genotype", "absent.json"],
            "absent.json: no published genotype",
            id="flags2-absent.json: no such genotype",
        ),
        (["--model", "nats_resnet50", "--genotype", "FILE"], "'resnet18'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(latency, flags, words, genotype_file, tmp_path, capsys):
    flags = [str(genotype_file) if flag == "FILE" else flag for flag in flags]
    assert latency.main([*flags, "--csv", str(tmp_path / "latency.csv")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [genotype_file]


@pytest.mark.parametrize(
    "flags",
    [
        ["--network", "other"],
        ["--repeats", "1"],
        ["--batch", "0"],
        ["--size", "64"],
        ["--dtype", "int8"],
        ["--form", "fast"],
    ],
)
def test_bad_flags(latency, flags):
    with pytest.raises(SystemExit) as ended:
        latency.main(flags)
    assert ended.value.code == 2
