"""nats_any: any timm network as a variant, regrouped before timm wraps it and rebuilt from what timm saves."""

import copy
import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import (
    create_feature_extractor,
    get_graph_node_names,
    get_pretrained_cfg,
    resolve_model_input_args,
    save_for_hf,
)
from timm.models._features import FeatureDictNet, FeatureHookNet

from nats_zoo import Genotype, GenotypeError, NatsError, RegroupedConv2d, from_pretrained, save_backbone, transform
from nats_zoo.networks.stages import searchable_convs
from nats_zoo.networks.transform import to_plain
from tests.support.hub_server import HubServer, run_script
from tests.support.networks import settle, wake

# By how timm makes their features_only form: a wrapper that keeps the names, one that changes them, one with hooks, one
# around the whole network, and classes of their own.
FAMILIES = {
    "regnetx_002": {},
    "test_convnext": {},
    "densenet121": dict(block_config=(2, 2, 2, 2)),
    "repvgg_a0": {},
    "legacy_xception": {},
    "cspnext_tiny": {},
    "mobilenetv3_small_050": {},
    "tf_efficientnet_b0": {},
    "hrnet_w18_small": {},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
SMALL = "regnetx_002"


@pytest.fixture(scope="module")
def draw_genotype(draw_runs):
    """`draw_genotype(architecture)`: random runs in up to six convolutions of each stage."""

    def draw(architecture=SMALL, **options):
        with torch.device("meta"):
            plain = timm.create_model(architecture, **options)
        convs = [name for names in searchable_convs(plain).values() for name in names[-6:]]
        runs = {name: draw_runs(plain.get_submodule(name), index) for index, name in enumerate(convs)}
        return Genotype(architecture, runs, provenance={"method": "random"})

    return draw


@pytest.fixture(scope="module")
def build(randomise_bn):
    """`build(name, ...)`: a network in eval mode with random weights and batch norms, equal on every call."""

    def build(name, **kwargs):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **kwargs)
        wake(randomise_bn(model, torch.Generator().manual_seed(0)))
        return settle(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))

    return build


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def any_of(family, genotype, **options):
    return timm.create_model("nats_any", architecture=family, genotype=genotype, **FAMILIES[family], **options).eval()


def save(model, folder):
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((folder / "config.json").read_text())


def regrouped(model):
    return [name for name, module in model.named_modules() if isinstance(module, RegroupedConv2d)]


# --- as timm's network ------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_family
def test_it_is_timms_network_transformed(family, build, draw_genotype, images):
    plain = build(family, **FAMILIES[family])
    genotype = draw_genotype(family, **FAMILIES[family])
    model = any_of(family, genotype, num_classes=5)
    assert isinstance(model, type(plain))
    assert model.genotype == genotype
    assert list(model.state_dict()) == list(plain.state_dict())
    assert regrouped(model) == [name for name, _ in plain.named_modules() if name in genotype.convs]
    model.load_state_dict(plain.state_dict(), strict=True)
    y = model(images)
    assert not torch.allclose(y, plain(images))
    assert torch.equal(y, transform(plain, genotype)(images))


@torch.no_grad()
@every_family
def test_features_only(family, build, draw_genotype, images, tmp_path):
    """Its maps are those of the regrouped classifier with the same weights, in timm's wrapper for the family."""
    plain = build(family, **FAMILIES[family])
    genotype = draw_genotype(family, **FAMILIES[family])
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    weights = dict(file=str(tmp_path / "plain.safetensors"), num_classes=5)
    body = any_of(family, genotype, features_only=True, pretrained=True, pretrained_cfg_overlay=weights)
    timms = timm.create_model(family, features_only=True, **FAMILIES[family])
    assert isinstance(body, type(timms))
    assert list(body.state_dict()) == list(timms.state_dict())
    assert body.genotype == genotype
    for attribute in ("out_indices", "channels", "reduction", "module_name"):
        found, expected = getattr(body.feature_info, attribute), getattr(timms.feature_info, attribute)
        assert (found() if callable(found) else found) == (expected() if callable(expected) else expected)
    maps = body(images)
    options = dict(indices=list(body.feature_info.out_indices), intermediates_only=True)
    plain_maps = plain.forward_intermediates(images, **options)
    torch.testing.assert_close(maps, transform(plain, genotype).forward_intermediates(images, **options))
    assert not torch.allclose(maps[-1], plain_maps[-1])


def test_features_that_end_early(draw_genotype):
    genotype = draw_genotype()
    body = any_of(SMALL, genotype, features_only=True, out_indices=(1, 2))
    assert body.feature_info.reduction() == [4, 8]
    assert set(regrouped(body)) == {name for name in genotype.convs if name.startswith(("stem", "s1", "s2"))}
    assert body.genotype == genotype


def test_convolutions_that_features_lack_are_checked_all_the_same():
    """HRNet's classifier has 3x3 convolutions of its own."""
    name = "downsamp_modules.0.0"
    for width, fits in ((256, True), (255, False)):
        genotype = Genotype("hrnet_w18_small", {"conv1": [(64, 2, 2)], name: [(width, 2, 2)]})
        if fits:
            assert regrouped(any_of("hrnet_w18_small", genotype, features_only=True)) == ["conv1"]
        else:
            with pytest.raises(GenotypeError, match=rf"{name}: .*255 channels, expected 256"):
                any_of("hrnet_w18_small", genotype, features_only=True)


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx", FeatureDictNet, "partial"])
def test_every_way_of_timm_to_give_features(feature_cls, draw_genotype, images, build):
    cls = (
        (lambda model, **kw: FeatureHookNet(model, return_dict=True, **kw)) if feature_cls == "partial" else feature_cls
    )
    options = dict(features_only=True, feature_cls=cls, out_indices=(1, 3))
    genotype = draw_genotype()
    model = build("nats_any", architecture=SMALL, genotype=genotype)
    overlay = dict(state_dict=model.state_dict(), num_classes=5)
    body = any_of(SMALL, genotype, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert isinstance(body, type(timm.create_model(SMALL, **options)))
    maps = body(images)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    torch.testing.assert_close(maps, model.forward_intermediates(images, indices=[1, 3], intermediates_only=True))


@torch.no_grad()
def test_timm_arguments(draw_genotype, tmp_path):
    genotype = draw_genotype()
    model = any_of(SMALL, genotype, in_chans=1, num_classes=7)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    model.reset_classifier(0)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 368)
    dense = any_of(SMALL, genotype, output_stride=16)
    assert dense.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 368, 4, 4)
    conv = dense.get_submodule("s4.b7.conv2.conv")
    assert isinstance(conv, RegroupedConv2d)
    assert conv.dilation == (2, 2)
    torch.save(dense.state_dict(), tmp_path / "weights.pth")
    again = any_of(SMALL, genotype, checkpoint_path=str(tmp_path / "weights.pth"))
    assert torch.equal(again.head.fc.weight, dense.head.fc.weight)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_copied_pickled_scripted_traced_and_exported(draw_genotype, images):
    genotype = draw_genotype()
    model = any_of(SMALL, genotype, scriptable=True)
    y = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin.genotype == genotype
        assert twin._model_args == model._model_args
        assert torch.equal(twin(images), y)
    assert torch.equal(torch.jit.script(model)(images), y)
    node = get_graph_node_names(model)[1][-1]
    assert torch.equal(create_feature_extractor(model, [node])(images)[node], y)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), y)


# --- arguments --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_form_of_a_genotype(draw_genotype, tmp_path):
    genotype = draw_genotype()
    path = tmp_path / "mine.json"
    genotype.save(path)
    for form in (genotype, genotype.to_dict(), path, str(path)):
        assert any_of(SMALL, form).genotype == genotype


def test_genotype_and_architecture_say_what_the_other_is(draw_genotype):
    with torch.device("meta"):
        model = timm.create_model("nats_any", genotype=draw_genotype())
        assert isinstance(model, type(timm.create_model(SMALL)))
        assert model.genotype == draw_genotype()
        model = timm.create_model("nats_any", architecture="resnet34")
        assert model.genotype == timm.create_model("nats_resnet34").genotype
        assert timm.create_model("nats_any").genotype == timm.create_model("nats_resnet18").genotype


PLAIN = Genotype(SMALL, {})
REFUSED = {
    "no genotype": (dict(architecture=SMALL), "nats_any: no genotype, expected genotype= with one of regnetx_002"),
    "no network of timm": (dict(architecture="regnetx_9", genotype=PLAIN), "timm has no architecture 'regnetx_9'"),
    "a repository": (dict(architecture="hf-hub:org/model", genotype=PLAIN), "no architecture 'hf-hub:org/model'"),
    "a variant": (dict(architecture="nats_resnet18", genotype=PLAIN), "'nats_resnet18' is regrouped already"),
    "itself": (dict(architecture="nats_any", genotype=PLAIN), "'nats_any' is regrouped already"),
    "an old name": (dict(architecture="tv_resnet34", genotype=PLAIN), "'tv_resnet34' is an old name.*resnet34.tv_in1k"),
    "no name": (dict(architecture=["resnet18"], genotype=PLAIN), r"timm's name of a network, found \['resnet18'\]"),
    "of another": (dict(architecture="resnet18", genotype=PLAIN), "'regnetx_002', the model is 'resnet18'"),
    "unknown convolution": (
        dict(architecture=SMALL, genotype=Genotype(SMALL, {"s9.conv": [(8, 2, 2)]})),
        "no convolution named 's9.conv'",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("options", [{}, dict(features_only=True)], ids=["classifier", "features"])
def test_refuses(arguments, words, options):
    with pytest.raises(NatsError, match=words) as error:
        timm.create_model("nats_any", **arguments, **options)
    assert len(str(error.value).splitlines()) == 1


def test_refuses_blocks_that_rebuild_their_convolutions():
    genotype = Genotype("mobileone_s1", {"stages.1.0.conv_kxk.0.conv": [(96, 2, 2)]})
    with pytest.raises(GenotypeError, match="MobileOneBlock"):
        timm.create_model("nats_any", architecture="mobileone_s1", genotype=genotype, features_only=True)


# --- pretrained weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features_only", [False, True])
def test_tags_name_timms_weights(features_only):
    for name, options in (
        ("regnety_032", dict(architecture="regnety_032")),
        ("regnety_032.tv2_in1k", dict(architecture="regnety_032.tv2_in1k")),
        ("regnety_032.tv2_in1k", dict(architecture="regnety_032", pretrained_cfg="tv2_in1k")),
    ):
        with torch.device("meta"):
            options |= dict(genotype=Genotype("regnety_032", {}), features_only=features_only)
            model = timm.create_model("nats_any", **options)
            plain = timm.create_model(name, features_only=features_only)
        assert model.pretrained_cfg == plain.pretrained_cfg | {"architecture": "nats_any"}
        assert model.pretrained_cfg["hf_hub_id"] == get_pretrained_cfg(name).hf_hub_id
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(none\) for regnety_032"):
        timm.create_model("nats_any", architecture="regnety_032.none", genotype=Genotype("regnety_032", {}))


def test_a_tag_of_the_entry_point_is_the_architectures():
    model = timm.create_model("nats_any.pycls_in1k", architecture=SMALL, genotype=PLAIN)
    assert model.pretrained_cfg["hf_hub_id"] == "timm/regnetx_002.pycls_in1k"


def test_a_models_cfg_builds_another(draw_genotype):
    first = any_of(SMALL, draw_genotype())
    again = any_of(SMALL, draw_genotype(), pretrained_cfg=first.pretrained_cfg | {"mean": (0.1, 0.2, 0.3)})
    assert again.pretrained_cfg == first.pretrained_cfg | {"mean": (0.1, 0.2, 0.3)}


def test_timms_scripts_find_no_cfg_and_the_architectures_is_taken():
    resolved = resolve_model_input_args("nats_any", architecture="regnety_032", genotype=Genotype("regnety_032", {}))
    with torch.device("meta"):
        model = timm.create_model(**resolved)
    assert model.pretrained_cfg["mean"] == get_pretrained_cfg("regnety_032").mean
    assert model.pretrained_cfg["hf_hub_id"] == get_pretrained_cfg("regnety_032").hf_hub_id


@torch.no_grad()
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_load_strictly(change, build, draw_genotype, tmp_path):
    state, name = build(SMALL).state_dict(), "s4.b7.conv2.conv.weight"
    overlay = dict(file=str(tmp_path / "weights.safetensors"), num_classes=5)
    options = dict(num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay)
    save_file(state, overlay["file"])
    model = any_of(SMALL, draw_genotype(), **options)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    if change == "missing":
        del state[name]
    else:
        state["s4.b9.conv.weight" if change == "unexpected" else name] = torch.zeros(1)
    save_file(state, overlay["file"])
    with pytest.raises(RuntimeError, match=r"s4\.b[79]"):
        any_of(SMALL, draw_genotype(), **options)


# --- saving and loading -----------------------------------------------------------------------------------------------


@torch.no_grad()
@every_family
def test_what_timm_saves_timm_loads(family, build, draw_genotype, images, tmp_path):
    genotype = draw_genotype(family, **FAMILIES[family])
    path = tmp_path / "mine.json"
    genotype.save(path)
    model = build("nats_any", architecture=family, genotype=path, **FAMILIES[family])
    config = save(model, tmp_path / "model")
    path.unlink()  # what was saved must not need it
    assert config["architecture"] == "nats_any"
    assert config["model_args"]["architecture"] == family
    assert config["model_args"]["genotype"] == genotype.to_dict()
    source = f"local-dir:{tmp_path / 'model'}"
    loaded = timm.create_model(source, pretrained=True).eval()
    assert type(loaded) is type(model)
    assert loaded.genotype == genotype
    assert torch.equal(loaded(images), model(images))
    assert save(loaded, tmp_path / "again")["model_args"] == config["model_args"]
    body = timm.create_model(source, pretrained=True, features_only=True, out_indices=(-1,)).eval()
    expected = model.forward_intermediates(images, indices=1, intermediates_only=True)
    torch.testing.assert_close(body(images)[-1], expected[-1])


def test_the_tag_is_not_saved_as_part_of_the_architecture(tmp_path):
    model = timm.create_model("nats_any", architecture="regnetx_002.pycls_in1k", genotype=PLAIN)
    config = save(model, tmp_path)
    assert config["model_args"]["architecture"] == SMALL
    assert config["pretrained_cfg"]["tag"] == "pycls_in1k"


def test_a_model_made_plain_again_is_saved_plain(draw_genotype, tmp_path):
    model = to_plain(any_of(SMALL, draw_genotype()))
    config = save(model, tmp_path)
    assert config["model_args"]["genotype"]["convs"] == {}
    assert regrouped(timm.create_model(f"local-dir:{tmp_path}")) == []


@torch.no_grad()
def test_backbone_folder(build, draw_genotype, images, tmp_path):
    model = build("nats_any", architecture="test_convnext", genotype=draw_genotype("test_convnext"))
    folder = save_backbone(model, tmp_path / "backbone")
    loaded = from_pretrained(folder).eval()
    assert loaded.genotype == model.genotype
    assert torch.equal(loaded(images), model(images))
    body = from_pretrained(folder, features_only=True).eval()
    torch.testing.assert_close(body(images), model.forward_intermediates(images, intermediates_only=True))
    edit_config(folder, lambda args: args["genotype"]["convs"].popitem())
    with pytest.raises(NatsError, match="another genotype"):
        from_pretrained(folder)


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["model_args"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("options", [dict(pretrained=True), dict(), dict(features_only=True)], ids=str)
def test_what_a_downloaded_config_may_not_say(options, draw_genotype, tmp_path):
    genotype = draw_genotype()
    genotype.save(tmp_path / "mine.json")
    for changes, words in (
        (dict(genotype=str(tmp_path / "mine.json")), r"config\.json: model_args: genotype must be the genotype itself"),
        (dict(genotype="resnet18_c_n4_bccd"), r"config\.json: model_args"),
        (dict(architecture="nats_any"), "regrouped already"),
        (dict(architecture="hf-hub:org/model"), "timm has no architecture"),
        (dict(architecture={"name": SMALL}), "timm's name of a network"),
    ):
        save(any_of(SMALL, genotype), tmp_path / "model")
        edit_config(tmp_path / "model", lambda args, changes=changes: args.update(changes))
        with pytest.raises(NatsError, match=words) as error:
            timm.create_model(f"local-dir:{tmp_path / 'model'}", **options)
        assert len(str(error.value).splitlines()) == 1


# --- the Hub ----------------------------------------------------------------------------------------------------------

THROUGH_THE_HUB = """
import json, sys
import timm, torch
from timm.models import push_to_hf_hub
from nats_zoo import Genotype, RegroupedConv2d, transform

genotype = Genotype.load(sys.argv[1])
image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
safe = dict(safe_serialization=True)
with torch.no_grad():
    plain = timm.create_model("test_convnext.r160_in1k").eval()
    for block in (module for module in plain.modules() if hasattr(module, "gamma")):
        block.gamma.fill_(1.0)
    push_to_hf_hub(plain, "timm/test_convnext.r160_in1k", **safe)  # the weights that timm will ask for
    options = dict(architecture="test_convnext", genotype=genotype, pretrained=True)
    model = timm.create_model("nats_any", **options).eval()
    body = timm.create_model("nats_any", features_only=True, **options).eval()
    maps = model.forward_intermediates(image, intermediates_only=True)
    found = dict(
        differs=not torch.equal(model(image), plain(image)),
        pretrained=torch.equal(model(image), transform(plain, genotype)(image)),
        features=all(map(torch.equal, body(image), maps)),
    )
    push_to_hf_hub(model, "org/any", **safe)
    loaded = timm.create_model("hf-hub:org/any", pretrained=True).eval()
    body = timm.create_model("hf-hub:org/any", pretrained=True, features_only=True).eval()
    found |= dict(
        loaded=loaded.genotype == genotype and torch.equal(loaded(image), model(image)),
        loaded_features=all(map(torch.equal, body(image), maps)),
    )
print(json.dumps(found))
"""


def test_pretrained_and_published_through_the_hub(draw_genotype, tmp_path):
    draw_genotype("test_convnext").save(tmp_path / "mine.json")
    with HubServer() as hub:
        done = run_script(THROUGH_THE_HUB, hub.client_environment(tmp_path / "home"), tmp_path / "mine.json")
    assert json.loads(done.stdout) == dict.fromkeys(
        ("differs", "pretrained", "features", "loaded", "loaded_features"), True
    )
