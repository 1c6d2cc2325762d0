"""Deployment form: timm.utils.reparameterize_model gives the same outputs with fewer steps."""

import copy
import random

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BlurPool2d, freeze_batch_norm_2d
from timm.models.resnet import BasicBlock, Bottleneck
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from nats_zoo import Genotype, GenotypeError, RegroupedConv2d, to_plain, transform
from nats_zoo.genotype.runs import Runs
from nats_zoo.networks.deploy import in_form
from nats_zoo.networks.deployed_conv import DeployedConv2d
from nats_zoo.networks.regrouped_conv import RegroupedConv2dSame
from nats_zoo.networks.stages import searchable_convs

SHALLOW = dict(layers=(1, 1, 1, 1), zero_init_last=False)
BLURRED = dict(aa_layer=BlurPool2d)
SE = dict(block_args=dict(attn_layer="se"))
GROUPED = dict(cardinality=4, base_width=16)
NETWORKS = {
    "basic": ("resnet18", SHALLOW),
    "basic anti-aliased": ("resnet18", SHALLOW | BLURRED),
    "bottleneck": ("resnet50", SHALLOW),
    "bottleneck anti-aliased": ("resnet50", SHALLOW | BLURRED),
    "bottleneck averaged": ("resnetaa50", SHALLOW),
    "grouped": ("resnet50", SHALLOW | GROUPED),
    "grouped anti-aliased SE": ("resnet50", SHALLOW | GROUPED | BLURRED | SE),
    "SE": ("seresnet50", SHALLOW),
    "deep stem": ("resnet50d", SHALLOW),
    "dense": ("resnet50", SHALLOW | dict(output_stride=8)),
    "RepVGG": ("repvgg_a0", {}),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
DILATIONS = [(1, 1), (2, 2), (1, 3), (3, 1), (2, 3)]


def draw_genotype(model, architecture, seed):
    """Random dilations per channel (per cardinality group) and random gains, in every convolution that can."""
    rng = random.Random(seed)
    convs, gains = {}, {}
    for name in (name for names in searchable_convs(model).values() for name in names):
        conv = model.get_submodule(name)
        units = conv.groups if conv.groups > 1 else conv.out_channels
        drawn = [rng.choice(DILATIONS) for _ in range(units)]
        convs[name] = Runs.of(drawn, each=conv.out_channels // units)
        gains[name] = [rng.uniform(0.5, 1.5) for _ in convs[name]]
    return Genotype(architecture, convs, gains)


@pytest.fixture(scope="module")
def build(randomise_bn):
    """`build(architecture, **options)`: the plain network, float64, random weights and batch norms, same every time."""

    def build(architecture, **options):
        torch.manual_seed(0)
        model = timm.create_model(architecture, **options).double().eval()
        return randomise_bn(model, torch.Generator().manual_seed(0))

    return build


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def difference(a, b):
    return ((a - b).abs().max() / b.std()).item()


def count_multiply_adds(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def regrouped(model):
    return [module for module in model.modules() if isinstance(module, RegroupedConv2d)]


@torch.no_grad()
@every_network
def test_equal_outputs(name, build):
    architecture, options = NETWORKS[name]
    model = build(architecture, **options)
    genotype = draw_genotype(model, architecture, seed=1)
    y = transform(model, genotype)(images())
    deployed = reparameterize_model(model)
    assert difference(deployed(images()), y) < 1e-9
    # a twin with one dilation changed differs: the comparison can fail
    conv = next(iter(genotype.convs))
    (channels, height, width), *rest = genotype.convs[conv]
    other = Genotype(architecture, {**genotype.convs, conv: [(channels, height + 1, width), *rest]}, genotype.gains)
    assert difference(transform(build(architecture, **options), other)(images()), y) > 1e-6
    # and the model itself was left alone
    assert torch.equal(model(images()), y)


@torch.no_grad()
@every_network
def test_the_separate_form_has_a_convolution_for_each_dilation(name, build):
    architecture, options = NETWORKS[name]
    model = build(architecture, **options)
    transform(model, draw_genotype(model, architecture, seed=1))
    y = model(images())
    separate = in_form(model, "separate")
    assert difference(separate(images()), y) < 1e-9
    for conv in (module for module in separate.modules() if isinstance(module, DeployedConv2d)):
        assert len(conv.steps) == len({run.dilation for run in conv.runs})
        assert all(type(step) is nn.Conv2d for step in conv.steps)
    assert in_form(model, "as it is") is model
    assert torch.equal(in_form(model, "deploy")(images()), reparameterize_model(model)(images()))
    assert torch.equal(model(images()), y)


@torch.no_grad()
def test_a_relu_goes_to_each_dilations_convolution(build):
    """Runtimes fuse it into a convolution, not into a concatenation; other activations stay where they are."""
    for activation, moves in ((nn.ReLU, True), (nn.SiLU, False)):
        model = build("resnet18", **SHALLOW, act_layer=activation)
        transform(model, draw_genotype(model, "resnet18", seed=4))
        block = reparameterize_model(model).layer2[0]
        assert len(block.conv1.steps) > 1
        assert (type(block.conv1.act), type(block.act1))[:: -1 if moves else 1] == (nn.Identity, activation)
        assert type(block.conv2.act) is nn.Identity  # what follows is the shortcut


@torch.no_grad()
@every_network
def test_idempotent(name, build):
    architecture, options = NETWORKS[name]
    model = build(architecture, **options)
    once = reparameterize_model(transform(model, draw_genotype(model, architecture, seed=2)))
    twice = reparameterize_model(once)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert torch.equal(twice(images()), once(images()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bottleneck", "grouped anti-aliased SE", "SE"])
def test_a_bottleneck_has_nothing_to_put_back_in_order(name, build):
    architecture, options = NETWORKS[name]
    model = build(architecture, **options)
    transform(model, draw_genotype(model, architecture, seed=3))
    for block in (module for module in reparameterize_model(model).modules() if isinstance(module, Bottleneck)):
        assert len(block.conv2.runs) == len({run.dilation for run in block.conv2.runs})
        assert not any(isinstance(module, _BatchNorm) for module in block.modules())


@torch.no_grad()
def test_a_basic_block_keeps_its_outputs_channels_and_sorts_the_others(build):
    model = build("resnet18", **SHALLOW)
    transform(model, draw_genotype(model, "resnet18", seed=4))
    for block in (module for module in reparameterize_model(model).modules() if isinstance(module, BasicBlock)):
        assert len(block.conv1.runs) == len({run.dilation for run in block.conv1.runs})
        assert len(block.conv2.runs) > len({run.dilation for run in block.conv2.runs})
        assert isinstance(block.conv1, DeployedConv2d)
        assert isinstance(block.conv2, DeployedConv2d)


@torch.no_grad()
def test_only_the_stems_batch_norm_is_left(build):
    """timm does not ask the network itself, which alone knows the stem's."""
    for architecture in ("resnet18", "resnet50"):
        model = transform(build(architecture, **SHALLOW), Genotype(architecture, {}))
        deployed = reparameterize_model(model)
        assert [name for name, module in deployed.named_modules() if isinstance(module, _BatchNorm)] == ["bn1"]
        assert difference(deployed(images()), model(images())) < 1e-9


@torch.no_grad()
def test_frozen_batch_norms_are_folded_too(build):
    model = build("resnet50", **SHALLOW)
    transform(model, draw_genotype(model, "resnet50", seed=5))
    y = model(images())
    deployed = reparameterize_model(freeze_batch_norm_2d(model).double())
    assert difference(deployed(images()), y) < 1e-9
    assert isinstance(deployed.layer1[0].bn2, nn.Identity)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        dict(norm_layer=lambda channels, **kwargs: nn.GroupNorm(4, channels)),  # its groups are of neighbours
        dict(act_layer=lambda inplace=True: nn.PReLU(64)),  # one slope per channel
        dict(norm_layer=lambda channels, **kwargs: nn.BatchNorm2d(channels, track_running_stats=False)),
    ],
    ids=["group norm", "slopes per channel", "no running statistics"],
)
def test_what_can_not_be_absorbed_keeps_the_general_form(options):
    width = 64
    block = Bottleneck(4 * width, width, **options).double().eval()
    block.act3 = nn.ReLU()
    for parameter in block.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    model = nn.Sequential(block)
    genotype = Genotype("own", {"0.conv2": [(16, 1, 1), (16, 2, 2), (16, 1, 1), (16, 3, 1)]})
    x = torch.randn(2, 4 * width, 9, 9, dtype=torch.float64)
    y = transform(model, genotype)(x)
    deployed = reparameterize_model(model)
    assert difference(deployed(x), y) < 1e-9
    assert deployed[0].conv2.runs == model[0].conv2.runs


@pytest.mark.parametrize("dilations", [[(1, 3)], [(1, 1), (3, 3)], [(2, 1), (3, 1), (4, 1)]], ids=str)
@every_network
def test_gradients_flow_through_the_deployment_form(name, dilations, build):
    """As for saliency maps: timm's blocks add their shortcut in place, to what a convolution of few dilations gives."""
    architecture, options = NETWORKS[name]
    model = build(architecture, **options)
    convs = {}
    for conv in (name for names in searchable_convs(model).values() for name in names):
        module = model.get_submodule(conv)
        units = module.groups if module.groups > 1 else module.out_channels
        cut = units // len(dilations) * (module.out_channels // units)
        sizes = [cut] * (len(dilations) - 1) + [module.out_channels - cut * (len(dilations) - 1)]
        convs[conv] = [[size, *dilation] for size, dilation in zip(sizes, dilations, strict=True)]
    model = transform(model, Genotype(architecture, convs))
    gradients = []
    for form in (model, reparameterize_model(model)):
        x = images().requires_grad_()
        form(x).square().sum().backward()
        gradients.append(x.grad)
    assert difference(gradients[1], gradients[0]) < 1e-9
    with torch.no_grad():
        assert difference(reparameterize_model(model)(images()), model(images())) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["regnety_002", "tf_efficientnet_lite0"])
def test_other_networks_blocks_keep_the_general_form(architecture, build):
    model = build(architecture)
    genotype = draw_genotype(model, architecture, seed=6)
    y = transform(model, genotype)(images())
    deployed = reparameterize_model(model)
    assert difference(deployed(images()), y) < 1e-9
    assert all(
        conv.gains is None and (conv.groups > 1 or isinstance(conv, RegroupedConv2dSame))
        for conv in regrouped(deployed)
    )


@torch.no_grad()
def test_repvgg_becomes_one_convolution_per_block(build):
    model = build("repvgg_a0")
    genotype = draw_genotype(model, "repvgg_a0", seed=7)
    transform(model, genotype)
    deployed = reparameterize_model(model)
    assert not any(isinstance(module, _BatchNorm) for module in deployed.modules())
    for name, runs in genotype.convs.items():
        assert deployed.get_submodule(name.replace("conv_kxk.conv", "reparam_conv")).runs == runs


@torch.no_grad()
def test_features_only_and_channels_last(build):
    model = build("nats_resnet50", features_only=True, out_indices=(1, 2, 3, 4), **SHALLOW, genotype=_any_genotype())
    model = model.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    maps = model(x)
    deployed = reparameterize_model(model).to(memory_format=torch.channels_last)
    for ours, theirs in zip(deployed(x), maps, strict=True):
        assert difference(ours, theirs) < 1e-9


def _any_genotype():
    with torch.device("meta"):
        return draw_genotype(timm.create_model("resnet50", **SHALLOW), "resnet50", seed=8)


def test_the_deployment_form_is_not_transformed_again(build):
    model = build("resnet18", **SHALLOW)
    genotype = draw_genotype(model, "resnet18", seed=9)
    deployed = reparameterize_model(transform(model, genotype))
    with pytest.raises(GenotypeError, match="deployment form"):
        to_plain(deployed)
    with pytest.raises(GenotypeError, match="deployment form"):
        transform(deployed, genotype)


@torch.no_grad()
def test_deployed_models_are_deep_copied_compiled_and_exported(build):
    model = build("resnet18", **SHALLOW).float()
    x = images().float()
    deployed = reparameterize_model(transform(model, draw_genotype(model, "resnet18", seed=10)))
    y = deployed(x)
    assert torch.equal(copy.deepcopy(deployed)(x), y)
    torch.testing.assert_close(torch.compile(deployed, backend="aot_eager", fullgraph=True)(x), y)
    torch.testing.assert_close(torch.export.export(deployed, (x,)).module()(x), y)


# --- properties -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    block=st.sampled_from([BasicBlock, Bottleneck]),
    layers=st.tuples(*[st.integers(1, 2)] * 4),
    cardinality=st.sampled_from([1, 1, 2, 4]),
    blur=st.booleans(),
    attention=st.sampled_from([None, "se", "eca"]),
    shortcut=st.booleans(),
    output_stride=st.sampled_from([32, 16, 8]),
)
def test_random_networks(randomise_bn, seed, block, layers, cardinality, blur, attention, shortcut, output_stride):
    """Any genotype in any of timm's ResNets: same state dict, multiply-adds and shapes, deployed equally, and back."""
    is_grouped = block is Bottleneck and cardinality > 1
    options = dict(block=block, layers=layers, channels=(8, 16, 24, 32), avg_down=shortcut, output_stride=output_stride)
    options |= dict(block_args=dict(attn_layer=attention)) if attention else {}
    options |= dict(cardinality=cardinality, base_width=64 // cardinality) if is_grouped else {}
    options |= BLURRED if blur else {}
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", num_classes=3, zero_init_last=False, **options).double().eval()
    randomise_bn(model, torch.Generator().manual_seed(seed))
    x = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    y, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    parameters, multiply_adds = [(n, p.shape) for n, p in model.named_parameters()], count_multiply_adds(model, x)
    transform(model, draw_genotype(model, "resnet18", seed))
    assert list(model.state_dict()) == list(state)
    assert [(n, p.shape) for n, p in model.named_parameters()] == parameters
    assert count_multiply_adds(model, x) == multiply_adds
    changed = model(x)
    assert changed.shape == y.shape
    deployed = reparameterize_model(model)
    torch.testing.assert_close(deployed(x), changed, rtol=1e-8, atol=1e-8 * changed.std().item())
    assert count_multiply_adds(deployed, x) == multiply_adds
    to_plain(model)
    assert not regrouped(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), y)
    assert {type(module) for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)} == {block}
