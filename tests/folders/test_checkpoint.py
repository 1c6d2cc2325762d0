"""Checkpoints that torch saved: tensors by name, wherever they lie, and nothing else."""

import zipfile

import pytest
import torch
from safetensors.torch import save_file

from nats_zoo import NatsError
from nats_zoo.folders.checkpoint import read_checkpoint

STATE = {"conv.weight": torch.arange(4.0), "conv.bias": torch.ones(1)}


@pytest.mark.parametrize("kind", ["state dict", "state_dict", "model", "safetensors"])
def test_a_state_dict_is_found_where_it_lies(kind, tmp_path):
    path = tmp_path / ("saved.safetensors" if kind == "safetensors" else "saved.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE if kind == "state dict" else {"epoch": 3, kind: STATE}, path)
    found = read_checkpoint(path, ("state_dict", "model"))
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def compress(path):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"epoch": 3}, "expected a state dict, or an object with one under 'state_dict' or 'model'"),
        ({"model": {"conv.weight": [1.0]}}, "expected a state dict"),
        ({"conv.weight": torch.zeros(1).expand(10**9)}, "expected named, dense tensors, found another kind"),
        ({3: torch.zeros(1)}, "expected named, dense tensors, found another kind under 3"),
        (STATE, "found a compressed one"),
    ],
    ids=["no state dict", "lists", "one number for a billion", "numbers as names", "compressed"],
)
def test_what_is_none_is_refused_in_a_line(saved, words, tmp_path):
    path = tmp_path / "saved.pth"
    torch.save(saved, path)
    if saved is STATE:
        compress(path)
    with pytest.raises(NatsError, match=words) as error:
        read_checkpoint(path, ("state_dict", "model"))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
