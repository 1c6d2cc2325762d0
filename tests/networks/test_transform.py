"""transform: any network takes a genotype, whole or not at all."""

import copy
import random
import re

import pytest
import timm
import torch
import torchvision
from timm.models import create_feature_extractor, get_graph_node_names
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from nats_zoo import Genotype, GenotypeError, RegroupedConv2d, transform
from nats_zoo.networks.stages import searchable_convs
from nats_zoo.networks.transform import architecture_of, to_plain
from tests.support.networks import settle, wake

# One small member per family of timm, made shallow where its constructor lets us.
SHALLOW = dict(layers=(1, 1, 1, 1))
FAMILIES = {
    "regnetx_002": {},  # grouped
    "resnet18": SHALLOW | dict(zero_init_last=False),
    "legacy_seresnet18": {},
    "skresnet18": SHALLOW | dict(zero_init_last=False),  # two paths, one of them dilated already
    "res2net50_14w_8s": SHALLOW,  # convolutions one after the other within a block
    "resnest14d": {},  # radix and cardinality
    "resnetv2_18": SHALLOW,
    "densenet121": dict(block_config=(2, 2, 2, 2)),
    "dpn48b": {},
    "vgg11": dict(mlp_ratio=0.01),  # names within one nn.Sequential; a 7x7 in its classifier
    "dla46x_c": {},
    "hrnet_w18_small": {},
    "cs3darknet_focus_s": {},
    "cspresnext50": {},
    "hgnetv2_b0": {},
    "repvgg_a0": {},
    "test_byobnet": {},
    "selecsls42": {},
    "tresnet_m": SHALLOW,
    "ese_vovnet19b_slim": {},
    "rexnet_100": {},
    "inception_v3": {},  # 1x7 and 7x1 kernels; no padding in the stem
    "legacy_xception": {},  # separable
    "mobilenetv2_035": {},  # depthwise
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "tf_efficientnet_b0": {},  # Conv2dSame
    "tf_mobilenetv3_small_minimal_100": {},
    "tf_mixnet_s": {},  # kernels of several sizes within one layer
    "ghostnet_050": {},
    "fasternet_t0": {},  # a convolution of a part of the channels
    "test_convnext": {},  # 7x7 depthwise
    "inception_next_atto": {},  # 1x11 and 11x1
    "edgenext_xx_small": {},
    "efficientvit_b0": {},
    "mobilevit_xxs": {},
    "pvt_v2_b0": {},
}
SIZES = {"inception_v3": 160, "vgg11": 64}  # pixels: the maps of a few families are smaller or larger than others'


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
    """`build(name)`: a float64 network in eval mode, equal on every call, in which each convolution matters."""

    def build(name, **options):
        torch.manual_seed(0)
        model = OwnNetwork() if name == "own" else timm.create_model(name, **options)
        wake(randomise_bn(model, torch.Generator().manual_seed(0)))
        return model.double().eval()

    return build


@pytest.fixture
def genotype_for(draw_runs):
    """`genotype_for(model, names)`: a random genotype of the named convolutions."""

    def draw(model, names):
        convs = {name: draw_runs(model.get_submodule(name), seed) for seed, name in enumerate(names)}
        return Genotype(architecture_of(model) or "own", convs)

    return draw


def one_conv_per_stage(model):
    rng = random.Random(0)
    return [rng.choice(convs) for convs in searchable_convs(model).values()]


def with_oracle(model, genotype, convolve_per_channel):
    """Make the plain network compute each named convolution channel by channel."""
    for name, runs in genotype.convs.items():
        model.get_submodule(name).register_forward_hook(
            lambda conv, inputs, output, runs=runs: convolve_per_channel(conv, inputs[0], [list(run) for run in runs])
        )
    return model


def perturbed(model, genotype, name, x):
    """What the regrouped network gives with the dilation of one convolution's longest run changed."""
    runs = list(genotype.convs[name])
    longest = runs.index(max(runs))
    channels, height, width = runs[longest]
    runs[longest] = (channels, height % 3 + 1, width % 3 + 1)
    conv = model.get_submodule(name)
    model.set_submodule(name, RegroupedConv2d.from_conv(conv, runs))
    y = model(x)
    model.set_submodule(name, conv)
    return y


def images(size=96, count=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_equals_oracle(plain, genotype, convolve_per_channel, x):
    """That `transform` computes the genotype, and that each of its convolutions would tell if it did not."""
    state, parameters = list(plain.state_dict()), [(name, p.shape) for name, p in plain.named_parameters()]
    model = copy.deepcopy(plain)
    assert transform(model, genotype) is model
    assert {n for n, m in model.named_modules() if isinstance(m, RegroupedConv2d)} == set(genotype.convs)
    assert list(model.state_dict()) == state
    assert [(name, p.shape) for name, p in model.named_parameters()] == parameters
    model.load_state_dict(plain.state_dict(), strict=True)
    y = model(x)
    torch.testing.assert_close(y, with_oracle(plain, genotype, convolve_per_channel)(x))
    for name in genotype.convs:
        change = (perturbed(model, genotype, name, x) - y).abs().max() / y.std()
        assert change > 1e-5, name


# --- what it does -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_oracle(family, build, genotype_for, convolve_per_channel):
    size = SIZES.get(family, 96)
    plain = settle(build(family, num_classes=10, **FAMILIES[family]), images(size, 2))
    genotype = genotype_for(plain, one_conv_per_stage(plain))
    assert len(genotype.convs) >= 3
    assert_equals_oracle(plain, genotype, convolve_per_channel, images(size))


@torch.no_grad()
def test_networks_that_timm_did_not_build(build, genotype_for, convolve_per_channel, randomise_bn):
    own = build("own")
    torch.manual_seed(0)
    visions = randomise_bn(torchvision.models.resnet18(), torch.Generator().manual_seed(0)).double().eval()
    for plain, convs in ((own, ["stem.0", "body.wide"]), (visions, ["layer1.0.conv1", "layer3.1.conv2"])):
        assert_equals_oracle(plain, genotype_for(plain, convs), convolve_per_channel, images())


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


class Siamese(nn.Module):
    """Two places share one convolution."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
        self.right = nn.Sequential(nn.ReLU(), self.left[0])

    def forward(self, x):
        return self.right(self.left(x))


@torch.no_grad()
def test_a_shared_convolution_stays_shared(genotype_for, convolve_per_channel):
    torch.manual_seed(0)
    plain = Siamese().double()
    assert_equals_oracle(plain, genotype_for(plain, ["left.0"]), convolve_per_channel, images(32))
    model = transform(Siamese(), Genotype("own", {"left.0": [(1, 1, 1), (2, 2, 2)]}))
    assert model.right[1] is model.left[0]
    assert to_plain(model).right[1] is model.left[0]
    assert type(model.left[0]) is nn.Conv2d


def test_a_variant_remembers_it(build):
    """What it saves is what it runs."""
    genotype = Genotype("resnet18", {FIRST: [(64, 1, 1), (64, 2, 2)]})
    model = transform(build("nats_resnet18", genotype=Genotype("resnet18", {})), genotype)
    assert model.genotype == genotype
    assert model._model_args["genotype"] == genotype.to_dict()
    assert to_plain(model)._model_args["genotype"]["convs"] == {}


# --- what timm and torch do with it -----------------------------------------------------------------------------------


@pytest.fixture
def regroup(build, genotype_for):
    """`regroup(family)`: one of the networks above, regrouped, with sensible statistics."""

    def regroup(family, **options):
        model = settle(build(family, num_classes=10, **FAMILIES[family], **options), images(count=2))
        return transform(model, genotype_for(model, one_conv_per_stage(model)))

    return regroup


typical = pytest.mark.parametrize("family", ["regnetx_002", "densenet121", "tf_efficientnet_b0", "test_convnext"])


@torch.no_grad()
@typical
def test_reparameterized_and_channels_last(family, regroup):
    model, x = regroup(family), images()
    y = model(x)
    torch.testing.assert_close(reparameterize_model(model)(x), y)
    torch.testing.assert_close(model(x), y)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), y)


@torch.no_grad()
@typical
def test_autocast(family, regroup):
    """bfloat16 has three digits; what is left of them after a whole network is hardly two."""
    model, x = regroup(family), images()
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.float()(x.float())
    assert rounded.dtype == torch.bfloat16
    assert (rounded - y).abs().max() < 0.2 * y.std()


@torch.no_grad()
@typical
def test_traced_by_fx(family, regroup):
    model, x = regroup(family), images()
    stage = model.feature_info[-1]["module"]
    extractor = create_feature_extractor(model, {stage: "features", get_graph_node_names(model)[1][-1]: "logits"})
    found = extractor(x)
    torch.testing.assert_close(found["logits"], model(x))
    assert found["features"].shape[1] == model.feature_info[-1]["num_chs"]


@typical
def test_gradient_checkpointing(family, regroup):
    x, gradients = images(), []
    for enable in (False, True):
        model = regroup(family)
        model.set_grad_checkpointing(enable)
        model.requires_grad_(True).train()
        for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
            norm.eval()  # of one image there are no statistics, and running twice would change them twice
        torch.manual_seed(0)
        model(x).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[1].values())


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


# One convolution each, in a block whose own deployment hook would silently drop the dilations: timm's rebuild plain
# convolutions.
REBUILT = {
    "mobileone_s1": ("stages.1.0.conv_kxk.0.conv", "MobileOneBlock", "reparameterize"),
    "fastvit_t8": ("stages.1.blocks.0.token_mixer.mixer.conv_kxk.0.conv", "MobileOneBlock", "reparameterize"),
    "repvit_m1": ("stages.1.blocks.0.token_mixer.conv.c", "ConvNorm", "fuse"),
    "shvit_s1": ("stages.1.blocks.0.conv.m.c", "Conv2dNorm", "fuse"),
    "levit_128s": ("stem.conv2.linear", "ConvNorm", "fuse"),
    "tiny_vit_5m_224": ("stages.0.blocks.0.conv2.conv", "ConvNorm", "fuse"),
    "efficientvit_m0": ("stages.0.blocks.0.dw0.m.conv", "ConvNorm", "fuse"),
    "efficientvim_m1": ("stages.0.blocks.0.dwconv1.conv", "ConvLayer2d", "fuse"),
    "repghostnet_050": ("blocks.1.0.ghost1.cheap_operation.0", "RepGhostModule", "reparameterize"),
    "ghostnetv3_050": ("blocks.1.0.ghost1.cheap_rpr_conv.0.conv", "GhostModuleV3", "reparameterize"),
    "lcnetv2_small": ("stages.0.0.dw_conv.conv", "RepDepthwiseSeparable", "reparameterize"),
}
# One convolution each, whose class has a forward of its own.
FOREIGN = {
    "dm_nfnet_f0": ("stages.1.0.conv2", "ScaledStdConv2dSame"),
    "nfnet_l0": ("stages.1.0.conv2", "ScaledStdConv2d"),
    "resnetv2_50x1_bit": ("stages.1.blocks.0.conv2", "StdConv2d"),
}


@pytest.mark.parametrize(("architecture", "conv", "block", "hook"), [(name, *row) for name, row in REBUILT.items()])
def test_refuses_blocks_that_rebuild_their_convolutions(architecture, conv, block, hook):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    width = model.get_submodule(conv).out_channels
    with pytest.raises(GenotypeError, match=rf"{re.escape(conv)} .*{block}.*{hook}\(\)"):
        transform(model, Genotype(architecture, {conv: [(width, 2, 2)]}))


@pytest.mark.parametrize(("architecture", "conv", "kind"), [(name, *row) for name, row in FOREIGN.items()])
def test_refuses_convolutions_with_a_forward_of_their_own(architecture, conv, kind):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    width = model.get_submodule(conv).out_channels
    with pytest.raises(GenotypeError, match=rf"{re.escape(conv)}: {kind} can not"):
        transform(model, Genotype(architecture, {conv: [(width, 2, 2)]}))


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: conv.register_forward_hook(lambda *_: None),
        lambda conv: conv.register_full_backward_hook(lambda *_: None),
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        nn.utils.weight_norm,
    ],
    ids=["forward hook", "backward hook", "pruned", "weight norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_refuses_convolutions_with_hooks(change):
    """They would be lost, and with them what they compute."""
    model = OwnNetwork()
    change(model.body["wide"])
    with pytest.raises(GenotypeError, match=r"body\.wide has hooks"):
        transform(model, Genotype("own", {"body.wide": [(12, 2, 2)]}))


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
    options = dict(architecture="regnetx_002", genotype=Genotype("regnetx_002", {}))
    assert architecture_of(build("nats_any", **options)) == "regnetx_002"
    assert architecture_of(build("nats_any", features_only=True, **options)) == "regnetx_002"
    assert architecture_of(build("own")) is None
