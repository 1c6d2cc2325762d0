"""`nats profile`: the table that it prints, and the file that it leaves."""

import pytest
import timm
import torch

from nats_zoo.cli import commands as cli
from nats_zoo.search.choosing.cost import CostTable
from nats_zoo.search.space import SPACES, searched_convs


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_costs_are_printed_and_written(folder, capfd):
    options = ["--space", "A", "--size", "[64,96]", "--batch", "2", "--repeats", "2", "--threads", "1"]
    assert cli.main(["profile", "nats_resnet18", *options, "--output", "mine.json"]) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""
    table = CostTable.load("mine.json")
    with torch.device("meta"):
        convs = searched_convs(timm.create_model("resnet18"), SPACES["A"])
    assert {name: tuple(cost.dilations) for name, cost in table.convs.items()} == convs
    assert (table.architecture, table.size, table.batch, table.threads) == ("resnet18", (64, 96), 2, 1)
    table.check("resnet18", convs)
    assert "resnet18: 2 x 64x96, float32, contiguous" in printed
    assert printed.rstrip().endswith("costs: mine.json")
    for name, cost in table.convs.items():
        [row] = [line.split() for line in printed.splitlines() if line.startswith(name)]
        channels, plain, join, *ratios = row[1:]
        assert (int(channels), float(plain)) == (cost.channels, round(1000 * cost.plain, 3))
        assert float(join) == pytest.approx(cost.join / cost.plain, abs=0.006)
        assert len(ratios) == 3
        for text, dilation in zip(ratios, ((1, 1), (3, 3), (5, 5)), strict=True):
            if dilation not in cost.dilations:
                assert text == "."
                continue
            whole, quarter = map(float, text.split("/"))
            a, b = cost.dilations[dilation]
            assert whole == pytest.approx(table.relative(name, {dilation: cost.channels}), abs=0.006)
            assert quarter == pytest.approx(4 * (a + b * cost.channels / 4) / cost.plain, abs=0.006)
    assert [entry.name for entry in folder.iterdir()] == ["mine.json"]


def test_any_network_any_convolutions_and_a_space_of_ones_own(folder):
    (folder / "space.yaml").write_text("3: [1, [1, 4]]\n")
    options = ["--space", "space.yaml", "--convs", "[blocks.3.*]", "--size", "64", "--repeats", "1"]
    assert cli.main(["profile", "test_efficientnet", *options]) == 0
    table = CostTable.load("costs.json")
    assert {name: tuple(cost.dilations) for name, cost in table.convs.items()} == {
        "blocks.3.0.conv_dw": ((1, 1), (1, 4))
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_network"], "no_such_network"),
        (["test_resnet", "--space", "Z"], "space: Z: expected A, B, C or a YAML file"),
        (["test_vit"], "has no convolution to search"),
        (["test_resnet", "--size", "0"], "size: expected at least 1, found 0"),
        (["test_resnet", "--threads", "0"], "threads: expected a positive number, found 0"),
        (["test_resnet", "--device", "abacus"], "device: abacus"),
        (["test_resnet", "--dtype", "int8"], "dtype"),
        (["test_resnet", "--output", "nowhere/costs.json"], "output: nowhere/costs.json: there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(folder, capfd, arguments, words):
    assert cli.main(["profile", *arguments]) == cli.BAD_INPUT
    printed, errors = capfd.readouterr()
    assert printed == ""
    assert words in errors
    assert errors.count("\n") == 1
    assert not list(folder.iterdir())
