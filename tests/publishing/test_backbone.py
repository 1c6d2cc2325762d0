"""Backbones saved as folders, published to the loopback Hub and pulled by other processes."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import nats_zoo
from nats_zoo import Genotype, NatsError
from nats_zoo.folders import model_folder, weights_file
from tests.support.hub_server import OWNER_TOKEN, STRANGER_TOKEN, HubProcess, run_script

CHANNELS = (16, 24, 32, 48)  # a slim resnet18: 1 MB instead of 45


def random_genotype(seed: int) -> Genotype:
    """Three runs of random dilations in both convolutions of every block."""
    choose = random.Random(seed)
    convs = {}
    for stage, channels in enumerate(CHANNELS, 1):
        for name in (f"layer{stage}.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)):
            first = choose.randint(1, channels - 2)
            second = choose.randint(1, channels - first - 1)
            sizes = (first, second, channels - first - second)
            convs[name] = [[size, choose.randint(1, 3), choose.randint(1, 3)] for size in sizes]
    gains = {"layer2.0.conv2": [1.0, 0.5, 1.25]}
    return Genotype("resnet18", convs, gains, {"method": "random", "metrics": {"AP": 1.5}, "note": "a | b"})


def build(genotype: Genotype, seed: int = 0, **kwargs) -> torch.nn.Module:
    """A model with random weights and BN statistics: with timm's zero-initialised ones no 3x3 would matter."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "nats_resnet18", genotype=genotype, channels=CHANNELS, num_classes=7, zero_init_last=False, **kwargs
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
    return model.eval()


@torch.inference_mode()
def run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.eval()(x)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "backbone"
    return nats_zoo.save_backbone(build(random_genotype(1)), path, metrics={"AP": 41.5})


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved backbone with genotype 1, to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "backbone"))


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_one_dilation(config: dict) -> None:
    config["model_args"]["genotype"]["convs"]["layer3.1.conv2"][1][1] += 1


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_saved_backbone_computes_the_same_bit_for_bit(folder, image):
    expected = run(build(random_genotype(1)), image)
    assert torch.equal(run(nats_zoo.from_pretrained(folder), image), expected)
    assert torch.equal(run(timm.create_model(f"local-dir:{folder}", pretrained=True), image), expected)
    assert nats_zoo.from_pretrained(folder).genotype == random_genotype(1)


def test_one_other_dilation_in_the_config_changes_the_outputs_and_is_refused(folder, image):
    expected = run(build(random_genotype(1)), image)
    edit_config(folder, change_one_dilation)
    other = timm.create_model(f"local-dir:{folder}")
    other.load_state_dict(load_file(folder / "model.safetensors"))
    assert not torch.equal(run(other, image), expected)

    for load in (nats_zoo.from_pretrained, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True)):
        with pytest.raises(NatsError) as error:
            load(folder)
        message = one_line(error)
        assert str(folder / "model.safetensors") in message
        assert random_genotype(1).fingerprint() in message
        assert other.genotype.fingerprint() in message


def test_arguments_of_timm_adapt_a_loaded_backbone(folder, image):
    features = nats_zoo.from_pretrained(folder, features_only=True, out_indices=(1, 4))
    expected = build(random_genotype(1)).forward_intermediates(image, indices=(1, 4), intermediates_only=True)
    for found, map_ in zip(run(features, image), expected, strict=True):
        assert torch.equal(found, map_)
    assert run(nats_zoo.from_pretrained(folder, num_classes=3), image).shape == (1, 3)


def test_a_loaded_backbone_is_saved_again_as_it_was(folder, tmp_path, image):
    again = nats_zoo.save_backbone(nats_zoo.from_pretrained(folder), tmp_path / "again")
    assert torch.equal(run(nats_zoo.from_pretrained(again), image), run(nats_zoo.from_pretrained(folder), image))


def test_the_metadata_carries_the_fingerprint(folder):
    weights = weights_file.WeightsFile(folder / "model.safetensors")
    assert weights.metadata == {"genotype_sha256": random_genotype(1).fingerprint()}, "one key: equal files"
    weights.check_fingerprint(random_genotype(1))
    for other in (random_genotype(2), None):
        with pytest.raises(NatsError, match="another genotype"):
            weights.check_fingerprint(other)


def test_the_same_backbone_saved_twice_gives_equal_files(folder, tmp_path):
    for number in range(4):
        again = nats_zoo.save_backbone(nats_zoo.from_pretrained(folder), tmp_path / str(number))
        for name in ("model.safetensors", "config.json", "genotype.png"):
            assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_weights_of_an_earlier_version_with_several_metadata_load(folder, tmp_path, image):
    expected = run(nats_zoo.from_pretrained(folder), image)
    copy = shutil.copytree(folder, tmp_path / "earlier")
    path = copy / "model.safetensors"
    earlier = {"format": "pt", "nats_zoo": "0.1.0", "genotype_sha256": random_genotype(1).fingerprint()}
    save_file(load_file(path), path, earlier)
    assert torch.equal(run(nats_zoo.from_pretrained(copy), image), expected)


def test_weights_of_a_plain_network_are_marked_as_such(tmp_path):
    path = tmp_path / "model.safetensors"
    weights_file.save_weights({"weight": torch.ones(2, 3).t()}, path, None)
    weights_file.WeightsFile(path).check_fingerprint(None)
    assert torch.equal(load_file(path)["weight"], torch.ones(3, 2))
    with pytest.raises(NatsError, match="another genotype"):
        weights_file.WeightsFile(path).check_fingerprint(random_genotype(1))


def rewrite_weights(folder: Path, change, keep_metadata: bool = True) -> None:
    path = folder / "model.safetensors"
    metadata = weights_file.WeightsFile(path).metadata if keep_metadata else None
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"layer1.0.conv1.weight": torch.zeros(16, 16, 1, 1)}), "layer1.0.conv1.weight"),
        (lambda t: t.pop("layer4.1.bn2.weight"), "layer4.1.bn2.weight has the shape missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra has the shape (1,), config.json expects no such tensor"),
    ],
    ids=["shape", "missing", "extra"],
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"features_only": True, "out_indices": (1, 2, 3, 4)}], ids=["whole", "features"]
)
def test_weights_that_do_not_fit_name_the_tensor(folder, change, words, kwargs):
    rewrite_weights(folder, change)
    with pytest.raises(NatsError) as error:
        nats_zoo.from_pretrained(folder, **kwargs)
    message = one_line(error)
    assert words in message
    assert str(folder / "model.safetensors") in message


def test_weights_of_a_frozen_batch_norm_load(folder, image):
    rewrite_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "num_batches" in name])
    assert torch.equal(run(nats_zoo.from_pretrained(folder), image), run(build(random_genotype(1)), image))


BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "config of a plain model": (
        lambda f: edit_config(f, lambda c: c.pop("model_args")),
        "expected a backbone's genotype",
    ),
    "genotype is a path": (
        lambda f: edit_config(f, lambda c: c["model_args"].update(genotype="/etc/passwd")),
        "expected a backbone's genotype",
    ),
    "broken genotype": (
        lambda f: edit_config(f, lambda c: c["model_args"]["genotype"].update(format=9)),
        "config.json: model_args: genotype: is of a newer format (9)",
    ),
    "unknown architecture": (
        lambda f: edit_config(f, lambda c: c.update(architecture="nats_unheard_of")),
        "architecture 'nats_unheard_of' is unknown",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "weights are no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"),
        "not a safetensors file",
    ),
    "weights of somebody else": (
        lambda f: rewrite_weights(f, lambda tensors: None, keep_metadata=False),
        "has no genotype_sha256",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_is_no_backbone_is_neither_loaded_nor_published(folder, kind):
    spoil, words = BAD_FOLDERS[kind]
    spoil(folder)
    for use in (nats_zoo.from_pretrained, lambda f: nats_zoo.publish(f, "org/model", dry_run=True)):
        with pytest.raises(NatsError) as error:
            use(folder)
        assert words in one_line(error)


@pytest.mark.parametrize("source", ["no/such/folder", "nothing", "/no/such", "../x", "org/-x", "org/a--b", "x y"])
def test_what_can_be_no_repository_is_refused_without_network(source):
    with pytest.raises(NatsError, match="neither a folder nor the id of a Hub repository"):
        nats_zoo.from_pretrained(source)


def test_a_file_and_a_revision_of_a_folder_are_refused(folder):
    with pytest.raises(NatsError, match="is no folder"):
        nats_zoo.from_pretrained(folder / "config.json")
    with pytest.raises(NatsError, match="revision 'v1' is for repositories"):
        nats_zoo.from_pretrained(folder, revision="v1")


@pytest.mark.parametrize("model", [timm.create_model("resnet18", num_classes=0), torch.nn.Conv2d(1, 1, 1)])
def test_only_a_model_with_a_genotype_is_saved(model, tmp_path):
    with pytest.raises(NatsError, match="expected a nats_\\* model"):
        nats_zoo.save_backbone(model, tmp_path / "backbone")
    assert not list(tmp_path.iterdir())


def test_a_feature_extractor_is_not_saved(tmp_path):
    options = dict(architecture="regnetx_002", genotype=Genotype("regnetx_002", {}), features_only=True)
    with pytest.raises(NatsError, match="without features_only"):
        nats_zoo.save_backbone(timm.create_model("nats_any", **options), tmp_path / "backbone")
    assert not list(tmp_path.iterdir())


def test_a_model_that_its_config_would_not_rebuild_leaves_no_folder(tmp_path):
    for spoiled in (build(random_genotype(1)), build(random_genotype(1), norm_layer=torch.nn.BatchNorm2d)):
        if "norm_layer" not in spoiled._model_args:
            spoiled.layer1[0].conv1 = torch.nn.Conv2d(16, 16, 5, bias=False)
        with pytest.raises(NatsError, match=r"layer1\.0\.conv1\.weight|norm_layer"):
            nats_zoo.save_backbone(spoiled, tmp_path / "backbone")
    assert not list(tmp_path.iterdir())


def test_only_a_model_folder_is_replaced(folder, tmp_path):
    model = build(random_genotype(2))
    nats_zoo.save_backbone(model, folder)
    assert nats_zoo.from_pretrained(folder).genotype == random_genotype(2)

    (tmp_path / "empty").mkdir()
    nats_zoo.save_backbone(model, tmp_path / "empty")

    (folder / "notes.txt").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    for target in (folder, tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(NatsError, match="not replaced"):
            nats_zoo.save_backbone(model, target)
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "empty", "file", "thesis"]


def test_a_failed_write_leaves_what_was_there(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def write(new: Path) -> None:
        (new / "config.json").write_text("{}")
        raise KeyboardInterrupt

    for target in (folder, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            model_folder.write_folder_atomically(target, write)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_the_card_says_what_a_user_has_to_know(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    front_matter = card.split("---\n")[1]
    assert "library_name: timm\n" in front_matter
    assert "license: bsd-3-clause\n" in front_matter
    assert "base_model" not in front_matter
    for words in (
        "not ImageNet-accurate before",
        "import nats_zoo",
        "genotype.png",
        "1909.02293",
        "a \\| b",
        "| AP | 41.5",
    ):
        assert words in card
    assert str(random_genotype(1)) in card
    assert (folder / "genotype.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_the_card_names_the_base_model_and_an_unknown_licence(tmp_path):
    model = build(random_genotype(1), pretrained_cfg={"architecture": "nats_resnet18", "input_size": (3, 64, 64)})
    folder = nats_zoo.save_backbone(model, tmp_path / "backbone", base_model="timm/resnet18.tv_in1k")
    front_matter = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert "base_model: timm/resnet18.tv_in1k\n" in front_matter
    assert "license: unknown\n" in front_matter


def test_a_dry_run_lists_what_would_be_pushed(folder):
    (folder / "optimiser.pt").touch()
    listing = nats_zoo.publish(folder, "org/model", private=True, tag="v1", dry_run=True)
    first, *files, total, behind = listing.splitlines()
    assert first == "org/model (private), branch main, tag v1:"
    assert [line.split()[0] for line in files] == ["README.md", "config.json", "genotype.png", "model.safetensors"]
    sizes = [int(line.split()[1].replace(",", "")) for line in files]
    card = (folder / "README.md").read_text(encoding="utf-8").replace("ORG/NAME", "org/model").encode()
    assert sizes == [len(card), *((folder / line.split()[0]).stat().st_size for line in files[1:])]
    assert total.startswith(f"4 files, {sum(sizes):,} bytes")
    assert behind == "stays behind: optimiser.pt"
    with pytest.raises(NatsError, match="neither a folder nor the id"):
        nats_zoo.publish(folder, "no slash", dry_run=True)


def test_a_detector_folder_is_published_only_with_weights_of_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"framework": "fcos"}')
    with pytest.raises(NatsError, match="expected a model folder"):
        nats_zoo.publish(tmp_path, "org/detector", dry_run=True)
    weights_file.save_weights({"weight": torch.ones(1)}, tmp_path / "model.safetensors", None)
    assert "model.safetensors" in nats_zoo.publish(tmp_path, "org/detector", dry_run=True)


# --- the Hub ----------------------------------------------------------------------------------------------------------

PRELUDE = """
import json, sys
import nats_zoo
from nats_zoo import NatsError; from nats_zoo.hub import client as hub_client

def attempt(function, *args, **kwargs):
    try:
        return str(function(*args, **kwargs))
    except NatsError as error:
        return f"NatsError: {error}"
"""

PUBLISH = """
from huggingface_hub import HfApi

first, second, owner, stranger = sys.argv[1:]
found = dict(
    first=nats_zoo.publish(first, "org/model", token=owner, tag="v1"),
    second=nats_zoo.publish(second, "org/model", token=owner, revision="side", commit_message="Another genotype"),
    unchanged=nats_zoo.publish(first, "org/model", token=owner),
    private=nats_zoo.publish(first, "org/secret", private=True, token=owner),
    tag_again=attempt(nats_zoo.publish, second, "org/model", token=owner, tag="v1"),
    public_already=attempt(nats_zoo.publish, second, "org/model", token=owner, private=True),
    no_token=attempt(nats_zoo.publish, first, "org/model"),
    bad_token=attempt(nats_zoo.publish, first, "org/model", token="hf_stolen"),
    malformed_token=attempt(nats_zoo.publish, first, "org/model", token="hf_secret\\nhost: x"),
    stranger=attempt(nats_zoo.publish, second, "org/model", token=stranger),
)
api = HfApi(token=owner)
found["titles"] = {rev: [c.title for c in api.list_repo_commits("org/model", revision=rev)] for rev in ("main", "side")}
found["files"] = sorted(api.list_repo_files("org/model"))
print(json.dumps(found))
"""

PULL = """
import os, re
import timm, torch
from safetensors.torch import load_file, save_file

image = load_file(sys.argv[1])["image"]

def run(model):
    with torch.inference_mode():
        return model.eval()(image)

readme = (hub_client.resolve_folder("org/model") / "README.md").read_text(encoding="utf-8")
pasted = {}
exec(re.search("```python\\n(.*?)```", readme, re.DOTALL)[1], pasted)
outputs = dict(
    timm=run(timm.create_model("hf-hub:org/model", pretrained=True)),
    timm_pinned=run(timm.create_model("hf-hub:org/model@side", pretrained=True)),
    ours=run(nats_zoo.from_pretrained("org/model")),
    tag=run(nats_zoo.from_pretrained("org/model", revision="v1")),
    branch=run(nats_zoo.from_pretrained("org/model", revision="side")),
    card=run(pasted["model"]),
)
save_file(outputs, sys.argv[2])
found = dict(
    features=len(run(pasted["backbone"])),
    missing=attempt(nats_zoo.from_pretrained, "org/nothing"),
    private=attempt(nats_zoo.from_pretrained, "org/secret"),
    revision=attempt(nats_zoo.from_pretrained, "org/model", revision="v9"),
    files=sorted(path.name for path in hub_client.resolve_folder("org/model").iterdir()),
)
os.environ["HF_TOKEN"] = "hf_secret\\nhost: x"
found["malformed_token"] = attempt(nats_zoo.from_pretrained, "org/secret")
os.environ["HF_TOKEN"] = sys.argv[3]
found["private_with_token"] = sorted(path.name for path in hub_client.resolve_folder("org/secret").iterdir())
print(json.dumps(found))
"""

OFFLINE = """
import torch
from safetensors.torch import load_file, save_file

image = load_file(sys.argv[1])["image"]
with torch.inference_mode():
    outputs = {name: nats_zoo.from_pretrained("org/model", revision=name).eval()(image) for name in ("main", "v1")}
save_file(outputs, sys.argv[2])
print(json.dumps(dict(
    uncached=attempt(nats_zoo.from_pretrained, "org/other"),
    publish=attempt(nats_zoo.publish, hub_client.resolve_folder("org/model"), "org/model", token="hf_owner"),
)))
"""


def run_client(script: str, environment: dict[str, str], *arguments: str | Path) -> dict:
    return json.loads(run_script(PRELUDE + script, environment, *arguments).stdout)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub to which a process published the backbones with the genotypes 1 (main, v1) and 2 (side)."""
    tmp_path = tmp_path_factory.mktemp("hub")
    with HubProcess(tmp_path / "root") as server:
        folders = [nats_zoo.save_backbone(build(random_genotype(seed)), tmp_path / f"{seed}") for seed in (1, 2)]
        environment = server.client_environment(tmp_path / "publisher", token=None)
        found = run_client(PUBLISH, environment, *folders, OWNER_TOKEN, STRANGER_TOKEN)
        yield SimpleNamespace(server=server, path=tmp_path, found=found)


@pytest.fixture(scope="module")
def pulled(published, image):
    """What another process with an empty cache pulled from there, without a token but at its end."""
    path = published.path
    save_file({"image": image}, path / "image.safetensors")
    environment = published.server.client_environment(path / "reader", token=None)
    found = run_client(PULL, environment, path / "image.safetensors", path / "outputs.safetensors", OWNER_TOKEN)
    return SimpleNamespace(environment=environment, found=found, outputs=load_file(path / "outputs.safetensors"))


def test_a_published_backbone_computes_the_same_in_another_process(pulled, image):
    on_main = run(build(random_genotype(1)), image)
    on_side = run(build(random_genotype(2)), image)
    assert not torch.equal(on_main, on_side)
    for name in ("timm", "ours", "tag", "card"):
        assert torch.equal(pulled.outputs[name], on_main), name
    for name in ("timm_pinned", "branch"):
        assert torch.equal(pulled.outputs[name], on_side), name
    assert pulled.found["features"] == 4
    assert pulled.found["files"] == ["README.md", "config.json", "genotype.png", "model.safetensors"]
    assert pulled.found["private_with_token"] == pulled.found["files"]


def test_a_folder_is_published_as_one_commit(published):
    found = published.found
    upload = f"Upload with nats-zoo {nats_zoo.__version__}"
    assert found["titles"] == {
        "main": [upload, "initial commit"],
        "side": ["Another genotype", upload, "initial commit"],
    }
    assert found["files"] == [".gitattributes", "README.md", "config.json", "genotype.png", "model.safetensors"]
    assert found["first"].startswith(f"{published.server.url}/org/model/commit/")
    assert found["unchanged"] == f"nothing changed, {found['first']}"
    assert "/org/secret/commit/" in found["private"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tag_again", "org/model: has a tag 'v1' already"),
        ("public_already", "org/model: is a public repository already"),
        ("no_token", "org/model: no Hugging Face token, run `hf auth login` or set HF_TOKEN"),
        ("bad_token", "org/model: not published: the token is not valid: run `hf auth login`"),
        ("stranger", "org/model: not published: the token has no right to do this"),
        ("malformed_token", "the Hugging Face token has characters that no token has: run `hf auth login`"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(published, case, words):
    message = published.found[case]
    assert message.startswith(f"NatsError: {words}")
    assert "\n" not in message
    for secret in ("hf_stolen", "hf_secret", STRANGER_TOKEN):
        assert secret not in message


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "org/nothing: no such folder, and from the Hub: no such repository, or it is private"),
        ("private", "org/secret: no such folder, and from the Hub: no such repository, or it is private"),
        ("revision", "org/model: no such folder, and from the Hub: the repository has no revision 'v9'"),
        ("malformed_token", "the Hugging Face token has characters that no token has: run `hf auth login`"),
    ],
)
def test_what_can_not_be_pulled_is_one_line(pulled, case, words):
    message = pulled.found[case]
    assert message.startswith(f"NatsError: {words}")
    assert "\n" not in message
    assert "hf_secret" not in message


def test_a_pulled_backbone_loads_when_the_hub_is_gone(published, pulled, image, tmp_path):
    published.server.stop()
    paths = (published.path / "image.safetensors", tmp_path / "outputs.safetensors")
    found = run_client(OFFLINE, pulled.environment, *paths)
    for output in load_file(paths[1]).values():
        assert torch.equal(output, run(build(random_genotype(1)), image))
    assert found["uncached"].startswith(
        "NatsError: org/other: no such folder, and from the Hub: the Hub can not be reached"
    )
    assert found["uncached"].endswith("and it is not in the cache")
    assert found["publish"].startswith("NatsError: org/model: not published: the Hub can not be reached")
