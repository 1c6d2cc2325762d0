"""transform: any network takes a genotype, whole or not at all."""

import pytest
import timm
import torch
from torch import nn

from nats_zoo import Genotype, GenotypeError, RegroupedConv2d, transform
from nats_zoo.transform import architecture_of

# Where the searched kind of convolution lies in other families: grouped, depthwise, Conv2dSame, renamed by
# features_only wrapping, with names in a nested Sequential.
NETWORKS = {
    "regnety_002": ["s2.b1.conv2.conv", "s3.b2.conv2.conv", "s4.b1.conv2.conv"],
    "mobilenetv3_small_050": ["conv_stem", "blocks.1.0.conv_dw", "blocks.2.0.conv_dw", "blocks.4.1.conv_dw"],
    "tf_efficientnet_b0": ["conv_stem", "blocks.1.0.conv_dw", "blocks.2.1.conv_dw"],
    "densenet121": ["features.denseblock2.denselayer1.conv2", "features.denseblock3.denselayer9.conv2"],
}


class OwnNetwork(nn.Module):
    """A network that timm did not build."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.ModuleDict({"wide": nn.Conv2d(8, 12, (1, 5), padding=(0, 2)), "last": nn.Conv2d(12, 4, 1)})

    def forward(self, x):
        return self.body["last"](self.body["wide"](self.stem(x)).relu())


@pytest.fixture
def build(randomise_bn):
    """`build(name)`: a float64 network in eval mode with random weights and batch norms, equal on every call."""

    def build(name, **kwargs):
        torch.manual_seed(0)
        model = OwnNetwork() if name == "own" else timm.create_model(name, **kwargs)
        return randomise_bn(model, torch.Generator().manual_seed(0)).double().eval()

    return build


@pytest.fixture
def genotype_for(draw_runs):
    """`genotype_for(model, names)`: a random genotype of the named convolutions."""

    def draw(model, names):
        convs = {name: draw_runs(model.get_submodule(name), seed) for seed, name in enumerate(names)}
        return Genotype(architecture_of(model) or "own", convs)

    return draw


def with_oracle(model, genotype, convolve_per_channel):
    """Make the plain network compute each named convolution channel by channel."""
    for name, runs in genotype.convs.items():
        model.get_submodule(name).register_forward_hook(
            lambda conv, inputs, output, runs=runs: convolve_per_channel(conv, inputs[0], [list(run) for run in runs])
        )
    return model


def perturbed(genotype, name):
    """The same genotype with one dilation, that of a convolution's longest run, changed."""
    runs = list(genotype.convs[name])
    longest = runs.index(max(runs))
    channels, height, width = runs[longest]
    runs[longest] = (channels, height + 1, width + 1)
    return Genotype(genotype.architecture, dict(genotype.convs) | {name: runs})


def images(size=96):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- what it does -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("name", "convs"), [*NETWORKS.items(), ("own", ["stem.0", "body.wide"])])
def test_equals_oracle(name, convs, build, genotype_for, convolve_per_channel):
    plain = build(name)
    genotype = genotype_for(plain, convs)
    model = build(name)
    assert transform(model, genotype) is model
    assert {n for n, m in model.named_modules() if isinstance(m, RegroupedConv2d)} == set(convs)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    x = images()
    y = model(x)
    torch.testing.assert_close(y, with_oracle(plain, genotype, convolve_per_channel)(x))
    for conv in convs:
        other = transform(build(name), perturbed(genotype, conv))
        assert (other(x) - y).abs().max() > 1e-5 * y.std(), conv


@torch.no_grad()
def test_takes_every_form_of_a_genotype(build, genotype_for, tmp_path):
    genotype = genotype_for(build("own"), ["body.wide"])
    path = tmp_path / "mine.json"
    genotype.save(path)
    x = images(32)
    expected = transform(build("own"), genotype)(x)
    for form in (genotype.to_dict(), path, str(path)):
        assert torch.equal(transform(build("own"), form)(x), expected)
    assert not torch.equal(build("own")(x), expected)


@torch.no_grad()
def test_a_dilation_multiplies_that_of_output_stride(build, genotype_for, convolve_per_channel):
    names = ["layer4.0.conv2", "layer4.1.conv2"]
    options = dict(output_stride=16, zero_init_last=False, num_classes=0, global_pool="")
    plain = build("resnet18", **options)
    assert plain.layer4[1].conv2.dilation == (2, 2)
    genotype = genotype_for(plain, names)
    x = images()
    y = transform(build("resnet18", **options), genotype)(x)
    assert y.shape[-1] == 96 // 16
    torch.testing.assert_close(y, with_oracle(plain, genotype, convolve_per_channel)(x))
    for name in names:  # had the genotype replaced the dilation
        conv = plain.get_submodule(name)
        conv.dilation, conv.padding = (1, 1), (1, 1)
    assert not torch.allclose(y, plain(x), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_gains_reach_the_convolution(build, convolve_per_channel):
    runs, gains = [[4, 1, 1], [8, 1, 2]], [1.0, 3.0]
    model = transform(build("own"), Genotype("own", {"body.wide": runs}, gains={"body.wide": gains}))
    conv = build("own").body["wide"]
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(model.body["wide"](x), convolve_per_channel(conv, x, runs, gains))


# --- what it refuses --------------------------------------------------------------------------------------------------

FIRST = "layer2.0.conv2"
REFUSED = {
    "unknown convolution": ({"layer2.0.conv9": [[128, 2, 2]]}, "layer2.0.conv9"),
    "a batch norm": ({"layer2.0.bn2": [[128, 2, 2]]}, "layer2.0.bn2 is a BatchNorm2d"),
    "a block": ({"layer2.0": [[128, 2, 2]]}, "layer2.0 is a BasicBlock"),
    "the network itself": ({"": [[128, 2, 2]]}, "ResNet"),
    "too few channels": ({"layer2.1.conv2": [[100, 2, 2]]}, "layer2.1.conv2: .*100 channels, expected 128"),
    "too many channels": ({"layer2.1.conv2": [[129, 2, 2]]}, "layer2.1.conv2: .*129 channels, expected 128"),
}


def assert_plain(model, before):
    assert not any(isinstance(module, RegroupedConv2d) for module in model.modules())
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize(("convs", "words"), REFUSED.values(), ids=REFUSED)
def test_all_or_nothing(convs, words, build, tmp_path):
    model = build("resnet18")
    before = [id(module) for module in model.modules()]
    path = tmp_path / "mine.json"
    Genotype("resnet18", {FIRST: [(64, 1, 1), (64, 2, 2)]} | convs).save(path)
    with pytest.raises(GenotypeError, match=words) as error:
        transform(model, path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert_plain(model, before)


def test_refuses_another_architecture(build, tmp_path):
    model = build("resnet18")
    before = [id(module) for module in model.modules()]
    path = tmp_path / "mine.json"
    Genotype("resnet34", {FIRST: [(128, 2, 2)]}).save(path)
    with pytest.raises(GenotypeError, match=r"'resnet34'.*'resnet18'") as error:
        transform(model, path)
    assert str(path) in str(error.value)
    assert_plain(model, before)


def test_refuses_to_cut_a_cardinality_group(build):
    with pytest.raises(GenotypeError, match=r"s2\.b1\.conv2\.conv: .*cardinality group"):
        transform(build("regnety_002"), Genotype("regnety_002", {"s2.b1.conv2.conv": [(4, 1, 1), (52, 2, 2)]}))


def test_refuses_blocks_that_rebuild_their_convolutions():
    """timm's RepVGG hook would build a plain Conv2d for deployment: other outputs, without a word."""
    with torch.device("meta"):
        model = timm.create_model("repvgg_a0")
    name = "stages.1.0.conv_kxk.conv"
    width = model.get_submodule(name).out_channels
    with pytest.raises(GenotypeError, match=r"stages\.1\.0\.conv_kxk\.conv .*RepVggBlock.*reparameterize"):
        transform(model, Genotype("repvgg_a0", {name: [(width, 2, 2)]}))


def test_refuses_convolutions_with_a_forward_of_their_own():
    with torch.device("meta"):
        model = timm.create_model("resnetv2_50x1_bit")
    name = "stages.1.blocks.0.conv2"
    width = model.get_submodule(name).out_channels
    with pytest.raises(GenotypeError, match=r"stages\.1\.blocks\.0\.conv2: StdConv2d"):
        transform(model, Genotype("resnetv2_50x1_bit", {name: [(width, 2, 2)]}))


def test_refuses_a_regrouped_network(build, genotype_for):
    """Two genotypes would mix, and the model would go on calling the first its own."""
    genotype = genotype_for(build("resnet18"), [FIRST])
    other = genotype_for(build("resnet18"), ["layer3.0.conv2"])
    for model in (transform(build("resnet18"), genotype), build("nats_resnet18", genotype=genotype)):
        with pytest.raises(GenotypeError, match=rf"{FIRST}.*already"):
            transform(model, other)
        assert type(model.layer3[0].conv2) is nn.Conv2d


def test_architecture_is_the_plain_networks_name(build):
    assert architecture_of(build("resnet18")) == "resnet18"
    assert architecture_of(build("nats_resnet18", genotype=Genotype("resnet18", {}))) == "resnet18"
    assert architecture_of(build("resnet18", features_only=True)) == "resnet18"
    assert architecture_of(build("own")) is None
