"""What names, folders and files stand for in the commands, and which network and weights come of them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from nats_zoo import Genotype, NatsError, RegroupedConv2d, save_backbone
from nats_zoo.detection import create_detector, save_detector
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.models.named import (
    find_nats_network,
    find_network,
    genotype_name,
)
from tests.support.hub_server import HubProcess

# timm's smallest ResNet, which has no variant of its own; and a network that has
TINY = Genotype("test_resnet", {"layer2.0.conv2": [(16, 1, 1), (32, 1, 3)]}, provenance={"method": "by hand"})
DETECTOR = dict(fpn_channels=16, head_size=16, min_size=64, max_size=96, anchor_sizes=(8, 16, 32, 64, 128))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders and files of every kind."""
    folder = tmp_path_factory.mktemp("home")
    TINY.save(folder / "mine.json")
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    save_for_hf(plain, folder / "plain", safe_serialization=True)
    save_file(plain.state_dict(), folder / "plain.safetensors")
    regrouped = timm.create_model("nats_any", architecture="test_resnet", genotype=TINY, num_classes=3)
    regrouped.load_state_dict(plain.state_dict())
    save_backbone(regrouped, folder / "backbone")
    detector = create_detector("fasterrcnn", "nats_resnet18", 3, weights=None, **DETECTOR)
    save_detector(detector, folder / "detector")
    (folder / "search").mkdir()
    TINY.save(folder / "search" / "genotype.json")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def inside(home, monkeypatch):
    monkeypatch.chdir(home)


# --- names ------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "resnet18_c_n4_bccd": "resnet18_c_n4_bccd",
    "nats_resnet18": "resnet18_c_n4_bccd",
    "nats_resnet18.a1_in1k": "resnet18_c_n4_bccd",
    "detector": "resnet18_c_n4_bccd",
}


@pytest.mark.parametrize("name", [*PUBLISHED, "mine.json", "./mine.json", "search", "backbone"])
def test_genotypes_are_found(name):
    expected = find_genotype(PUBLISHED[name]) if name in PUBLISHED else TINY
    assert find_genotype(name) == expected


@pytest.mark.parametrize(
    ("name", "called"), [("nats_resnet50", "resnet50_c_n16_bccd"), ("mine.json", "mine"), ("backbone", "backbone")]
)
def test_genotypes_have_names(name, called):
    assert genotype_name(find_genotype(name)) == called
    assert genotype_name(TINY) == "test_resnet"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nats_resnet19", r"^nats_resnet19: no published genotype, variant, file .* resnet18_c_n4_bccd"),
        ("mine.jsn", r"^mine\.jsn: no published genotype"),
        ("resnet18", "^resnet18: a plain network, it has no genotype"),
        ("plain", "^plain: a plain network, it has no genotype"),
        ("plain.safetensors", r"^plain\.safetensors: not JSON"),
        ("empty", "^empty: no config.json in it"),
        ("nats_any", "^nats_any: name the plain architecture"),
    ],
)
def test_what_is_no_genotype_is_refused(name, words):
    with pytest.raises(NatsError, match=words) as caught:
        find_genotype(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "genotype", "name", "registered"),
    [
        ("resnet50", None, "resnet50", "resnet50"),
        ("resnet50.a1_in1k", None, "resnet50", "resnet50.a1_in1k"),
        ("nats_resnet50.a1_in1k", None, "nats_resnet50", "nats_resnet50.a1_in1k"),
        ("resnet50", "nats_resnet50", "nats_resnet50", "nats_resnet50"),
        ("test_resnet", "mine.json", "nats_any", "test_resnet"),
        ("plain", None, "test_resnet", "test_resnet"),
        ("backbone", None, "nats_any", "test_resnet"),
        ("detector", None, "nats_resnet18", "nats_resnet18"),
    ],
)
def test_models_are_found(model, genotype, name, registered):
    source = find_network(model, genotype)
    assert (source.name, source.registered) == (name, registered)
    assert (source.folder is None) == (model not in ("plain", "backbone", "detector"))


def test_a_plain_model_takes_on_the_default_genotype_where_a_plain_one_is_of_no_use():
    assert find_network("resnet18").genotype is None
    assert find_nats_network("resnet18").genotype == find_genotype("nats_resnet18")
    assert find_nats_network("test_resnet", "mine.json").genotype == TINY
    with pytest.raises(NatsError, match=r"^plain: test_resnet has no default genotype"):
        find_nats_network("plain")


def change_config(home, tmp_path, change):
    shutil.copytree(home / "backbone", tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return str(tmp_path / "changed")


def test_weights_of_another_genotype_are_refused(home, tmp_path):
    def change(config):
        config["model_args"]["genotype"]["convs"]["layer2.0.conv2"] = [[48, 2, 2]]

    with pytest.raises(NatsError, match="belong to another genotype"):
        find_network(change_config(home, tmp_path, change))


@pytest.mark.parametrize("name", [None, 3, "resnet19"])
def test_an_unknown_architecture_is_refused(name, home, tmp_path):
    def change(config):
        config["model_args"]["architecture"] = name

    with pytest.raises(NatsError, match=r"config\.json: the architecture .* is unknown"):
        find_network(change_config(home, tmp_path, change))


# --- networks and weights ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("weights", ["plain", "plain.safetensors", "backbone"])
def test_weights_are_loaded_into_the_regrouped_network(weights):
    images = torch.randn(1, 3, 64, 64)
    body = find_network("test_resnet", "mine.json").deploy(weights)
    expected = timm.create_model("local-dir:backbone", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(body(images), expected.eval()(images), strict=True))
    assert body.genotype == TINY
    plain = find_network("test_resnet").deploy(weights)
    assert not torch.allclose(plain(images)[-1], body(images)[-1])


@torch.no_grad()
def test_a_folder_brings_its_own_weights_and_classes():
    images = torch.randn(1, 3, 64, 64)
    expected = timm.create_model("local-dir:backbone", pretrained=True).eval()
    model = find_network("backbone").deploy(with_classifier=True)
    assert not model.training
    assert torch.equal(model(images), expected(images))
    assert find_network("plain").deploy(with_classifier=True)(images).shape == (1, 3)


def test_a_detectors_backbone_is_its_networks(home):
    body = find_network("detector").deploy()
    assert any(isinstance(module, RegroupedConv2d) for module in body.modules())
    tensors = load_file(home / "detector" / "model.safetensors")
    for key, value in body.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, tensors[f"backbone.body.{key}"]), key


def test_random_weights_leave_no_residual_branch_switched_off():
    asleep = timm.create_model("resnet18")
    assert not asleep.layer1[0].bn2.weight.any()
    model = find_network("nats_resnet18").create("random")
    assert (model.layer1[0].bn2.weight == 1).all()


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
        ("test_resnet", None, "^weights: test_resnet is a name, expected pretrained, random, or"),
        ("resnet18", "plain", "^plain: weights of another network"),
        ("test_resnet", "nowhere", "^nowhere: neither a folder nor the id"),
        ("test_resnet", "nowhere.safetensors", r"^nowhere\.safetensors: can not be read"),
        ("test_resnet", "empty", "^empty: no config.json in it"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, weights, words):
    with pytest.raises(NatsError, match=words):
        find_network(model).deploy(weights)


def test_weights_without_a_classifier_give_no_logits():
    with pytest.raises(NatsError, match=r"fc\.weight is missing"):
        find_network("nats_resnet18").deploy("detector", with_classifier=True)


def test_stages_are_counted_by_stride():
    source = find_network("nats_resnet18")
    assert [source.stage_index(stage) for stage in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert [find_network("convnext_atto").stage_index(stage) for stage in (1, 4)] == [0, 3]
    with pytest.raises(NatsError, match=r"^stage: nats_resnet18 has maps of the stages \[0, 1, 2, 3, 4\], not of 5"):
        source.stage_index(5)


def test_weights_have_names():
    source = find_network("nats_resnet18")
    assert source.weights_name("random") == "random"
    assert source.weights_name("pretrained") == "resnet18.tv_in1k"
    assert find_network("nats_resnet50.a1_in1k").weights_name("pretrained") == "resnet50.a1_in1k"
    assert source.weights_name("./plain") == "plain"
    assert source.weights_name("org/name") == "org/name"


# --- the Hub ----------------------------------------------------------------------------------------------------------

SEED_HUB = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("timm/test_resnet.r160_in1k")
api.upload_file(
    path_or_fileobj=sys.argv[1], path_in_repo="model.safetensors", repo_id="timm/test_resnet.r160_in1k"
)
"""
PULL = """
import sys, torch
from nats_zoo.models.named import find_network
model = find_network("test_resnet", sys.argv[1]).create("pretrained")
print(model.conv1[0].weight.double().sum().item())
"""


def test_pretrained_weights_come_from_the_hub_and_being_offline_is_said_at_once(tmp_path):
    torch.manual_seed(1)
    expected = timm.create_model("test_resnet", zero_init_last=False)
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    pull = [sys.executable, "-c", PULL, "mine.json"]
    with HubProcess(tmp_path / "root") as hub:
        environment = {**hub.client_environment(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        seed = [sys.executable, "-c", SEED_HUB, str(tmp_path / "model.safetensors")]
        subprocess.run(seed, env=environment, check=True, timeout=120)
        for variables in (environment, {**environment, "HF_HUB_OFFLINE": "1"}):  # then from the cache
            done = subprocess.run(pull, env=variables, capture_output=True, text=True, timeout=120, check=True)
            assert float(done.stdout) == expected.conv1[0].weight.double().sum().item()

    draw_dataset(tmp_path / "data", train=2, val=1, test=0, size=64)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "none")}
    for command in (
        ["erf", "nats_resnet18", "--weights", "pretrained"],
        ["train", "--data", "data", "--backbone", "nats_resnet18", "--output", "run"],
        ["search", "--data", "data", "--backbone", "resnet18.tv_in1k", "--output", "run"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "nats_zoo", *command],
            env=offline, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("nats: weights: timm/resnet18.tv_in1k: ")
    assert not (tmp_path / "erf.png").exists()
    assert not (tmp_path / "run").exists()
