"""Detectors saved as folders, published to the loopback Hub and pulled by another process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import nats_zoo
from nats_zoo import Genotype, NatsError, __version__
from nats_zoo.detection import DetectorConfig, Metrics, create_detector, from_pretrained, save_detector
from nats_zoo.detection.data.dataset import CocoDataset
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.detection.models.create import build_detector
from nats_zoo.folders import weights_file
from tests.support.hub_server import OWNER_TOKEN, HubProcess, run_script

TINY = {"fpn_channels": 16, "head_size": 16, "min_size": 64, "max_size": 96, "anchor_sizes": (8, 16, 32, 64, 128)}
NAMES = {"classes": ("blue", "vermilion", "yellow"), "category_ids": (1, 2, 3)}
CONVS = {f"layer{stage}.{block}.conv2": 32 * 2**stage for stage in (2, 3, 4) for block in (0, 1)}
GENOTYPE = Genotype(
    "resnet18",
    {name: [[40, 1, 1], [24, 1, 2], [channels - 64, 3, 1]] for name, channels in CONVS.items()},
    {"layer3.1.conv2": [1.0, 0.5, 1.25]},
    {"method": "by hand", "note": "for the tests"},
)
METRICS = Metrics(*[float(number) for number in range(30, 42)], per_class={"blue": {"ap": 12.25, "ap50": None}})


def randomise_norms(model: nn.Module) -> nn.Module:
    """With timm's zero-initialised ones no 3x3 convolution would matter."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> torch.Tensor:
    """A drawn image."""
    root = draw_dataset(tmp_path_factory.mktemp("drawn") / "data", train=1, val=0, test=0, size=96)
    return (
        CocoDataset(root / "annotations" / "instances_train.json", root / "images")[0][0]
        .as_subclass(torch.Tensor)
        .contiguous()
    )


@torch.no_grad()
def run(detector: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    return detector.eval()([image])[0]


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert len(one["boxes"]), "nothing to compare"
    return all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))


@pytest.fixture(scope="module")
def detectors(tmp_path_factory) -> dict[str, nn.Module]:
    """One with live norms on a regrouped backbone, one with frozen norms on a plain one of another family."""
    torch.manual_seed(0)
    regrouped = create_detector("fasterrcnn", "nats_resnet18", 4, GENOTYPE, weights=None, **TINY, **NAMES)
    folder = tmp_path_factory.mktemp("weights")
    plain_body = randomise_norms(timm.create_model("mobilenetv3_small_050", num_classes=2))
    timm.models.save_for_hf(plain_body, folder, safe_serialization=True)
    plain = create_detector("fasterrcnn", "mobilenetv3_small_050", 3, weights=str(folder), trainable_layers=2, **TINY)
    return {"regrouped": randomise_norms(regrouped), "plain": plain}


@pytest.fixture(scope="module")
def saved(detectors, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {
        "regrouped": save_detector(detectors["regrouped"], root / "regrouped", METRICS, "drawn test"),
        "plain": save_detector(detectors["plain"], root / "plain"),
    }


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the regrouped detector's folder, to be spoiled."""
    return Path(shutil.copytree(saved["regrouped"], tmp_path / "detector"))


@pytest.fixture
def plain_folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved["plain"], tmp_path / "detector"))


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite_weights(folder: Path, change: Callable[[dict], object], keep_metadata: bool = True) -> None:
    path = folder / "model.safetensors"
    metadata = weights_file.WeightsFile(path).metadata if keep_metadata else None
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def change_one_dilation(config: dict) -> None:
    config["genotype"]["convs"]["layer3.1.conv2"][1][1] += 1


def refusal(source: str | Path) -> str:
    with pytest.raises(NatsError) as error:
        from_pretrained(source)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regrouped", "plain"])
def test_a_saved_detector_computes_the_same_bit_for_bit(detectors, saved, image, kind, tmp_path):
    loaded = from_pretrained(saved[kind])
    assert not loaded.training
    assert loaded.config == detectors[kind].config
    assert is_equal(run(loaded, image), run(detectors[kind], image))

    again = from_pretrained(save_detector(loaded, tmp_path / "again"))
    assert again.config == loaded.config
    assert is_equal(run(again, image), run(loaded, image))
    modes = [[parameter.requires_grad for parameter in model.parameters()] for model in (again, detectors[kind])]
    assert modes[0] == modes[1], "training goes on with the same stages"


@pytest.mark.parametrize(("kind", "charts"), [("regrouped", {"genotype.png"}), ("plain", set())])
def test_a_folder_holds_config_weights_card_and_chart(saved, kind, charts):
    files = {path.name: path for path in saved[kind].iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "README.md"} | charts
    config = json.loads(files["config.json"].read_text())
    assert config.pop("nats_zoo_version") == __version__
    assert config.pop("format") == 1
    assert DetectorConfig.from_dict(config) == from_pretrained(saved[kind]).config
    fingerprint = GENOTYPE.fingerprint() if kind == "regrouped" else "plain"
    assert weights_file.WeightsFile(files["model.safetensors"]).metadata["genotype_sha256"] == fingerprint


def test_the_card_says_what_a_user_has_to_know(saved):
    card = (saved["regrouped"] / "README.md").read_text(encoding="utf-8")
    front_matter = card.split("---\n")[1]
    for line in ("library_name: nats-zoo", "pipeline_tag: object-detection", "- torchvision", "- fasterrcnn"):
        assert f"{line}\n" in front_matter
    for words in (
        *(
            "# Faster R-CNN on nats_resnet18",
            "blue, vermilion, yellow",
            "short side of 64 pixels, the long one at most 96",
        ),
        *("import nats_zoo", "genotype.png", str(GENOTYPE), "by hand", "1909.02293"),
        *("Metrics on drawn test", "| ap | 30.0 |", "| ap75 | 32.0 |", "| blue | 12.2 | - |"),
    ):
        assert words in card
    plain = (saved["plain"] / "README.md").read_text(encoding="utf-8")
    assert "this is the plain network" in plain
    assert "2 without names" in plain
    assert "Metrics" not in plain


def test_one_other_dilation_in_the_config_changes_the_outputs_and_is_refused(folder, detectors, image):
    edit_config(folder, change_one_dilation)
    config = json.loads((folder / "config.json").read_text())
    config.pop("nats_zoo_version"), config.pop("format")
    unguarded = build_detector(DetectorConfig.from_dict(config))
    unguarded.load_state_dict(load_file(folder / "model.safetensors"))
    assert not is_equal(run(unguarded, image), run(detectors["regrouped"], image))

    message = refusal(folder)
    assert str(folder / "model.safetensors") in message
    assert GENOTYPE.fingerprint() in message
    assert Genotype.from_dict(config["genotype"]).fingerprint() in message


@pytest.mark.parametrize(("kind", "genotype"), [("regrouped", None), ("plain", GENOTYPE.to_dict())])
def test_the_genotype_can_not_be_taken_away_or_given(saved, tmp_path, kind, genotype):
    folder = Path(shutil.copytree(saved[kind], tmp_path / "detector"))
    edit_config(folder, lambda config: config.update(genotype=genotype, backbone="resnet18"))
    assert "another genotype" in refusal(folder)


BAD_WEIGHTS = {
    "shape": (
        lambda t: t.update({"rpn.head.cls_logits.bias": torch.zeros(4)}),
        "rpn.head.cls_logits.bias has the shape (4,), config.json expects (3,)",
    ),
    "missing": (lambda t: t.pop("backbone.body.bn1.bias"), "backbone.body.bn1.bias has the shape missing"),
    "extra": (lambda t: t.update(extra=torch.zeros(1)), "extra has the shape (1,), config.json expects no such tensor"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_do_not_fit_name_the_tensor(plain_folder, kind):
    change, words = BAD_WEIGHTS[kind]
    rewrite_weights(plain_folder, change)
    message = refusal(plain_folder)
    assert words in message
    assert str(plain_folder / "model.safetensors") in message


BAD_CONFIGS = {
    "more classes": ({"num_classes": 9}, "roi_heads.box_predictor.bbox_pred.bias has the shape (12,)"),
    "another backbone": ({"backbone": "mobilenetv3_small_075"}, "backbone.body."),
    "unknown backbone": ({"backbone": "resnet19"}, "timm has no model 'resnet19'"),
    "backbone from elsewhere": ({"backbone": "hf-hub:org/name"}, "timm has no model 'hf-hub:org/name'"),
    "unknown framework": ({"framework": "yolo"}, "config.json: framework: 'yolo' is unknown"),
    "unknown key": ({"colour": "red"}, "config.json: unknown key 'colour'"),
    "wrong type": ({"min_size": "64"}, "config.json: min_size: expected an integer, found '64'"),
    "genotype is a path": ({"genotype": "/etc/passwd"}, "config.json: genotype: expected an object or null"),
    "genotype of another format": (
        {"genotype": {"format": 9, "architecture": "x", "convs": {}}},
        "genotype: is of a newer format (9)",
    ),
    "newer format": (
        {"format": 2, "colour": "red"},
        f"config.json: is of a newer format (2), this nats-zoo {__version__} reads up to 1: upgrade nats-zoo",
    ),
    "no format": ({"format": "1"}, "config.json: format: expected a number from 1 to 1, found '1'"),
    "genotype of another network": ({"genotype": GENOTYPE.to_dict()}, "another genotype"),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_changed_config_is_refused(plain_folder, kind):
    changes, words = BAD_CONFIGS[kind]
    edit_config(plain_folder, lambda config: config.update(changes))
    message = refusal(plain_folder)
    assert words in message
    assert str(plain_folder) in message or "timm has no model" in message


BAD_FOLDERS = {
    "empty": (lambda f: [path.unlink() for path in f.iterdir()], "no config.json in it, expected a model folder"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config of something else": (lambda f: (f / "config.json").write_text("{}"), "key 'framework' is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "a pickle": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "not a safetensors file"),
    "weights of somebody else": (
        lambda f: rewrite_weights(f, lambda tensors: None, keep_metadata=False),
        "has no genotype_sha256",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_is_no_detector_is_neither_loaded_nor_published(plain_folder, kind):
    spoil, words = BAD_FOLDERS[kind]
    spoil(plain_folder)
    message = refusal(plain_folder)
    assert words in message
    assert str(plain_folder) in message
    with pytest.raises(NatsError):
        nats_zoo.publish(plain_folder, "org/detector", dry_run=True)


def test_detectors_and_backbones_are_not_mistaken_for_each_other(folder, tmp_path):
    model = timm.create_model("nats_resnet18", genotype=GENOTYPE, num_classes=0)
    backbone = nats_zoo.save_backbone(model, tmp_path / "backbone")
    assert f"{backbone / 'config.json'}: key 'framework' is missing, expected a detector's config" in refusal(backbone)
    with pytest.raises(NatsError, match="expected a backbone's genotype"):
        nats_zoo.from_pretrained(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "/no/such", "../x"])
def test_what_can_be_no_repository_is_refused_without_network(source):
    assert "neither a folder nor the id of a Hub repository" in refusal(source)


def test_a_file_and_a_revision_of_a_folder_are_refused(folder):
    assert "is no folder" in refusal(folder / "config.json")
    with pytest.raises(NatsError, match="revision 'v1' is for repositories"):
        from_pretrained(folder, revision="v1")


def test_only_detectors_are_saved_and_only_model_folders_replaced(detectors, folder, tmp_path):
    with pytest.raises(NatsError, match="Conv2d is not saved: expected a detector made by create_detector"):
        save_detector(nn.Conv2d(1, 1, 1), tmp_path / "new")
    save_detector(detectors["plain"], folder)
    assert from_pretrained(folder).config == detectors["plain"].config

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(NatsError, match="not replaced"):
        save_detector(detectors["regrouped"], folder)
    assert from_pretrained(folder).config == detectors["plain"].config
    assert {path.name for path in tmp_path.iterdir()} == {"detector"}


# --- the Hub ----------------------------------------------------------------------------------------------------------

ROUND_TRIP = """
import json, re, sys
from safetensors.torch import load_file, save_file

import nats_zoo
from nats_zoo.hub import client as hub_client
from nats_zoo.detection import create_detector, from_pretrained

regrouped, plain, token, cache, image_file, output_file = sys.argv[1:]
image = load_file(image_file)["image"]

def attempt(function, *args, **kwargs):
    try:
        return f"loaded {type(function(*args, **kwargs)).__name__}"
    except nats_zoo.NatsError as error:
        return f"NatsError: {error}"

nats_zoo.publish(regrouped, "org/detector", token=token, tag="v1")
nats_zoo.publish(plain, "org/detector", token=token)
outputs = {}
for name, revision in (("plain", None), ("regrouped", "v1")):
    found = from_pretrained("org/detector", revision=revision, cache_dir=cache)([image])[0]
    outputs.update({f"{name}.{key}": tensor.detach() for key, tensor in found.items()})
card = (hub_client.resolve_folder("org/detector", "v1", cache_dir=cache) / "README.md").read_text(encoding="utf-8")
pasted = {}
exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1], pasted)
assert pasted["predictions"][0].keys() == {"boxes", "labels", "scores"}
outputs.update({f"card.{key}": tensor.detach() for key, tensor in pasted["detector"]([image])[0].items()})
save_file(outputs, output_file)
print(json.dumps({
    "nothing": attempt(from_pretrained, "org/nothing"),
    "revision": attempt(from_pretrained, "org/detector", revision="v9"),
    "backbone": attempt(nats_zoo.from_pretrained, "org/detector"),
    "weights": attempt(create_detector, backbone="mobilenetv3_small_050", weights="org/nothing"),
    "pretrained": attempt(create_detector, backbone="mobilenetv3_small_050", weights="pretrained"),
}))
"""


@pytest.fixture(scope="module")
def round_trip(saved, image, tmp_path_factory) -> SimpleNamespace:
    """What a process with an empty cache pulled after it had published both detectors."""
    path = tmp_path_factory.mktemp("hub")
    save_file({"image": image}, path / "image.safetensors")
    with HubProcess(path / "root") as server:
        arguments = [saved["regrouped"], saved["plain"], OWNER_TOKEN, path / "cache"]
        arguments += [path / "image.safetensors", path / "outputs.safetensors"]
        environment = server.client_environment(path / "home", token=None)
        result = run_script(ROUND_TRIP, environment, *arguments, timeout=600)
    return SimpleNamespace(found=json.loads(result.stdout), outputs=load_file(path / "outputs.safetensors"))


@pytest.mark.parametrize(("pulled", "kind"), [("regrouped", "regrouped"), ("plain", "plain"), ("card", "plain")])
def test_a_published_detector_computes_the_same_in_another_process(round_trip, detectors, image, pulled, kind):
    output = {key: round_trip.outputs[f"{pulled}.{key}"] for key in ("boxes", "labels", "scores")}
    assert is_equal(output, run(detectors[kind], image))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nothing", "org/nothing: no such folder, and from the Hub: no such repository, or it is private"),
        ("revision", "org/detector: no such folder, and from the Hub: the repository has no revision 'v9'"),
        ("backbone", "config.json: model_args: expected a backbone's genotype as an object"),
        ("weights", "org/nothing: no such folder, and from the Hub: no such repository, or it is private"),
        ("pretrained", "weights: timm/mobilenetv3_small_050.lamb_in1k: "),
    ],
)
def test_what_can_not_be_pulled_is_one_line(round_trip, case, words):
    message = round_trip.found[case]
    assert message.startswith("NatsError: ")
    assert words in message
    assert "\n" not in message
