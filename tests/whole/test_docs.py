"""The documents: every code block runs (or is parsed, where it says why it is not run), every link leads somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from nats_zoo import published_genotypes
from nats_zoo.detection.data.drawn import draw_dataset
from nats_zoo.genotype.catalogue import GENOTYPE_DIR
from tests.support.hub_server import HubProcess
from tests.support.paths import ROOT
from tests.support.snippets import LANGUAGES, read_blocks, run_page

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
names = [str(page.relative_to(ROOT)) for page in PAGES]

# What the pages take for granted: timm's weights (random ones here), a genotype and models under the name org/...
PUBLISH = """
import timm, nats_zoo
from nats_zoo.publishing.genotype import save_genotype_folder
from timm.models import push_to_hf_hub

for name in ("resnet18", "resnet50"):
    model = timm.create_model(f"{name}.tv_in1k")
    push_to_hf_hub(model, f"timm/{name}.tv_in1k", safe_serialization=True)
save_genotype_folder(nats_zoo.Genotype.load("mine.json"), "genotype")
nats_zoo.publish("genotype", "org/genotype")
nats_zoo.save_backbone(timm.create_model("nats_resnet18", num_classes=0), "backbone")
nats_zoo.publish("backbone", "org/nats-resnet18")
detector = nats_zoo.detection.create_detector(
    "fasterrcnn", "nats_resnet18", num_classes=4, weights=None, fpn_channels=16, head_size=16, min_size=64, max_size=96
)
nats_zoo.detection.save_detector(detector, "detector")
nats_zoo.publish("detector", "org/fasterrcnn-nats-resnet18", tag="v1")
"""


def prepare(folder: Path) -> None:
    """The files that the pages name: a small data set, photos, a video, a genotype."""
    draw_dataset(folder / "my_data", train=4, val=2, test=2, size=96)
    for name in ("photos/one.jpg", "photos/deep/two.jpg", "more/deep/three.jpg", "image.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)).save(folder / name)
    with av.open(str(folder / "clip.mp4"), "w") as video:
        stream = video.add_stream("libx264", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        for shade in (50, 200):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((80, 96, 3), shade, np.uint8))))
        video.mux(stream.encode())
    (folder / "mine.json").write_bytes((GENOTYPE_DIR / "resnet50_c_n16_bccd.json").read_bytes())
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name in ("my_recipe.yaml", "my_search.yaml"):
        (folder / name).write_text("data: my_data\nbackbone: resnet18.tv_in1k\n")


def checkout_in_torch_hub(home: Path) -> None:
    """What torch.hub has after a download of org/nats-zoo: it looks there when GitHub does not answer."""
    for branch in ("main", "master"):
        folder = home / "hub" / f"org_nats-zoo_{branch}"
        folder.mkdir(parents=True)
        for name in ("nats_zoo", "detection", "search", "hubconf.py"):
            (folder / name).symlink_to(ROOT / name)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with what the pages pull from it, and the environment of its clients."""
    root, work = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("publisher")
    prepare(work)
    with HubProcess(root) as server:
        environment = server.client_environment(work / "home")
        subprocess.run([sys.executable, "-c", PUBLISH], env=environment, cwd=work, check=True)
        yield server


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_the_code_blocks_run(page, hub, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    prepare(work)
    checkout_in_torch_hub(tmp_path / "torch")
    nowhere = "http://127.0.0.1:9"  # all but the loopback Hub is out of reach
    environment = hub.client_environment(tmp_path / "home") | {
        "TORCH_HOME": str(tmp_path / "torch"), "HTTPS_PROXY": nowhere, "https_proxy": nowhere,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "support" / "snippets.py"), str(page), "--checkout", str(ROOT)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


WRONG = {
    "value": "```python\nsum([1, 2])  # 4\n```\n",
    "exception": "```python\nimport nothing_of_this_name\n```\n",
    "option": "<!-- not run: a test -->\n```bash\nnats train --data x --output y --no_such_option 1\n```\n",
    "command": "```bash\nnats show no_such_genotype\n```\n",
    "foreign command": "```bash\nmake test\n```\n",
    "benchmark's option": "<!-- not run: a test -->\n```bash\npython benchmarks/latency.py --no-such-option\n```\n",
    "no end": "```bash\nnats list\n",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_page_whose_code_is_wrong_fails(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises((Exception, SystemExit)):
        run_page(tmp_path / "page.md", ROOT)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_blocks_say_what_they_are(page):
    for block in read_blocks(page):
        assert block.language in LANGUAGES, f"{page}, line {block.line}"
        if block.language == "json":
            json.loads(block.code)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_lists_the_zoo():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in published_genotypes():
        variant = name.partition("_transfer")[0].partition("_c_n")[0]
        assert f"`nats_{variant}`" in text, name
