"""What someone else's file can not do: run code, reach other files, take all memory, or make a secret public."""

import ast
import contextlib
import json
import logging
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import nats_zoo
from nats_zoo import Genotype, GenotypeError, NatsError
from nats_zoo.base.errors import redact
from nats_zoo.base.files import MAX_BYTES, MAX_YAML_VALUES, read_json, read_yaml
from nats_zoo.cli import main
from nats_zoo.detection import create_detector, from_pretrained, save_detector
from nats_zoo.detection.data.defects import DataError
from nats_zoo.detection.data.formats.coco import read_annotations
from nats_zoo.detection.data.formats.voc import parse_voc, read_voc
from nats_zoo.detection.data.formats.yolo import read_yolo
from nats_zoo.detection.models.config import DetectorConfig
from nats_zoo.detection.prediction.predict import _name_outputs
from nats_zoo.detection.runs.folder import Checkpoint, RunError, RunFolder
from nats_zoo.folders import weights_file
from nats_zoo.folders.limits import MAX_CLASSES, MAX_MODULES, MAX_NUMBER, limited_size, on_meta
from nats_zoo.folders.model_folder import model_files
from nats_zoo.models.named import find_network
from nats_zoo.publishing.genotype import genotype_files, save_genotype_folder
from nats_zoo.search.space import find_space
from tests.support.hub_server import OWNER_TOKEN, HubServer
from tests.support.paths import ROOT

GENOTYPE = Genotype("test_resnet", {"layer3.0.conv2": [[44, 1, 1], [4, 1, 3]]})
TINY = {"fpn_channels": 8, "head_size": 8, "min_size": 32, "max_size": 48, "weights": None}
TOKEN = "hf_" + "aB3" * 11 + "q"  # as long as the Hub's


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture
def marker(tmp_path) -> Iterator[Path]:
    path = tmp_path / "was-executed"
    yield path
    assert not path.exists(), "a pickle of someone else's was executed"


def pickled(path: Path, marker: Path, legacy: bool = False) -> Path:
    """A checkpoint as torch.save writes it, with tensors and a payload."""
    content = {"model": {"conv1.weight": torch.zeros(1)}, "payload": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, num_classes=3)
    detector = create_detector("fasterrcnn", "test_resnet", 2, genotype=GENOTYPE, **TINY)
    return SimpleNamespace(
        backbone=nats_zoo.save_backbone(model, root / "backbone"), detector=save_detector(detector, root / "detector")
    )


def copy_of(folder: Path, target: Path, leave_out: str = "") -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.name != leave_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(NatsError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- no pickle, by source ---------------------------------------------------------------------------------------------

FOREIGN_CODE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
XML_PARSERS = {"xml.dom", "xml.sax", "lxml", "xmltodict"}
NEVER = {
    "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load",
    "yaml.full_load_all", "yaml.unsafe_load_all", "ElementTree.parse", "ElementTree.fromstring", "ElementTree.XML",
    "ElementTree.iterparse", "shutil.unpack_archive",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = ("torch.load", "load_state_dict_from_url", "get_state_dict")  # unpickle unless they are told not to
OWN_LOADERS = {"torch.jit.load", "torch.export.load"}  # of what the export has just written
ONLY_IN = {
    "yaml.safe_load": ("benchmarks/",),  # everything else goes through files.read_yaml, which has limits
    "yaml.SafeLoader": ("nats_zoo/files.py",),
    "torch.jit.load": ("nats_zoo/export.py",),
    "torch.export.load": ("nats_zoo/export.py",),
}


def find_dangers(source: str, name: str = "x.py") -> list[str]:
    """What in a module could run or unpack what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"imports {m}" for m in modules if m.partition(".")[0] in FOREIGN_CODE]
        found += [f"imports {m}" for m in modules if any(m == x or m.startswith(f"{x}.") for x in XML_PARSERS)]
        found += [f"imports {m}" for m in modules if m in NEVER | {"torch.load", "numpy.load", "yaml.safe_load"}]
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            found += [dotted for word, files in ONLY_IN.items() if dotted == word and not name.startswith(files)]
        if isinstance(node, ast.Call):
            found += _dangers_of_call(node)
    return [f"{name}: {danger}" for danger in found]


def _dangers_of_call(call: ast.Call) -> list[str]:
    dotted = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    last = ".".join(dotted.split(".")[-2:])
    found = [dotted] if dotted in BUILTINS or last in NEVER or last.endswith(".extractall") else []
    is_loader = any(dotted == loader or dotted.endswith(f".{loader}") for loader in LOADERS)
    if is_loader and dotted not in OWN_LOADERS and given.get("weights_only") != "True":
        found.append(f"{dotted} without weights_only=True")
    if dotted in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
        found.append(f"{dotted} with allow_pickle")
    if given.get("shell") == "True":
        found.append(f"{dotted} with a shell")
    if given.get("trust_remote_code", "False") != "False":
        found.append(f"{dotted} with remote code")
    return found


def test_our_sources_neither_unpickle_nor_evaluate():
    files = [*(ROOT / "nats_zoo").glob("*.py"), *(ROOT / "detection").rglob("*.py"), *(ROOT / "search").rglob("*.py")]
    files += [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py"), ROOT / "hubconf.py"]
    assert len(files) > 80
    found = [d for p in files for d in find_dangers(p.read_text(encoding="utf-8"), p.relative_to(ROOT).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "torch.hub.load_state_dict_from_url(url, check_hash=True)",
        "weights.get_state_dict(progress=True)",
        "np.load('x', allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.safe_load(text)",
        "eval('1')",
        "exec(text)",
        "subprocess.run(line, shell=True)",
        "from lxml import etree",
        "import xml.sax",
        "ElementTree.parse('x')",
        "archive.extractall('x')",
        "torch.jit.load('x')",
    ],
)
def test_the_scan_finds_what_it_looks_for(line):
    assert find_dangers(line, "nats_zoo/x.py")


def test_the_scan_lets_safe_calls_pass():
    safe = (
        "torch.load(p, weights_only=True); np.load(p); np.load(p, allow_pickle=False); model.eval(); Genotype.load(p)"
    )
    assert find_dangers(safe) == []


# --- no pickle, by trying ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["backbone", "detector"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.safetensors"])
def test_a_model_folder_that_holds_a_pickle_instead_of_weights(models, tmp_path, marker, kind, name):
    folder = copy_of(getattr(models, kind), tmp_path / "folder", leave_out="model.safetensors")
    pickled(folder / name, marker)
    load = nats_zoo.from_pretrained if kind == "backbone" else from_pretrained
    assert "model.safetensors" in refusal(load, folder)
    assert "model.safetensors" in refusal(lambda: find_network(str(folder)).create(str(folder), features_only=True))
    with pytest.raises((RuntimeError, ValueError, KeyError, SafetensorError)):  # timm's own way in
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("kind", ["backbone", "detector"])
def test_a_pickle_beside_the_weights_is_not_looked_at(models, tmp_path, marker, kind):
    folder = copy_of(getattr(models, kind), tmp_path / "folder")
    for name in ("pytorch_model.bin", "optimizer.pt", "model.pth"):
        pickled(folder / name, marker)
    (from_pretrained if kind == "detector" else nats_zoo.from_pretrained)(folder)
    if kind == "backbone":
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_given_checkpoint_is_not_unpickled(tmp_path, marker, legacy, capsys):
    path = pickled(tmp_path / "evil.pth", marker, legacy)
    assert main(["convert", str(path), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"nats: {path}: expected a checkpoint of tensors, found other objects in it\n"
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="weights_only"):  # timm's
        timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, checkpoint_path=str(path))
    renamed = path.rename(tmp_path / "evil.safetensors")
    assert "not a safetensors file" in refusal(create_detector, "fasterrcnn", "test_resnet", 2, weights=str(renamed))


def test_a_published_checkpoint_in_the_cache_is_not_unpickled(tmp_path, marker, monkeypatch, capsys):
    """torch looks at the hash of a file only while it downloads it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    pickled(tmp_path / "hub" / "checkpoints" / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", marker)
    assert main(["convert", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "--output", str(tmp_path / "out")]) == 2
    assert "FasterRCNN_ResNet50_FPN_Weights.COCO_V1: " in capsys.readouterr().err


def test_a_checkpoint_of_a_run_is_not_unpickled(tmp_path, marker):
    run = RunFolder(tmp_path / "run", {}, resume=False)
    run.begin()
    run.save_checkpoint(Checkpoint(4, {"model": {"w": torch.ones(2)}}, {}))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000004"
    pickled(checkpoint / "optimizer.pt", marker)
    pickled(checkpoint / "state.bin", marker)
    assert run.latest_checkpoint().tensors["model"]["w"].tolist() == [1, 1]
    pickled(checkpoint / "optimizer.safetensors", marker)
    with pytest.raises(RunError, match=r"damaged checkpoint: .*optimizer\.safetensors: not a safetensors file"):
        run.latest_checkpoint()


@pytest.mark.parametrize("load", [Genotype.load, find_space, read_json, read_yaml])
def test_a_text_file_that_is_a_pickle(tmp_path, marker, load):
    path = tmp_path / "g.json"
    path.write_bytes(pickle.dumps(Payload(marker)))
    assert str(path) in refusal(load, path)


# A checkpoint for nats convert may lie without any code, too.


def faster_rcnn_state() -> dict[str, torch.Tensor]:
    names = ("roi_heads.box_head.fc6.weight", "roi_heads.box_predictor.cls_score.weight")
    return {name: torch.zeros(4, 8) for name in names}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"roi_heads.box_predictor.cls_score.weight": torch.zeros(1).expand(10**9, 8)}, "dense tensors"),
        ({"roi_heads.box_head.fc6.weight": torch.zeros(3, 3).to_sparse()}, "dense tensors"),
        ({"roi_heads.box_head.fc6.weight": torch.tensor(1.0)}, "0 dimensions"),
        ({"roi_heads.box_predictor.cls_score.weight": torch.zeros(2**16 + 1, 1)}, "num_classes: expected at most"),
        ({3: torch.zeros(1)}, "found another kind under 3"),
        ({}, "is no fasterrcnn on resnet18"),
    ],
)
def test_a_checkpoint_that_asks_for_a_network_of_another_size(tmp_path, capsys, change, words):
    torch.save({**faster_rcnn_state(), **change}, tmp_path / "c.pth")
    assert main(["convert", str(tmp_path / "c.pth"), "--backbone", "resnet18", "--output", str(tmp_path / "o")]) == 2
    assert words in capsys.readouterr().err


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A data set's images, one of them behind a link, and a picture outside."""
    for name in ("set/images/a.png", "disk/b.png", "outside.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24)).save(path)
    (tmp_path / "set" / "images" / "linked").symlink_to(tmp_path / "disk")
    return tmp_path


def write_coco(root: Path, name: str) -> Path:
    image = {"id": 1, "file_name": name, "width": 32, "height": 24}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10]}
    path = root / "set" / "coco.json"
    path.write_text(
        json.dumps({"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]})
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "name",
    ["../../outside.png", "x/../../../outside.png", "{root}/outside.png", "../images_/a.png", "linked/../outside.png"],
)
def test_a_coco_file_name_does_not_leave_the_folder_of_the_images(pictures, name):
    path = write_coco(pictures, name.format(root=pictures))
    message = refusal(read_annotations, path, images=pictures / "set" / "images")
    assert "file_name: expected a file in the images' folder" in message


@pytest.mark.parametrize("name", ["a.png", "./a.png", "linked/b.png", "{root}/set/images/a.png"])
def test_a_coco_file_name_within_it_may_pass_links(pictures, name):
    path = write_coco(pictures, name.format(root=pictures))
    assert len(read_annotations(path, images=pictures / "set" / "images").images) == 1


def test_a_user_can_widen_the_folder_to_the_whole_disk(pictures):
    path = write_coco(pictures, str(pictures / "outside.png"))
    assert len(read_annotations(path, images="/").images) == 1


def test_voc_names_lose_their_folders(pictures):
    root = pictures / "set"
    (root / "Annotations").mkdir()
    size = "<size><width>32</width><height>24</height></size>"
    xml = f"<annotation><filename>../../outside.png</filename>{size}</annotation>"
    (root / "Annotations" / "a.xml").write_text(xml)
    (pictures / "secret.xml").write_text(xml)
    (root / "ImageSets").mkdir()
    (root / "ImageSets" / "train.txt").write_text("a\n../../secret\n/etc/passwd\n")
    raw = read_voc(root, "train")
    assert [image.file_name for image in raw.images] == ["a.png"]
    assert {defect.reason for defect in raw.defects} == {"missing annotation file"}


def test_yolo_reads_images_and_labels_where_its_yaml_says_and_no_other_files(pictures):
    """Absolute paths are how the format is used; what is read is an image by its suffix, and its label file."""
    (pictures / "disk" / "b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    data = pictures / "set" / "data.yaml"
    data.write_text(f"train: {pictures / 'disk'}\nnames: [cat]\n")
    assert [image.file_name for image in read_yolo(data, "train").images] == [str(pictures / "disk" / "b.png")]
    (pictures / "set" / "list.txt").write_text("/etc/passwd\n")
    data.write_text("train: list.txt\nnames: [cat]\n")
    assert "expected the path of an image, found '/etc/passwd'" in refusal(read_yolo, data, "train")


@pytest.mark.parametrize("name", ["a.png", "..png", "...png", "....png.png", "-rf.png", "a\\..\\b.png", " .png"])
def test_outputs_named_after_inputs_stay_in_the_output_folder(tmp_path, name):
    target = _name_outputs([Path("somewhere") / name], tmp_path / "out")[Path("somewhere") / name]
    assert target.parent == tmp_path / "out"
    assert target.name not in (".", "..")


@pytest.mark.parametrize("name", ["../../resnet18", "/etc/x", "resnet18/../x", ".hidden", "a\\b", "", "x" * 200, "a b"])
def test_an_architecture_after_which_files_are_named_is_no_path(name):
    with pytest.raises(GenotypeError, match="architecture: expected a timm model name, found"):
        Genotype(name, {})


def as_in_the_cache(folder: Path, root: Path) -> Path:
    """The folder as the Hub's client keeps it: links to files that are named after their content."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_the_links_of_the_hubs_cache_work(models, tmp_path):
    for kind, load in (("backbone", nats_zoo.from_pretrained), ("detector", from_pretrained)):
        snapshot = as_in_the_cache(getattr(models, kind), tmp_path / kind)
        load(snapshot)
        assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in model_files(snapshot)}


def test_a_link_out_of_a_folder_is_not_published(models, tmp_path):
    folder = copy_of(models.detector, tmp_path / "folder", leave_out="README.md")
    (tmp_path / "secret").write_text(TOKEN)
    (folder / "README.md").symlink_to(tmp_path / "secret")
    (folder / "photo.png").symlink_to(tmp_path / "secret")
    names = {path.name for path in model_files(folder)}
    assert {"config.json", "model.safetensors"} <= names
    assert not names & {"README.md", "photo.png"}
    genotype = save_genotype_folder(GENOTYPE, tmp_path / "genotype")
    (genotype / "README.md").unlink()
    (genotype / "README.md").symlink_to(tmp_path / "secret")
    (tmp_path / "scratch").mkdir()
    files = genotype_files(genotype, tmp_path / "scratch")
    assert TOKEN not in files["README.md"].read_text(encoding="utf-8")
    assert files["genotype.json"] == genotype / "genotype.json"


# --- configs ----------------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "weights from a file": ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path: is no argument of a network"),
    "weights from an address": (
        {"pretrained_cfg_overlay": {"url": "http://localhost:1/x.bin", "source": ""}},
        "pretrained_cfg_overlay: is no argument of a network",
    ),
    "a place to write": ({"cache_dir": "/elsewhere"}, "cache_dir: is no argument of a network"),
    "a device": ({"device": "cuda:7"}, "device: is no argument of a network"),
    "deep": ({"layers": [10**9, 1, 1, 1]}, f"layers: expected numbers of at most {MAX_NUMBER}"),
    "deeper than modules may be": ({"layers": [4096, 1, 1, 1]}, "asks for a network of over"),
    "wide": ({"stem_width": 4096, "stem_type": "deep"}, "config.json expects"),
    "many classes": ({"num_classes": 10**9}, f"num_classes: expected an integer from 0 to {MAX_CLASSES}"),
    "many values": ({"layers": [1] * 600}, "expected at most 512 values"),
    "nested": ({"block_args": {"a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}}}}, "nested too deeply"),
    "NaN": ({"drop_rate": float("nan")}, "drop_rate: expected numbers"),
    "long": ({"act_layer": "x" * 300}, "act_layer: expected at most 200 printable characters"),
    "no name": ({"a b": 1}, "expected names of a network's arguments, found 'a b'"),
    "unknown": ({"no_such_argument": 1}, "no network can be built as it says"),
    "a path as genotype": ({"genotype": "mine.json"}, "genotype"),
    "a repository as genotype": ({"genotype": "hf-hub:org/name"}, "genotype"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_what_a_backbones_config_can_not_ask_for(models, tmp_path, kind):
    arguments, words = BAD_ARGUMENTS[kind]
    folder = copy_of(models.backbone, tmp_path / "folder")
    edit_config(folder, lambda config: config["model_args"].update(arguments))
    message = refusal(nats_zoo.from_pretrained, folder)
    assert words in message
    assert "config.json" in message
    if words != "config.json expects":  # timm's own way in; what the weights have is not known there
        with pytest.raises((NatsError, TypeError)):  # timm itself refuses some of its factory's arguments
            timm.create_model(f"local-dir:{folder}")


def test_a_config_of_unbounded_size_that_timm_alone_is_given(models, tmp_path):
    """Loading past nats_zoo.from_pretrained, a nats architecture has limits too."""
    folder = copy_of(models.backbone, tmp_path / "folder")
    arguments = {"stem_width": 4096, "stem_type": "deep", "channels": [4096] * 4}
    edit_config(folder, lambda config: config["model_args"].update(arguments))
    assert "asks for a network of over 2,147,483,648 parameters" in refusal(timm.create_model, f"local-dir:{folder}")


@pytest.mark.parametrize("kind", ["weights from a file", "weights from an address", "a place to write", "deep"])
def test_a_plain_networks_config_can_not_ask_for_it_either(tmp_path, kind):
    arguments, words = BAD_ARGUMENTS[kind]
    tmp_path.joinpath("config.json").write_text(json.dumps({"architecture": "test_resnet", "model_args": arguments}))
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    assert words in refusal(find_network, str(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ([], "expected an object"),
        ({"num_classes": 10**9}, "num_classes: expected an integer"),
        ({"input_size": [10**9, 224, 224]}, r"input_size: expected \[channels, height, width\]"),
        ({"input_size": "x"}, "input_size"),
        ({"mean": [1e999]}, "mean: expected a list of numbers"),
        ({"classifier": {"a": 1}}, "classifier: expected a module's name"),
    ],
)
def test_what_a_pretrained_cfg_can_not_say(models, tmp_path, cfg, words):
    folder = copy_of(models.backbone, tmp_path / "folder")
    edit_config(folder, lambda config: config.update(pretrained_cfg=cfg))
    with pytest.raises(NatsError, match=words):
        nats_zoo.from_pretrained(folder)


def test_a_backbone_of_an_architecture_without_genotype(models, tmp_path):
    folder = copy_of(models.backbone, tmp_path / "folder")
    edit_config(folder, lambda config: config.update(architecture="test_resnet"))
    assert "'test_resnet' runs no genotype" in refusal(nats_zoo.from_pretrained, folder)


BAD_DETECTORS = {
    "num_classes": 10**9,
    "fpn_channels": 10**9,
    "head_size": 2**40,
    "roi_samples": 10**8,
    "mask_channels": 10**7,
    "min_size": 10**6,
    "max_size": 10**6,
    "detections": 10**12,
    "trainable_layers": 10**100,
    "anchor_sizes": [32, 64, 128, 256, 10**7],
    "image_std": [1.0, 0.0, 1.0],
    "image_mean": [float("nan"), 0.0, 0.0],
    "classes": ["cat\x1b[2J"],
    "category_ids": [1, 2, 3],
    "backbone": "x" * 1000,
    "norm": "y" * 1000,
    "score_thresh": 10**400,
}


@pytest.mark.parametrize("key", BAD_DETECTORS)
def test_what_a_detectors_config_can_not_ask_for(models, tmp_path, key):
    folder = copy_of(models.detector, tmp_path / "folder")
    edit_config(folder, lambda config: config.update({key: BAD_DETECTORS[key]}))
    message = refusal(from_pretrained, folder)
    assert f"config.json: {key}" in message.replace("image_mean, image_std", key)
    assert len(message) < 500 + len(str(folder))


def test_a_detector_larger_than_its_weights_is_refused_before_it_takes_memory(models, tmp_path):
    """Within every single limit it would take 20 GB."""
    folder = copy_of(models.detector, tmp_path / "folder")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edit_config(folder, lambda config: config.update(fpn_channels=4096, head_size=2**14, num_classes=2**16))
    assert "config.json expects" in refusal(from_pretrained, folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # kB


def test_the_count_of_a_networks_size_ends_with_its_block_and_is_of_its_thread():
    with pytest.raises(NatsError, match="over 10 parameters"), limited_size("x", most_elements=10):
        torch.nn.Linear(5, 5)
    torch.nn.Linear(5, 5)
    with pytest.raises(NatsError, match=f"over {MAX_MODULES:,} modules"), on_meta("x"):
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(MAX_MODULES + 1))
    with limited_size("x", most_elements=10):
        other = threading.Thread(target=lambda: built.append(torch.nn.Linear(5, 5)))
        built: list = []
        other.start()
        other.join()
    assert len(built) == 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_genotype_of_a_newer_format_says_what_to_do(tmp_path):
    newer = {**GENOTYPE.to_dict(), "format": 2, "something_new": {}}
    path = tmp_path / "g.json"
    path.write_text(json.dumps(newer))
    expected = f"is of a newer format (2), this nats-zoo {nats_zoo.__version__} reads up to 1: upgrade nats-zoo"
    assert refusal(Genotype.load, path) == f"{path}: {expected}"
    path.write_text(json.dumps({**newer, "format": 10**100}))
    assert len(refusal(Genotype.load, path)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 90 + "]" * 90, "nested too deeply, expected at most 80 levels"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ("9" * 5000, "digits"),
        (" " * (MAX_BYTES + 1), "too large"),
        ("\ufeff{", "not JSON"),
    ],
)
def test_json_within_limits(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    assert words in refusal(read_json, path)


def test_large_coco_files_are_read_whatever_their_size(tmp_path):
    image = {"id": 1, "file_name": "a.png", "width": 32, "height": 24, "a": "x" * MAX_BYTES}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert len(read_annotations(tmp_path / "c.json").images) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\nb: [*a, *a]\n", "an alias, *a; write it out"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", "an alias"),
        ("[" * 100, "nested too deeply, expected at most 16 levels"),
        ("a: 1\na: 2\n", "key 'a' appears twice"),
        ("a: 1" + ":59" * 500, "over 1000 characters without quotes"),
        ("- 1\n" * (MAX_YAML_VALUES + 1), f"over {MAX_YAML_VALUES} values"),
        ("x" * (2**20 + 1), "too large"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("? [a]\n: b\n", "unhashable"),
        ("2001-99-99", "month must be in 1..12"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
    ],
)
def test_yaml_within_limits(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    for read in (read_yaml, find_space):
        assert words in refusal(read, path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>', "a document type"),
        ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>', "a document type"),
        ("<a>" * 100, "64 within each other"),
        ("<annotation>" + "<a/>" * 400_001 + "</annotation>", "at most 400000 elements"),
    ],
)
def test_xml_within_limits(tmp_path, text, words):
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        parse_voc(path)


def safetensors_bytes(header: object, body: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(shape: list[int], offsets: tuple[int, int] = (0, 8), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


BAD_SAFETENSORS = {
    "empty": b"",
    "a length and no more": struct.pack("<Q", 2),
    "a header beyond the file": safetensors_bytes({}, length=2**40),
    "a header of the largest length": safetensors_bytes({}, length=2**64 - 1),
    "a huge header": safetensors_bytes(b"{" + b" " * (4 * 2**20) + b"}"),
    "no JSON": safetensors_bytes(b"{x}"),
    "a list": safetensors_bytes([]),
    "nested": safetensors_bytes(b'{"a":' * 50_000),
    "twice the same name": safetensors_bytes(b'{"a": {}, "a": {}}'),
    "overlapping": safetensors_bytes({"a": tensor([2]), "b": tensor([2])}),
    "a gap": safetensors_bytes({"a": tensor([2], (8, 16))}, b"\0" * 16),
    "beyond the file": safetensors_bytes({"a": tensor([4], (0, 16))}),
    "an overflowing shape": safetensors_bytes({"a": tensor([2**40, 2**40])}),
    "a negative shape": safetensors_bytes({"a": tensor([-2])}),
    "many dimensions": safetensors_bytes({"a": tensor([1] * 70 + [2])}),
    "a shape of another size": safetensors_bytes({"a": tensor([3])}),
    "an unknown type": safetensors_bytes({"a": tensor([2], dtype="object")}),
    "metadata that are no strings": safetensors_bytes({"__metadata__": {"a": 1}, "a": tensor([2])}),
    "trailing bytes": safetensors_bytes({"a": tensor([2])}, b"\0" * 9),
    "a name with a line break": safetensors_bytes({"a\nb": tensor([2])}),
    "a long name": safetensors_bytes({"a" * 1000: tensor([2])}),
}


@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_safetensors_within_limits(tmp_path, kind):
    path = tmp_path / "w.safetensors"
    path.write_bytes(BAD_SAFETENSORS[kind])
    for read in (weights_file.load_weights, weights_file.WeightsFile):
        message = refusal(read, path)
        assert str(path) in message
        assert len(message) < 500 + len(str(path))


def test_a_good_safetensors_file_passes(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_bytes({"a": tensor([2])}))
    assert weights_file.load_weights(path)["a"].tolist() == [0, 0]
    assert weights_file.WeightsFile(path).shapes == {"a": (2,)}
    assert load_file(path).keys() == {"a"}


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Bearer {TOKEN} is wrong", "Bearer hf_*** is wrong"),
        ("https://me:secret@huggingface.co/x", "https://***@huggingface.co/x"),
        (f"https://{TOKEN}@hub/x", "https://***@hub/x"),
        ("nats search --backbone nats_resnet50", "nats search --backbone nats_resnet50"),
        ("hf_hub_id and hf-hub:org/name@v1", "hf_hub_id and hf-hub:org/name@v1"),
    ],
)
def test_what_looks_like_a_secret_is_not_quoted(text, expected):
    assert redact(text) == expected


CLIENT = """
import logging, os, sys
logging.basicConfig(level=logging.DEBUG)
from nats_zoo.cli import main
folder, owner, other = sys.argv[1:]
os.environ["HF_TOKEN"] = owner
codes = [main(["publish", folder, "org/model"]), main(["publish", folder, "org/model", "--tag", "v1"])]
codes += [main(["publish", folder, "nobody/model"])]
codes += [main(["export", "org/model", "--output", "x.pt2", "--format", "torch", "--size", "64"])]
os.environ["HF_TOKEN"] = other
codes += [main(["publish", folder, "org/model"]), main(["show", "org/private"])]
codes += [main(["erf", f"https://{other}@hub/x"])]
os.environ["HF_TOKEN"] = other + "\\n\\u00e9"
codes += [main(["publish", folder, "org/model"])]
print("codes", codes)
"""


def test_a_token_is_neither_printed_nor_written(models, tmp_path):
    owner = OWNER_TOKEN
    with HubServer() as hub:
        environment = hub.client_environment(tmp_path / "home", token=None)
        work = tmp_path / "work"
        work.mkdir()
        command = [sys.executable, "-c", CLIENT, str(models.backbone), owner, TOKEN]
        environment |= {"HF_HUB_VERBOSITY": "debug", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            command, env=environment, cwd=work, capture_output=True, text=True, timeout=120, check=False
        )
    assert "codes [0, 0, 2, 0, 2, 2, 2, 2]" in done.stdout, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "x.pt2" for path in files)
    for secret in (owner, TOKEN):
        assert secret not in done.stdout + done.stderr
        for path in files:
            assert secret.encode() not in path.read_bytes(), path


def test_a_command_is_recorded_without_secrets(monkeypatch):
    from nats_zoo.cli.command import typed_command

    monkeypatch.setattr(sys, "argv", ["nats", "train", "--init", f"https://me:{TOKEN}@hub/org/name"])
    assert typed_command() == "nats train --init https://***@hub/org/name"


def test_an_error_of_the_client_is_quoted_without_secrets(caplog, capsys):
    from nats_zoo.hub.client import hub_errors

    caplog.set_level(logging.DEBUG)
    with pytest.raises(NatsError) as error, hub_errors("org/name", None):
        raise OSError(f"Illegal header value b'Bearer {TOKEN}'")
    assert TOKEN not in str(error.value)
    assert "Bearer hf_***" in str(error.value)


def test_security_md_states_the_limits_as_they_are():
    """A figure that changes in the code changes there too."""
    from nats_zoo.base import files
    from nats_zoo.detection.data.formats import voc
    from nats_zoo.detection.models import config as detector_config
    from nats_zoo.folders import limits as config_limits

    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    figures = [
        f"{files.MAX_BYTES // 2**20} MiB", f"{files.MAX_LEVELS} levels", f"{files.MAX_YAML_BYTES // 2**20} MiB",
        f"{files.MAX_YAML_LEVELS} levels", f"{files.MAX_YAML_VALUES:,} values",
        f"{weights_file.MAX_HEADER_BYTES // 2**20} MiB", f"{voc.MAX_BYTES // 2**20} MiB",
        f"{voc.MAX_ELEMENTS:,} elements", f"{voc.MAX_LEVELS} levels", f"{config_limits.MAX_NUMBER:,}",
        f"{config_limits.MAX_MODULES:,} modules", f"{config_limits.MAX_CLASSES:,} classes",
        f"{detector_config.MAX['num_classes']:,}", f"{detector_config.MAX['fpn_channels']:,}",
        f"{detector_config.MAX['min_size']:,} pixels",
    ]  # fmt: skip
    assert [figure for figure in figures if figure not in text] == []


def test_a_detector_config_within_the_limits_is_taken():
    config = DetectorConfig("fasterrcnn", "resnet50", 91, classes=tuple(f"class {n}" for n in range(1, 91)))
    with contextlib.suppress(NatsError):
        DetectorConfig("fasterrcnn", "resnet50", 91, classes=("cat",))
        pytest.fail("one name for ninety labels")
    assert DetectorConfig.from_dict(config.to_dict()) == config
