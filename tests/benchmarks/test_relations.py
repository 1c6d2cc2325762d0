"""The benchmark of drawn relations, on a few images: its arms, its table, going on, and what demos' figures become."""

import csv

import relations
import torch

from nats_zoo import Genotype
from nats_zoo.detection import create_detector, save_detector
from nats_zoo.detection.data.relations import DIRECTIONS
from nats_zoo.search.demo import stages


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_arm_goes_on_from_the_detector_and_has_a_row(tmp_path, capsys):
    torch.manual_seed(0)
    options = {**stages.DETECTOR, "classes": DIRECTIONS, "category_ids": tuple(range(1, 9)), "weights": None}
    folder = save_detector(create_detector("fasterrcnn", num_classes=9, **options), tmp_path / "detector")
    words = ["--detector", str(folder), "--output", str(tmp_path / "runs"), "--csv", str(tmp_path / "found.csv")]
    words += ["--kinds", "wide", "--images", "8", "--test", "2"]
    relations.main(words)
    assert len(capsys.readouterr().out.splitlines()) >= 5
    found = rows(tmp_path / "found.csv")
    assert [row["arm"] for row in found] == ["plain", "searched", "random", "1x3", "3x1"]
    run = tmp_path / "runs" / "wide_0"
    assert Genotype.load(run / "1x3.json").convs["layer1.0.conv1"][0].dilation == (1, 3)
    assert Genotype.load(run / "searched.json").convs == Genotype.load(run / "search" / "genotype.json").convs
    assert float(found[1]["search_s"]) > 0
    relations.main(words)
    assert rows(tmp_path / "found.csv") == found
    assert "arm" not in capsys.readouterr().out


def test_the_figures_of_several_demos_become_one_table(tmp_path):
    for seed in ("0", "1"):
        (tmp_path / seed).mkdir()
        (tmp_path / seed / "results.csv").write_text(f"arm,ap,right\nplain,{seed},2\nnats,30,4\n")
    folders = [str(tmp_path / seed) for seed in ("0", "1")]
    relations.main(["--collect", *folders, "--csv", str(tmp_path / "all.csv")])
    assert (
        tmp_path / "all.csv"
    ).read_text() == "seed,arm,ap,right\n0,plain,0,2\n0,nats,30,4\n1,plain,1,2\n1,nats,30,4\n"
