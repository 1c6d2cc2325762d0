"""hubconf.py as torch.hub runs it: processes that can not see an installed nats_zoo load a checkout or a zip of one."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch

from nats_zoo import NatsError, __version__
from nats_zoo.detection import create_detector
from nats_zoo.detection.models.config import FRAMEWORKS
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.genotype.catalogue import DEFAULT_GENOTYPES
from tests.support.paths import ROOT

SITE_PACKAGES = Path(torch.__file__).parents[1]
GENOTYPE = {"format": 1, "architecture": "resnet18", "convs": {"layer2.0.conv2": [[100, 1, 1], [28, 3, 1]]}}
TINY = {"fpn_channels": 32, "head_size": 8, "mask_channels": 8, "roi_samples": 8, "min_size": 64, "max_size": 64}

LOAD = """
import json, sys
from pathlib import Path
import search
import torch

checkout, genotype, tiny = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
load = lambda *args, **kwargs: torch.hub.load(checkout, *args, source="local", **kwargs)
decoy = search
model = load("nats_resnet18", genotype=genotype, num_classes=3)
features = load("nats_resnet18", genotype=genotype, features_only=True, out_indices=(1, 4))
leaked = "detection" in sys.modules or "nats_zoo.detection" in sys.modules
detector = load("retinanet", "nats_resnet18", 3, genotype=genotype, **tiny).eval()

import nats_zoo, nats_zoo.detection, nats_zoo.search
import detection
nats_zoo.detection.save_detector(detector, "saved")
again = load("pretrained_detector", "saved")
nats_zoo.save_backbone(model, "backbone")
body = load("pretrained_backbone", "backbone", features_only=True, out_indices=(1,))
own = load("fcos", "nats_resnet18", 3, genotype=genotype, weights="backbone", **tiny)
images = [torch.rand(3, 64, 64)]
print(json.dumps(dict(
    outputs=list(model.eval()(torch.zeros(1, 3, 32, 32)).shape),
    maps=len(features(torch.zeros(1, 3, 64, 64))),
    body=torch.equal(body.state_dict()["conv1.weight"], model.conv1.weight),
    own=torch.equal(own.backbone.body.conv1.weight, model.conv1.weight),
    genotypes=[model.genotype.to_dict(), detector.config.genotype, again.config.genotype],
    same=torch.equal(detector(images)[0]["scores"], again(images)[0]["scores"]),
    training=again.training,
    packages={m.__name__: str(Path(m.__file__).parent) for m in (nats_zoo, nats_zoo.detection, nats_zoo.search)},
    decoys=[search.NAME, detection.NAME, search is decoy],
    leaked=leaked,
    leaked_path=checkout in sys.path,
    finders=[type(finder).__name__ for finder in sys.meta_path].count("_CheckoutFinder"),
)))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkout")
    for name in ("nats_zoo", "detection", "search"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("hubconf.py", "pyproject.toml"):
        shutil.copy(ROOT / name, path)
    return path


@pytest.fixture(scope="module")
def decoys(tmp_path_factory) -> Path:
    """Packages of a user's own, with the names of two of our folders."""
    path = tmp_path_factory.mktemp("decoys")
    for name in ("search", "detection"):
        (path / name).mkdir()
        (path / name / "__init__.py").write_text(f"NAME = 'decoy {name}'\n")
    return path


def run_python(
    script: str, *arguments: str | Path, path: list[Path], cwd: Path, site: Path = SITE_PACKAGES, **variables: str
) -> subprocess.CompletedProcess:
    """Run a script in a Python that sees `path` and then the packages in `site`, but no editable install."""
    # -S leaves out site-packages and with it the *.pth files, by which an editable install is found.
    command = [sys.executable, "-S", "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, site]))} | variables
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def packages_without(folder: Path, *names: str) -> Path:
    """A folder that has the installed packages but these (and nats_zoo)."""
    left_out = re.compile(rf"({'|'.join((*names, 'nats_zoo'))})(-.*|\.py)?", re.IGNORECASE)
    folder.mkdir()
    for entry in SITE_PACKAGES.iterdir():
        if not left_out.fullmatch(entry.name):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_a_bare_checkout_loads_beside_packages_of_the_same_names(checkout, decoys, tmp_path):
    arguments = (checkout, json.dumps(GENOTYPE), json.dumps(TINY))
    result = run_python(LOAD, *arguments, path=[decoys], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["outputs"] == [1, 3]
    assert found["maps"] == 2
    assert found["body"]
    assert found["own"]
    assert found["genotypes"] == [GENOTYPE] * 3
    assert found["same"]
    assert not found["training"]
    assert found["packages"] == {
        "nats_zoo": str(checkout / "nats_zoo"),
        "nats_zoo.detection": str(checkout / "detection"),
        "nats_zoo.search": str(checkout / "search"),
    }
    assert found["decoys"] == ["decoy search", "decoy detection", True]
    assert not found["leaked"]
    assert not found["leaked_path"]
    assert found["finders"] == 1


@pytest.fixture
def archive(checkout, tmp_path):
    """The URL of a zip as GitHub makes it, the checkout in a folder named by its commit, on a server of its own."""
    served, folder = tmp_path / "served", "org-nats-zoo-1a2b3c4"
    shutil.copytree(checkout, served / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.make_archive(str(served / "main"), "zip", served, folder)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(arguments[1])

    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/main.zip", requests
    server.shutdown()
    server.server_close()


def test_a_zip_of_the_repository_is_downloaded_once(archive, tmp_path):
    """torch.hub downloads, unpacks and caches it; of torch.hub only the address of GitHub is replaced."""
    url, requests = archive
    script = """
import json, sys
import torch

url, genotype = sys.argv[1], json.loads(sys.argv[2])
torch.hub._git_archive_link = lambda owner, name, ref: url
repo, options = "org/nats-zoo:main", dict(trust_repo=True, skip_validation=True)
names = torch.hub.list(repo, **options)
text = torch.hub.help(repo, "fasterrcnn", **options)
imported = "nats_zoo" in sys.modules
model = torch.hub.load(repo, "nats_any", "resnet18", genotype, num_classes=2, **options)
detector = torch.hub.load(repo, "fcos", "resnet18", **options)
import nats_zoo
print(json.dumps(dict(names=names, help=text, imported=imported, genotype=model.genotype.to_dict(),
                      classes=detector.config.num_classes, plain=detector.config.genotype, file=nats_zoo.__file__)))
"""
    home = tmp_path / "home"
    result = run_python(script, url, json.dumps(GENOTYPE), path=[], cwd=tmp_path, TORCH_HOME=str(home))
    assert result.returncode == 0, result.stderr
    assert len(requests) == 1
    found = json.loads(result.stdout.splitlines()[-1])  # torch.hub says above that it downloads
    assert {"nats_resnet50", "nats_any", "fasterrcnn", "pretrained_detector"} <= set(found["names"])
    assert found["help"].startswith("Faster R-CNN with FPN on a timm backbone.\n\nArgs:\n    backbone: ")
    assert not found["imported"]
    assert found["genotype"] == GENOTYPE
    assert (found["classes"], found["plain"]) == (91, None)
    assert found["file"] == str(home / "hub/org_nats-zoo_main/nats_zoo/__init__.py")


def test_missing_and_old_packages_are_named_with_the_command_that_installs_them(checkout, tmp_path):
    site = packages_without(tmp_path / "site", "timm", "pycocotools", "accelerate")
    (site / "accelerate").symlink_to(SITE_PACKAGES / "accelerate")
    (site / "accelerate-0.34.2.dist-info").mkdir()
    (site / "accelerate-0.34.2.dist-info" / "METADATA").write_text("Name: accelerate\nVersion: 0.34.2\n")
    script = """
import sys
import torch
for name in ("nats_resnet18", "fcos"):
    try:
        torch.hub.load(sys.argv[1], name, source="local")
    except ImportError as error:
        print(error)
"""
    result = run_python(script, checkout, path=[], cwd=tmp_path, site=site)
    assert result.returncode == 0, result.stderr
    bounds = dict(re.findall(r'"(timm|pycocotools|accelerate)>=(.*)"', (ROOT / "pyproject.toml").read_text()))
    timm_line, all_line = result.stdout.splitlines()[-2:]
    assert timm_line == f'nats-zoo lacks packages: timm is not installed; pip install "timm>={bounds["timm"]}"'
    assert all_line == (
        "nats-zoo lacks packages: timm is not installed, pycocotools is not installed, accelerate is 0.34.2; "
        + "pip install "
        + " ".join(f'"{name}>={bounds[name]}"' for name in ("timm", "pycocotools", "accelerate"))
    )


def test_a_package_imported_before_is_used_whole_and_another_version_is_reported(checkout, tmp_path):
    """Its detection and search must not come from the checkout; a backbone needs no package of the detectors'."""
    installed = tmp_path / "installed"
    shutil.copytree(checkout / "nats_zoo", installed / "nats_zoo")
    for name in ("detection", "search"):
        shutil.copytree(checkout / name, installed / "nats_zoo" / name)
    site = packages_without(tmp_path / "site", "pycocotools", "accelerate", "matplotlib", "jsonargparse")
    script = """
import importlib.util, json, sys, warnings
import nats_zoo, torch
warnings.simplefilter("always")
for version in (nats_zoo.__version__, "0.0.1"):
    nats_zoo.__version__ = version
    with warnings.catch_warnings(record=True) as caught:
        torch.hub.load(sys.argv[1], "nats_resnet18", source="local", genotype=json.loads(sys.argv[2]))
    print(*(f"{w.filename}: {w.message}" for w in caught if "nats" in str(w.message)))
for name in ("detection", "search"):
    print(importlib.util.find_spec(f"nats_zoo.{name}").origin)
"""
    result = run_python(script, checkout, json.dumps(GENOTYPE), path=[installed], cwd=tmp_path, site=site)
    assert result.returncode == 0, result.stderr
    same, other, *packages = result.stdout.splitlines()
    assert same == ""
    assert other == (
        f"<string>: nats-zoo 0.0.1 was imported before, from {installed / 'nats_zoo'}, and is used instead of "
        f"{__version__}, which torch.hub has in {checkout}. For that one, load from torch.hub first, in a new process."
    )
    assert packages == [str(installed / f"nats_zoo/{name}/__init__.py") for name in ("detection", "search")]


@pytest.fixture(scope="module")
def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def entries(hubconf):
    """What torch.hub.list offers: everything callable without an underscore."""
    return {name: entry for name, entry in vars(hubconf).items() if callable(entry) and not name.startswith("_")}


def test_the_entry_points_are_the_variants_the_frameworks_and_the_trained_models(entries):
    trained = {"pretrained_backbone", "pretrained_detector"}
    assert set(entries) == {*timm.list_models("nats_*"), *FRAMEWORKS, *trained}
    assert all(entry.__name__ == name for name, entry in entries.items())


def test_the_help_explains_each_argument_and_shows_an_example(entries):
    for name, entry in entries.items():
        text = entry.__doc__
        assert text.splitlines()[1:3] == ["", "Args:"]
        assert max(map(len, text.splitlines())) <= 120
        for parameter in inspect.signature(entry).parameters.values():
            assert f"\n    {str(parameter).partition(':')[0]}: " in text, (name, parameter)
        assert "\nReturns:\n" in text
        assert re.search(rf'\nExample:\n.*torch.hub.load\("org/nats-zoo", "{name}"', text)


def test_versions_are_compared_by_their_numbers(hubconf):
    for version, numbers in {"2.6.0+cu124": (2, 6), "2.10": (2, 10), "1.0.31.dev0": (1, 0, 31)}.items():
        assert hubconf._numbers(version) == numbers


@pytest.mark.parametrize("architecture", DEFAULT_GENOTYPES)
def test_the_help_of_an_entry_point_says_where_its_genotype_comes_from(architecture, entries):
    """Titles are the architecture's name, written out."""
    text = entries[f"nats_{architecture}"].__doc__
    assert re.sub(r"\W", "", text.splitlines()[0]).lower().startswith(architecture.replace("_", ""))
    provenance = find_genotype(DEFAULT_GENOTYPES[architecture]).provenance
    words = " ".join(text.split())
    if provenance["method"] == "transfer":
        source = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}[provenance["source_architecture"]]
        assert f"transferred from that of {source}, not searched" in words
    else:
        assert "which was searched" in words


def test_an_entry_point_builds_its_variant(entries):
    with torch.device("meta"):
        for architecture in ("resnext50_32x4d", "resnet50d"):
            model = entries[f"nats_{architecture}"](num_classes=3)
            assert model.genotype == find_genotype(DEFAULT_GENOTYPES[architecture])
            assert model.num_classes == 3


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_entry_point_builds_its_detector(framework, entries):
    model = entries[framework]("nats_resnet18", 4, genotype=GENOTYPE, **TINY)
    expected = create_detector(framework, "nats_resnet18", 4, GENOTYPE, None, **TINY)
    assert model.config == expected.config
    assert str(model) == str(expected)


def test_a_detectors_weights_are_timms_or_ones_own(entries, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NatsError, match=r"^weights: timm/resnet18.tv_in1k: "):
        entries["fcos"]("nats_resnet18", pretrained=True)
    with pytest.raises(NatsError, match=r"^fcos: expected pretrained=True or weights=, found both$"):
        entries["fcos"]("nats_resnet18", pretrained=True, weights="mine")
