#!/usr/bin/env python3
"""Run every command of `nats` once, on drawn data, with the nats_zoo that this interpreter imports.

    python scripts/smoke.py

A few minutes on a CPU, without a network. It shows that an installation works on this system, not that it computes the
right thing: that is what tests are for. Commands that need the Hub are to say in one line that it is out of reach.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BAD_INPUT = 2
SMALL = (
    "--data data --backbone resnet18 --weights weights --min_size 64 --max_size 96 --fpn_channels 16 --head_size 16"
    " --roi_samples 16 --batch_size 2 --epochs 1"
)
DRAW = """
import json
import timm
from nats_zoo.detection.data.drawn import draw_dataset
draw_dataset("data", train=4, val=2, test=2, size=64, distance=8)
timm.models.save_for_hf(timm.create_model("resnet18", zero_init_last=False), "weights", safe_serialization=True)
widths = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3  # of a ResNet-50's 3x3 convolutions
json.dump([{"(0, 0)": 40, "(1, 2)": width - 40} for width in widths], open("pattern.json", "w"))
"""
KNOWN = "import json; from nats_zoo.cli.commands import COMMANDS; print(json.dumps([*COMMANDS]))"


class Step(NamedTuple):
    """A command line, the exit code that it is to end with, and what it is to leave behind."""

    arguments: str
    writes: Sequence[str] = ()
    code: int = 0


STEPS = (
    Step("list"),
    Step("show nats_resnet18 --output chart.png", ["chart.png"]),
    Step("erf nats_resnet18 --size 64 --output erf.png", ["erf.png"]),
    Step("profile resnet18 --size 64 --repeats 2 --threads 1", ["costs.json"]),
    Step("control random --backbone resnet18 --groups 4 --output random.json", ["random.json"]),
    Step("transfer random.json resnet34 --output deeper.json", ["deeper.json"]),
    Step("merge random.json -k 2 --output merged.json", ["merged.json"]),
    Step("convert ic_conv --pattern pattern.json --output converted.json", ["converted.json"]),
    Step("export nats_resnet18 --genotype merged.json --weights random --size 64 --output net.pt2", ["net.pt2"]),
    Step("data data", ["data_data.png", "data_data.json"]),
    Step("recipes"),
    Step("recipes small_data", ["recipes/small_data.yaml"]),
    Step(
        f"search --space A --groups 2 --level single --alpha_start 0 --workers 0 {SMALL} --output runs/search",
        ["runs/search/genotype.json"],
    ),
    # Two loading processes, which Windows and macOS spawn.
    Step(
        f"train --genotype runs/search --workers 2 {SMALL} --output runs/train",
        ["runs/train/model/model.safetensors"],
    ),
    Step("evaluate runs/train/model data --workers 0 --output evaluated", ["evaluated/metrics.json"]),
    Step("predict runs/train/model data/images --threshold 0 --output drawn", ["drawn/predictions.json"]),
    Step("publish runs/train/model nobody/nothing", code=BAD_INPUT),
    Step("collection nobody", code=BAD_INPUT),
    Step("demo --help"),
    Step("nonsense", code=BAD_INPUT),
)


def main() -> int:
    """Run all steps in a folder that is removed afterwards; returns 0 if each did as it should, else 1."""
    # No address answers there: a machine with a network behaves like one without.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        subprocess.run([sys.executable, "-c", DRAW], cwd=folder, check=True)
        failed = [step for step in STEPS if not _run(step, Path(folder), environment)]
        known = subprocess.run([sys.executable, "-c", KNOWN], cwd=folder, check=True, capture_output=True, text=True)
    untried = set(json.loads(known.stdout)) - {step.arguments.split()[0] for step in STEPS}
    for name in sorted(untried):
        print(f"not tried: nats {name}")
    print(f"{len(STEPS) - len(failed)} of {len(STEPS)} steps did as they should")
    return 1 if failed or untried else 0


def _run(step: Step, folder: Path, environment: dict[str, str]) -> bool:
    command = [sys.executable, "-m", "nats_zoo", *step.arguments.split()]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    missing = [name for name in step.writes if not (folder / name).exists()]
    # Bad input is told in one line, besides what a library may warn of.
    told = done.returncode != BAD_INPUT or sum(line.startswith("nats: ") for line in done.stderr.splitlines()) == 1
    good = done.returncode == step.code and not missing and told and "Traceback" not in done.stderr
    print(f"{'ok' if good else 'FAILED'}  nats {step.arguments}", flush=True)
    if not good:
        print(f"exit code {done.returncode}, expected {step.code}; missing: {missing}\n{done.stdout}\n{done.stderr}")
    return good


if __name__ == "__main__":
    sys.exit(main())
