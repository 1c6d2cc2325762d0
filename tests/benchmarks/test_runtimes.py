"""benchmarks/runtimes.py: equal networks take turns in a real runtime, and what is reported adds up."""

import csv
import importlib.util
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.support.marks import needs_onnx

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "runtimes.py"
TINY = ["--model", "nats_resnet18", "--genotype", "default", "--size", "64x96", "--repeats", "2", "--warmup", "1"]
RUNTIMES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "nncf")}


def needs(runtime):
    missing = [name for name in RUNTIMES[runtime] if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"without {', '.join(missing)}")


@pytest.fixture(scope="module")
def runtimes():
    spec = importlib.util.spec_from_file_location("runtimes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_onnx
@pytest.mark.parametrize("runtime", [pytest.param(name, marks=needs(name)) for name in RUNTIMES])
def test_each_network_is_timed_and_compared(runtimes, runtime, tmp_path, capsys, monkeypatch):
    flags = [*TINY, "--runtime", runtime, "--precision", "float32", "int8", "--csv", str(tmp_path / "rows.csv")]
    assert runtimes.main(flags) == 0
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["precision"] for row in rows] == ["float32"] * 4 + ["int8"] * 4
    assert [(row["genotype"], row["form"]) for row in rows[:4]] == [
        ("plain", "as it is"),
        ("default", "as it is"),
        ("default", "deploy"),
        ("default", "separate"),
    ]
    for row in rows:
        assert row["size"] == "64x96"
        assert row["device_name"]
        assert runtime in row["runtime_version"]
        assert 0 < float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
        low, high = (0, 1e-4) if row["precision"] == "float32" else (1e-3, 0.5)
        assert low < float(row["difference"]) < high
    assert float(rows[0]["ratio"]) == 1
    printed = capsys.readouterr().out
    assert f"{runtime} float32 1 64x96 default: " in printed

    monkeypatch.setattr(runtimes, "MAX_DIFFERENCE", 1e-9)
    assert runtimes.main([*TINY, "--runtime", runtime]) == 2
    assert f"runtimes: {runtime}: plain: its maps are off by" in capsys.readouterr().err


@needs_onnx
@needs("onnxruntime")
def test_a_profile_names_the_operators(runtimes, capsys):
    assert runtimes.main([*TINY, "--runtime", "onnxruntime", "--profile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "default, deploy" in lines[2]
    kinds = {line.split()[0]: [float(part) for part in line.split()[1:]] for line in lines[3:]}
    assert kinds["Concat"][0] == 0 < kinds["Concat"][1]
    everything = kinds.pop("all")
    assert everything == pytest.approx([sum(column) for column in zip(*kinds.values(), strict=True)], abs=0.5)


def test_the_difference_is_of_the_worst_map(runtimes):
    maps = [np.ones((2, 3)), np.full((2,), 4.0)]
    assert runtimes.difference(maps, maps) == 0
    assert runtimes.difference([maps[0], np.array([4.0, 5.0])], maps) == pytest.approx((0.5 / 16) ** 0.5)


def test_the_better_form_is_held_against_the_goal(runtimes):
    facts = {"runtime": "openvino", "precision": "int8", "threads": 1, "size": "512x512"}
    rows = [
        facts | {"genotype": genotype, "form": form, "ratio": ratio}
        for genotype, form, ratio in (
            ("plain", "as it is", 1.0),
            ("default", "as it is", 1.2),
            ("default", "deploy", 1.02),
            ("uniform", "as it is", 1.06),
        )
    ]
    assert runtimes.goal_lines(rows) == [
        "openvino int8 1 512x512 default: 1.020 deploy, goal 1.03: met",
        "openvino int8 1 512x512 uniform: 1.060 as it is, goal 1.05: missed",
    ]
