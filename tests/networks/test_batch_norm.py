"""recalibrate_bn: running statistics become those of the given batches, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from nats_zoo import NatsError, recalibrate_bn


class TinyNetwork(nn.Module):
    """conv, bn, conv, bn: the second norm sees what the first one makes of its own batch."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.1)
        self.conv2, self.bn2 = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, momentum=0.3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.bn2(self.conv2(self.drop(self.bn1(self.conv1(x)))))


@pytest.fixture
def model(randomise_bn):
    torch.manual_seed(0)
    return randomise_bn(TinyNetwork(), torch.Generator().manual_seed(0)).double().eval()


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, 3, 6, 5, generator=generator, dtype=torch.float64) + index for index, size in enumerate(sizes)
    ]


def moments(activations):
    return activations.mean((0, 2, 3)), activations.var((0, 2, 3), correction=1)


def normalise(bn, activations):
    mean, var = activations.mean((0, 2, 3), keepdim=True), activations.var((0, 2, 3), correction=0, keepdim=True)
    scaled = (activations - mean) / (var + bn.eps).sqrt()
    return scaled * bn.weight[None, :, None, None] + bn.bias[None, :, None, None]


@torch.no_grad()
def expected_statistics(model, loader):
    """Mean and unbiased variance of each batch at both norms, averaged over batches of whatever size."""
    first, second = [], []
    for batch in loader:
        activations = model.conv1(batch)
        first.append(moments(activations))
        second.append(moments(model.conv2(normalise(model.bn1, activations))))
    return [tuple(torch.stack(column).mean(0) for column in zip(*rows, strict=True)) for rows in (first, second)]


def test_statistics_are_the_average_over_batches(model):
    loader = batches(4, 2, 3)
    expected = expected_statistics(model, loader)
    assert recalibrate_bn(model, loader) is model
    for norm, (mean, var) in zip((model.bn1, model.bn2), expected, strict=True):
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        assert norm.num_batches_tracked == 3
    swapped = expected_statistics(model, loader[:2])
    assert not torch.allclose(model.bn1.running_mean, swapped[0][0])


def test_nothing_else_changes(model):
    before = copy.deepcopy(model)
    model.train()
    model.bn2.eval()
    recalibrate_bn(model, batches(4, 4))
    assert (model.training, model.drop.training, model.bn1.training, model.bn2.training) == (True, True, True, False)
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.3)
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, was), name
        assert now.grad is None


def test_recalibrated_network_normalises_its_batch(model):
    (batch,) = batches(64)
    recalibrate_bn(model, [batch])
    with torch.no_grad():
        outputs = model(batch)
    mean, var = moments(outputs)
    torch.testing.assert_close(mean, model.bn2.bias.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(var.sqrt(), model.bn2.weight.detach().abs(), rtol=1e-3, atol=1e-3)


def test_takes_batches_with_labels_and_generators(model):
    loader = batches(4, 2)
    twin = copy.deepcopy(model)
    recalibrate_bn(model, loader)
    recalibrate_bn(twin, ((batch, torch.zeros(len(batch))) for batch in loader))
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


def test_a_norm_that_is_not_reached_keeps_its_statistics(model):
    model.unused = nn.BatchNorm2d(2).double()
    model.unused.running_mean.fill_(7.0)
    recalibrate_bn(model, batches(4))
    assert (model.unused.running_mean == 7).all()


def assert_as_before(model, before):
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert not any(module.training for module in model.modules())
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.3)


def test_refuses_an_empty_loader_and_keeps_the_statistics(model):
    before = copy.deepcopy(model)
    with pytest.raises(NatsError, match="no batch"):
        recalibrate_bn(model, [])
    assert_as_before(model, before)


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 3, 3), torch.zeros(2, 9, 6, 5)], ids=["one value", "channels"])
def test_an_error_on_the_way_keeps_the_statistics(model, bad):
    before = copy.deepcopy(model)
    with pytest.raises((ValueError, RuntimeError)):
        recalibrate_bn(model, [*batches(4), bad.double()])
    assert_as_before(model, before)


def test_refuses_a_network_without_running_statistics():
    for norm in (nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)):
        with pytest.raises(NatsError, match="no batch norm"):
            recalibrate_bn(nn.Sequential(nn.Conv2d(3, 4, 3), norm), [torch.zeros(2, 3, 6, 6)])
