"""The timm variants: timm's ResNets in everything but the dilations."""

import copy
import inspect
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg, group_parameters, model_entrypoint, save_for_hf
from timm.models._hub import save_config_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nats_zoo import Genotype, GenotypeError, RegroupedConv2d
from nats_zoo.base.names import VARIANT_PREFIX
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.catalogue import DEFAULT_GENOTYPES, default_genotype
from nats_zoo.models.nats_resnet import DEFAULT_TAG
from tests.support.hub_server import HubServer, run_script

VARIANTS = timm.list_models(f"{VARIANT_PREFIX}*", module="nats_resnet")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
SMALL = "nats_resnet18"  # for most of what has to run
# One of each kind in which a block computes something else: cardinality groups, a deep stem, squeeze and excitation.
KINDS = [SMALL, "nats_resnext50_32x4d", "nats_resnet50d", "nats_seresnet50"]
every_kind = pytest.mark.parametrize("variant", KINDS)


def plain_name(variant):
    return variant.removeprefix(VARIANT_PREFIX)


@pytest.fixture(scope="module")
def draw_genotype(draw_runs):
    """`draw_genotype(variant, seed)`: random runs in the blocks' 3x3 convolutions."""

    def draw(variant=SMALL, seed=0):
        with torch.device("meta"):
            plain = timm.create_model(plain_name(variant))
        convs = {
            name: draw_runs(module, seed + index)
            for index, (name, module) in enumerate(plain.named_modules())
            if isinstance(module, nn.Conv2d) and name.startswith("layer") and module.kernel_size == (3, 3)
        }
        return Genotype(plain_name(variant), convs, provenance={"method": "random", "seed": seed})

    return draw


@pytest.fixture(scope="module")
def build(randomise_bn):
    """`build(name, ...)`: a network in eval mode with random weights and batch norms, equal on every call."""

    def build(name, **kwargs):
        torch.manual_seed(0)
        model = timm.create_model(name, zero_init_last=False, **kwargs)
        return randomise_bn(model, torch.Generator().manual_seed(0)).eval()

    return build


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def perturbed(genotype):
    """The same genotype with one dilation changed."""
    convs = dict(genotype.convs)
    name = next(iter(convs))
    (channels, height, width), *rest = convs[name]
    return Genotype(genotype.architecture, convs | {name: [(channels, height, width + 1), *rest]})


# --- as timm's network ------------------------------------------------------------------------------------------------


def test_variants_are_registered():
    assert {plain_name(variant) for variant in VARIANTS} == {
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x4d",
        "resnext101_32x8d",
        "wide_resnet50_2",
        "resnet50d",
        "seresnet50",
    }
    assert all(timm.is_model(plain_name(variant)) for variant in VARIANTS)
    assert set(VARIANTS) <= set(timm.list_models("nats_*"))


@every_variant
def test_the_docstring_says_whether_the_default_genotype_was_searched(variant):
    text = " ".join(inspect.getdoc(model_entrypoint(variant)).split())
    provenance = find_genotype(default_genotype(plain_name(variant))).provenance
    if provenance["method"] == "transfer":
        assert f"`{provenance['source_genotype']}`, not searched." in text
    else:
        assert text.partition(". ")[2].startswith("Its default genotype was searched.")


@every_variant
def test_modules_and_settings_are_the_plain_ones(variant, draw_genotype):
    """Module by module, but for the regrouped convolutions; so are timm's groups for layer-wise rates."""
    options = dict(in_chans=1, num_classes=0, drop_path_rate=0.1, output_stride=16)
    with torch.device("meta"):
        plain = timm.create_model(plain_name(variant), **options)
        model = timm.create_model(variant, genotype=draw_genotype(variant), **options)
    ours, theirs = dict(model.named_modules()), dict(plain.named_modules())
    assert list(ours) == list(theirs)
    for name, module in list(theirs.items())[1:]:
        assert isinstance(ours[name], type(module)), name
        if isinstance(module, nn.Conv2d):
            for key in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
                assert getattr(ours[name], key) == getattr(module, key), (name, key)
    assert model.feature_info == plain.feature_info
    for coarse in (False, True):
        groups = [group_parameters(network, network.group_matcher(coarse)) for network in (model, plain)]
        assert groups[0] == groups[1]


@every_variant
def test_shapes_are_the_plain_ones(variant, draw_genotype):
    genotype = draw_genotype(variant)
    cases = [dict(num_classes=7), dict(num_classes=0), dict(num_classes=0, global_pool="", output_stride=8)]
    cases += [dict(features_only=True, out_indices=(1, 2, 3, 4)), dict(features_only=True, output_stride=16)]
    with torch.device("meta"):
        x = torch.empty(2, 1, 96, 64)
        for options in cases:
            plain = timm.create_model(plain_name(variant), in_chans=1, **options).eval()
            model = timm.create_model(variant, in_chans=1, genotype=genotype, **options).eval()
            ours, theirs = ([y] if isinstance(y, torch.Tensor) else y for y in (model(x), plain(x)))
            assert [y.shape for y in ours] == [y.shape for y in theirs]
            if "features_only" in options:
                assert model.feature_info.channels() == plain.feature_info.channels()
                assert model.feature_info.reduction() == plain.feature_info.reduction()


@every_variant
def test_state_dict_and_parameters_are_the_plain_ones(variant, draw_genotype):
    with torch.device("meta"):
        plain = timm.create_model(plain_name(variant))
        model = timm.create_model(variant, genotype=draw_genotype(variant))
    assert any(isinstance(module, RegroupedConv2d) for module in model.modules())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]


@every_variant
def test_multiply_adds_are_the_plain_ones(variant, draw_genotype):
    with torch.device("meta"):
        x = torch.empty(1, 3, 64, 64)
        networks = [timm.create_model(plain_name(variant))]
        networks += [timm.create_model(variant, genotype=genotype) for genotype in (draw_genotype(variant), None)]
    counts = []
    for network in networks:
        with FlopCounterMode(display=False) as counter:
            network.eval()(x)
        counts.append(counter.get_total_flops())
    assert counts[0] > 10**8
    assert counts == [counts[0]] * 3


@torch.no_grad()
@every_kind
def test_plain_genotype_is_bit_equal(variant, build, images, draw_genotype):
    plain = build(plain_name(variant))
    ones = {name: [(run.channels, 1, 1) for run in runs] for name, runs in draw_genotype(variant).convs.items()}
    for convs in ({}, ones):
        assert torch.equal(build(variant, genotype=Genotype(plain_name(variant), convs))(images), plain(images))


@torch.no_grad()
@every_kind
def test_outputs_equal_the_oracle(variant, build, images, draw_genotype, convolve_per_channel):
    genotype, images = draw_genotype(variant), images[:1]
    plain = build(plain_name(variant)).double()
    for name, runs in genotype.convs.items():
        plain.get_submodule(name).register_forward_hook(
            lambda conv, inputs, output, runs=runs: convolve_per_channel(conv, inputs[0], [list(run) for run in runs])
        )
    y = build(variant, genotype=genotype).double()(images.double())
    torch.testing.assert_close(y, plain(images.double()))
    other = build(variant, genotype=perturbed(genotype)).double()(images.double())
    assert (other - y).abs().max() > 1e-5 * y.std()


@torch.no_grad()
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 2, 3, 4), (3,)])
def test_features_only(out_indices, build, images, draw_genotype):
    options = dict(features_only=True, out_indices=out_indices)
    plain, genotype = build("resnet18", **options), draw_genotype()
    body = build(SMALL, genotype=genotype, **options)
    assert body.feature_info.channels() == plain.feature_info.channels()
    assert body.feature_info.reduction() == plain.feature_info.reduction()
    maps, plain_maps = body(images), plain(images)
    assert [m.shape for m in maps] == [m.shape for m in plain_maps]
    assert not torch.allclose(maps[-1], plain_maps[-1])
    # The maps are those of the classifier with the same weights.
    torch.testing.assert_close(
        maps,
        build(SMALL, genotype=genotype).forward_intermediates(
            images, indices=list(out_indices), intermediates_only=True
        ),
    )


@torch.no_grad()
def test_timm_arguments(build, draw_genotype):
    genotype = draw_genotype()
    model = build(SMALL, genotype=genotype, in_chans=1, num_classes=7)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    model.reset_classifier(0)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 512)
    dense = build(SMALL, genotype=genotype, output_stride=16)
    assert dense.layer4[1].conv2.dilation == (2, 2)
    assert dense.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 512, 4, 4)


@every_kind
def test_trains(variant, build, images, draw_genotype):
    model = build(variant, genotype=draw_genotype(variant), num_classes=3, drop_path_rate=0.1).train()
    model.set_grad_checkpointing()
    model(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("variant", [SMALL, "nats_resnext50_32x4d"])
def test_torchscript_deepcopy_and_export(variant, build, images, draw_genotype):
    model = build(variant, genotype=draw_genotype(variant), scriptable=True)
    y = model(images)
    assert torch.equal(torch.jit.script(model)(images), y)
    assert torch.equal(copy.deepcopy(model)(images), y)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), y)


# --- genotype= --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_form_of_a_genotype(build, images, draw_genotype, tmp_path):
    genotype = draw_genotype()
    path = tmp_path / "mine.json"
    genotype.save(path)
    expected = build(SMALL, genotype=genotype)
    assert expected.genotype == genotype
    for form in (genotype.to_dict(), path, str(path)):
        model = build(SMALL, genotype=form)
        assert model.genotype == genotype
        assert torch.equal(model(images), expected(images))


@every_variant
def test_default_genotype(variant):
    architecture = plain_name(variant)
    with torch.device("meta"):
        model = timm.create_model(variant)
    assert model.genotype == find_genotype(DEFAULT_GENOTYPES[architecture])
    assert model.genotype.architecture == architecture
    assert model._model_args["genotype"] == model.genotype.to_dict()
    assert model.genotype.share_changed() > 0.5
    regrouped = {name: m.runs for name, m in model.named_modules() if isinstance(m, RegroupedConv2d)}
    assert regrouped == model.genotype.convs


def test_without_a_published_genotype_one_must_be_passed():
    with pytest.raises(GenotypeError, match=r"nats_resnet26: no default genotype is published yet, pass genotype="):
        default_genotype("resnet26")


def test_refuses_anothers_genotype(draw_genotype):
    with pytest.raises(GenotypeError, match=r"'resnet18'.*'resnet50'"):
        timm.create_model("nats_resnet50", genotype=draw_genotype())


def test_refuses_a_genotype_that_does_not_fit():
    genotype = Genotype("resnet18", {"layer2.0.conv2": [(127, 2, 2)]})
    with pytest.raises(GenotypeError, match=r"layer2\.0\.conv2.*127 channels, expected 128"):
        timm.create_model(SMALL, genotype=genotype)


# --- saving and loading -----------------------------------------------------------------------------------------------


def save(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("as_path", [False, True], ids=["genotype", "path"])
def test_saved_folder_holds_the_genotype_and_loads_through_timm(as_path, build, images, draw_genotype, tmp_path):
    genotype = draw_genotype()
    path = tmp_path / "mine.json"
    genotype.save(path)
    model = build(SMALL, genotype=path if as_path else genotype, num_classes=5)
    config = save(model, tmp_path / "model")
    path.unlink()  # what was saved must not need it
    assert config["architecture"] == SMALL
    assert config["model_args"]["genotype"] == genotype.to_dict()
    assert "mine.json" not in (tmp_path / "model" / "config.json").read_text()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert loaded.genotype == genotype
    assert loaded.genotype.fingerprint() == genotype.fingerprint()
    assert torch.equal(loaded(images), model(images))
    body = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True).eval()
    assert torch.equal(body(images)[-1], model.forward_features(images))


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder for each variant, with the config.json of one that runs its default genotype; without weights."""
    path = tmp_path_factory.mktemp("configs")
    for variant in VARIANTS:
        (path / variant).mkdir()
        with torch.device("meta"):
            save_config_for_hf(timm.create_model(variant, num_classes=5), str(path / variant / "config.json"))
    return path


@every_variant
def test_a_saved_default_stays_what_it_was(variant, configs, monkeypatch):
    config = json.loads((configs / variant / "config.json").read_text())
    genotype = find_genotype(DEFAULT_GENOTYPES[plain_name(variant)])
    assert config["architecture"] == variant
    assert config["model_args"]["genotype"] == genotype.to_dict()
    monkeypatch.delitem(DEFAULT_GENOTYPES, plain_name(variant))  # another version may have another one
    with torch.device("meta"):
        loaded = timm.create_model(f"local-dir:{configs / variant}")
    assert loaded.genotype == genotype
    assert loaded.num_classes == 5


FROM_HUB = """
import json, sys
import timm, torch
import nats_zoo

found = {}
for variant in sys.argv[1:]:
    with torch.device("meta"):
        model = timm.create_model(f"hf-hub:org/{variant}")
        body = timm.create_model(f"hf-hub:org/{variant}", features_only=True, out_indices=(1, 2, 3, 4))
    found[variant] = [model.genotype.fingerprint(), model.num_classes, body.feature_info.reduction()]
print(json.dumps(found))
"""

UPLOAD = """
import sys
from huggingface_hub import HfApi

folder, *variants = sys.argv[1:]
for variant in variants:
    HfApi().create_repo(f"org/{variant}")
    HfApi().upload_folder(repo_id=f"org/{variant}", folder_path=f"{folder}/{variant}")
"""


def test_every_variant_loads_from_the_hub(configs, tmp_path):
    with HubServer() as server:
        run_script(UPLOAD, server.client_environment(tmp_path / "owner"), configs, *VARIANTS)
        output = run_script(FROM_HUB, server.client_environment(tmp_path / "reader", token=None), *VARIANTS).stdout
    assert json.loads(output) == {
        variant: [find_genotype(default_genotype(plain_name(variant))).fingerprint(), 5, [4, 8, 16, 32]]
        for variant in VARIANTS
    }


def test_a_saved_model_can_be_saved_again(build, draw_genotype, tmp_path):
    first = save(build(SMALL, genotype=draw_genotype(), num_classes=5), tmp_path / "first")
    again = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True)
    second = save(again, tmp_path / "second")
    assert second["model_args"] == first["model_args"]


@pytest.mark.parametrize("name", ["{folder}/mine.json", "/etc/passwd", "nats_resnet18_c", ["mine.json"]])
def test_a_path_in_a_downloaded_config_is_refused(name, build, draw_genotype, tmp_path):
    """Not even a good file of that name is read: a config must not choose what we open."""
    genotype = draw_genotype()
    folder = tmp_path / "model"
    config = save(build(SMALL, genotype=genotype), folder)
    genotype.save(folder / "mine.json")
    config["model_args"]["genotype"] = name.format(folder=folder) if isinstance(name, str) else name
    (folder / "config.json").write_text(json.dumps(config))
    for options in (dict(pretrained=True), dict(pretrained=False), dict(features_only=True)):
        with pytest.raises(GenotypeError, match=r"config\.json") as error:
            timm.create_model(f"local-dir:{folder}", **options)
        assert len(str(error.value).splitlines()) == 1


# --- pretrained weights -----------------------------------------------------------------------------------------------


@every_variant
def test_tags_and_their_cfgs_are_timms(variant):
    plain = plain_name(variant)
    tags = {name.partition(".")[2] for name in timm.list_models(plain, pretrained=True)}
    found = {name.partition(".")[2] for name in timm.list_models(variant, pretrained=True)}
    assert found == tags
    assert tags
    for tag in tags:
        ours, theirs = (get_pretrained_cfg(f"{name}.{tag}").to_dict() for name in (variant, plain))
        assert ours.pop("architecture", variant) in (variant, None)
        theirs.pop("architecture", None)
        assert ours == theirs
        assert ours["hf_hub_id"] == f"timm/{plain}.{tag}"


@every_variant
def test_default_tag_is_the_papers_baseline(variant):
    tags = {name.partition(".")[2] for name in timm.list_models(plain_name(variant), pretrained=True)}
    assert get_pretrained_cfg(variant).tag == (
        DEFAULT_TAG if DEFAULT_TAG in tags else get_pretrained_cfg(plain_name(variant)).tag
    )


def test_the_default_tags():
    tags = {plain_name(variant): get_pretrained_cfg(variant).tag for variant in VARIANTS}
    without = {"resnext101_32x4d": "fb_ssl_yfcc100m_ft_in1k", "resnet50d": "ra2_in1k", "seresnet50": "a1_in1k"}
    assert tags == dict.fromkeys(tags, "tv_in1k") | without


def test_a_tag_without_weights_is_listed_as_timm_lists_it():
    assert "nats_resnext101_32x4d.untrained" in timm.list_models("nats_*", include_tags=True)
    assert "nats_resnext101_32x4d.untrained" not in timm.list_pretrained("nats_*")


@torch.no_grad()
def test_plain_weights_load_strictly_from_a_file(build, images, draw_genotype, tmp_path):
    plain = build("resnet18")
    path = tmp_path / "plain.safetensors"
    save_file(plain.state_dict(), path)
    overlay = dict(file=str(path))
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, genotype=draw_genotype())
    model = timm.create_model(SMALL, **options).eval()
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert not torch.equal(model(images), plain(images))
    grey = timm.create_model(SMALL, in_chans=1, num_classes=5, **options)
    assert torch.equal(grey.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    torch.testing.assert_close(grey.conv1.weight, plain.conv1.weight.sum(1, keepdim=True))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_other_weights_do_not_load(change, build, draw_genotype, tmp_path):
    state = build("resnet18").state_dict()
    if change == "shape":
        state["layer2.0.conv2.weight"] = state["layer2.0.conv2.weight"][:64].clone()
    elif change == "missing":
        del state["layer2.0.conv2.weight"]
    else:
        state["layer2.0.conv2.branches.0.weight"] = torch.zeros(1)
    path = tmp_path / "plain.safetensors"
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"layer2\.0\.conv2"):
        timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), genotype=draw_genotype())
