"""Scale: gains that give every run the output variance of the plain convolution."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nats_zoo import Genotype, GenotypeError, RegroupedConv2d, transform
from nats_zoo.search.choosing.gains import calibrate_gains
from nats_zoo.search.space import SearchError
from tests.support.networks import settle, wake

SIZE = 96  # pixels: layer4 of test_resnet sees 3 x 3
RUNS = {
    "layer2.0.conv2": [(16, 1, 1), (16, 3, 3), (16, 1, 3)],
    "layer3.0.conv2": [(32, 2, 2), (16, 1, 1)],
    "layer4.0.conv1": [(96, 1, 1)],
}


def images(count, size=SIZE, seed=0):
    """Smooth images, whose neighbouring pixels are alike: where they lie then matters to a convolution's output."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 8, size // 8, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def network(name="test_resnet", **options):
    torch.manual_seed(0)
    if "resnet" in name or "resnext" in name:
        options["zero_init_last"] = False
    return settle(wake(timm.create_model(name, **options)), images(4, seed=9))


def conv_inputs(model, names, batches):
    """What arrives at each convolution of the plain network, in fp64."""
    seen = {name: [] for name in names}
    model = copy.deepcopy(model).double().eval()
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    return model, {name: torch.cat(inputs) for name, inputs in seen.items()}


def run_variances(output, runs):
    """Mean over a run's channels of their variance over images and positions."""
    per_channel = output.transpose(0, 1).flatten(1).var(1, unbiased=False)
    return torch.stack([part.mean() for part in per_channel.split([run[0] for run in runs])])


def assert_gains_are_right(model, genotype, batches, convolve_per_channel):
    calibrated = calibrate_gains(model, genotype, batches)
    names = [name for name, runs in genotype.convs.items() if any(run.dilation != (1, 1) for run in runs)]
    assert list(calibrated.gains) == names
    assert calibrated.convs == genotype.convs
    oracle, inputs = conv_inputs(model, names, batches)
    for name in names:
        runs, conv, gains = genotype.convs[name], oracle.get_submodule(name), calibrated.gains[name]
        with torch.no_grad():
            plain = run_variances(conv(inputs[name]), runs)
            dilated = run_variances(convolve_per_channel(conv, inputs[name], runs), runs)
            scaled = run_variances(convolve_per_channel(conv, inputs[name], runs, gains), runs)
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=0)
        assert not torch.allclose(dilated, plain, rtol=1e-2)  # without gains the test would fail
        expected = [1.0 if run.dilation == (1, 1) else p / d for run, p, d in zip(runs, plain, dilated, strict=True)]
        torch.testing.assert_close(torch.tensor(gains).double() ** 2, torch.tensor(expected), rtol=1e-4, atol=0)
        assert all(gain == 1.0 for gain, run in zip(gains, runs, strict=True) if run.dilation == (1, 1))
    return calibrated


def test_each_run_gets_the_plain_variance(convolve_per_channel):
    genotype = Genotype("test_resnet", RUNS, provenance={"method": "mixture"})
    batches = [images(3), images(2, seed=1)]
    calibrated = assert_gains_are_right(network(), genotype, batches, convolve_per_channel)
    assert calibrated.provenance == {"method": "mixture", "gains": {"images": 5, "size": [SIZE, SIZE]}}
    assert "gains" not in genotype.provenance


@pytest.mark.parametrize(
    ("name", "options", "conv"),
    [
        ("resnext50_32x4d", {}, "layer3.1.conv2"),  # grouped
        ("test_efficientnet", {}, "blocks.3.0.conv_dw"),  # depthwise
        ("tf_efficientnet_b0", {}, "blocks.2.0.conv_dw"),  # depthwise, Conv2dSame, stride 2
        ("regnety_002", {"features_only": True}, "s3.b2.conv2.conv"),  # grouped, in a feature network
        ("test_convnext", {}, "stages.1.blocks.1.conv_dw"),  # with a bias, 7x7
    ],
)
def test_other_networks(name, options, conv, draw_runs, convolve_per_channel):
    model = network(name, **options)
    runs = draw_runs(model.get_submodule(conv), seed=1)
    genotype = Genotype(name, {conv: runs})
    assert_gains_are_right(model, genotype, [images(2)], convolve_per_channel)


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_any_runs(draw_runs, convolve_per_channel, seed):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4)
    )
    runs = [[*run] for run in draw_runs(model[2], seed)]
    runs[0][1:] = 2, 3  # one dilation at least that is not plain
    calibrated = calibrate_gains(model, Genotype("any", {"2": runs}), [images(2, 24, seed)])
    oracle, inputs = conv_inputs(model, ["2"], [images(2, 24, seed)])
    scaled = convolve_per_channel(oracle[2], inputs["2"], runs, calibrated.gains["2"])
    torch.testing.assert_close(
        run_variances(scaled, runs), run_variances(oracle[2](inputs["2"]), runs), rtol=1e-4, atol=0
    )


def test_a_plain_genotype_has_no_gains():
    runs, provenance = {"layer2.0.conv2": [(48, 1, 1)]}, {"method": "random"}
    earlier = Genotype("test_resnet", runs, {"layer2.0.conv2": [0.5]}, provenance | {"gains": {"images": 1}})
    assert calibrate_gains(network(), earlier, [images(1)]) == Genotype("test_resnet", runs, {}, provenance)


def test_earlier_gains_do_not_matter():
    genotype = Genotype("test_resnet", RUNS)
    once = calibrate_gains(network(), genotype, [images(2)])
    assert calibrate_gains(network(), once, [images(2)]) == once


def test_the_network_stays_as_it_is():
    model = network()
    model.train()
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    calibrate_gains(model, Genotype("test_resnet", RUNS), [images(2)])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(isinstance(module, RegroupedConv2d) for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_calibrated_genotype_takes_plain_weights_and_fits_their_batch_norms(tmp_path):
    plain, batch = network(), images(4, seed=9)  # the images that its batch norms were settled on
    calibrated = calibrate_gains(plain, Genotype("test_resnet", RUNS), [batch])
    calibrated.save(tmp_path / "genotype.json")
    assert Genotype.load(tmp_path / "genotype.json") == calibrated

    def first_norm_output(genotype):
        model = transform(timm.create_model("test_resnet", zero_init_last=False), genotype)
        model.load_state_dict(plain.state_dict(), strict=True)
        seen = []
        model.layer2[0].bn2.register_forward_pre_hook(lambda norm, args: seen.append(args[0]))
        with torch.no_grad():
            assert model.eval()(batch).isfinite().all()
        return run_variances(seen[0], RUNS["layer2.0.conv2"])

    statistics = torch.stack([part.mean() for part in plain.layer2[0].bn2.running_var.split([16, 16, 16])])
    torch.testing.assert_close(first_norm_output(calibrated), statistics, rtol=1e-2, atol=0)
    without = first_norm_output(Genotype("test_resnet", RUNS))
    assert (without / statistics - 1).abs().max() > 0.05


def test_a_run_that_does_not_vary_keeps_its_kernel():
    model = network()
    with torch.no_grad():
        model.layer2[0].conv2.weight[16:32] = 0
    gains = calibrate_gains(model, Genotype("test_resnet", RUNS), [images(2)]).gains["layer2.0.conv2"]
    assert gains[:2] == (1.0, 1.0)
    assert gains[2] not in (0.0, 1.0)


@pytest.mark.parametrize("constant", [0.1, 1000.0])
def test_a_constant_output_is_told_from_rounding_noise(constant):
    conv = nn.Conv2d(3, 4, 3)  # unpadded: plain output constant, the dilated one sees its padding
    model = nn.Sequential(conv)
    gains = calibrate_gains(model, Genotype("any", {"0": [(4, 2, 2)]}), [torch.full((2, 3, 16, 16), constant)])
    assert gains.gains["0"] == (1.0,)


@pytest.mark.parametrize(
    ("genotype", "error", "words"),
    [
        (Genotype("resnet50", RUNS), GenotypeError, "is for the architecture 'resnet50'"),
        (Genotype("test_resnet", {"layer9": [(48, 1, 2)]}), GenotypeError, "no convolution named 'layer9'"),
        (Genotype("test_resnet", {"layer2.0.conv2": [(40, 1, 2)]}), GenotypeError, "layer2.0.conv2: its runs add up"),
    ],
)
def test_refused_genotypes(genotype, error, words):
    with pytest.raises(error, match=words):
        calibrate_gains(network(), genotype, [images(1)])


def test_refused_networks_and_images():
    genotype = Genotype("test_resnet", RUNS)
    with pytest.raises(SearchError, match="no batch of images"):
        calibrate_gains(network(), genotype, [])
    with pytest.raises(SearchError, match=r"layer2\.0\.conv2: its outputs are not finite"):
        calibrate_gains(network(), genotype, [torch.full((1, 3, SIZE, SIZE), float("nan"))])
    with pytest.raises(GenotypeError, match="is regrouped; gains are calibrated on the plain network"):
        calibrate_gains(transform(network(), genotype), genotype, [images(1)])
