"""Models and genotypes pulled from the loopback Hub, a process of its own, by other processes; and what may go wrong.

The client reads its settings when it is imported, so everything it does happens in processes; many cases share one.
"""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nats_zoo import Genotype, NatsError, save_backbone
from nats_zoo.detection import create_detector, save_detector
from nats_zoo.hub.client import split_revision
from tests.support.hub_server import STRANGER_TOKEN, HubProcess, Store

GENOTYPE = Genotype("test_resnet", {"layer2.0.conv2": [(16, 1, 1), (32, 1, 3)]}, provenance={"method": "by hand"})
TINY = {"fpn_channels": 16, "head_size": 16, "min_size": 64, "max_size": 96, "anchor_sizes": (8, 16, 32, 64, 128)}
XORBS = "/xet/xorbs/"
WEIGHTS = r"/(resolve|resolve-cache)/.*\.safetensors"
INFO = "^/api/models/org/detector"
CHUNK = 10 * 2**20  # bytes that the client keeps at once: what is cut off behind a multiple of it comes again
LARGE = random.Random(0).randbytes(2 * CHUNK + 3_000_000)

PRELUDE = """
import contextlib, io, json, os, re, signal, sys, time, urllib.request
from email.utils import formatdate
from pathlib import Path

from nats_zoo import NatsError
from nats_zoo.hub.client import resolve_folder

HUB = os.environ["HF_ENDPOINT"]

def control(**request):
    with urllib.request.urlopen(HUB + "/_control", json.dumps(request).encode()) as answer:
        return json.load(answer)

def attempt(call, *arguments, faults=(), behaviour={}, **options):
    control(faults=list(faults), behaviour=behaviour, forget=True)
    said, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said):
        try:
            result = str(call(*arguments, **options))
        except NatsError as error:
            result = f"NatsError: {error}"
    taken = time.monotonic() - began
    asked = control(faults=[], behaviour={"error_codes": True, "redirects": None, "gated": {}}, forget=True)
    return {"result": result, "said": said.getvalue(), "asked": asked, "seconds": taken}
"""


def add_repo(store: Store, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
    """A repository with these files; safetensors and PNG files are in LFS."""
    repo = store.create_repo(repo_id, private)
    entries = dict(repo.commits[repo.branches["main"]].files)
    for name, content in files.items():
        in_lfs = name.endswith((".safetensors", ".png"))
        entries[name] = store.lfs_file(store.write(content)) if in_lfs else store.add_file(content)
    repo.add_commit("main", "add", "", entries)
    repo.tags["v1"] = repo.branches["main"]
    store.save(repo)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """`hub`, the files of a Hub with a detector, a backbone, a genotype and others' repositories; and the folders."""
    path = tmp_path_factory.mktemp("pull")
    torch.manual_seed(0)
    detector = create_detector("fasterrcnn", "test_resnet", 3, GENOTYPE, weights=None, classes=("a", "b"), **TINY)
    save_detector(detector, path / "detector")
    import timm

    backbone = timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, num_classes=2)
    save_backbone(backbone, path / "backbone")
    GENOTYPE.save(path / "genotype.json")
    store = Store(path / "hub")
    add_repo(store, "org/detector", contents(path / "detector"))
    add_repo(store, "org/backbone", contents(path / "backbone"))
    add_repo(store, "org/genotype", {"genotype.json": (path / "genotype.json").read_bytes(), "README.md": b"# A\n"})
    add_repo(store, "org/private", contents(path / "detector"), private=True)
    plain = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(plain, path / "plain", safe_serialization=True)
    add_repo(store, "org/plain", contents(path / "plain"))
    add_repo(store, "org/text", {"README.md": b"# Not a model\n"})
    add_repo(store, "org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"})
    newer = json.loads((path / "detector" / "config.json").read_text()) | {"format": 2, "unheard_of": 1}
    add_repo(store, "org/newer", {**contents(path / "detector"), "config.json": json.dumps(newer).encode()})
    other = json.loads((path / "detector" / "config.json").read_text())
    other["genotype"]["convs"]["layer2.0.conv2"][1][2] = 2
    add_repo(store, "org/other", {**contents(path / "detector"), "config.json": json.dumps(other).encode()})
    sneaky = json.loads((path / "backbone" / "config.json").read_text())
    sneaky["model_args"]["genotype"] = "hf-hub:org/genotype"
    add_repo(store, "org/sneaky", {**contents(path / "backbone"), "config.json": json.dumps(sneaky).encode()})
    swapped = json.loads((path / "backbone" / "config.json").read_text())
    swapped["model_args"]["genotype"]["convs"]["layer2.0.conv2"][1][2] = 2
    shutil.copytree(path / "backbone", path / "swapped")
    (path / "swapped" / "config.json").write_text(json.dumps(swapped))
    add_repo(store, "org/swapped", contents(path / "swapped"))
    timm.models.save_for_hf(backbone, path / "by_timm", safe_serialization=True)
    add_repo(store, "org/by_timm", contents(path / "by_timm"))
    pickled = {"config.json": (path / "backbone" / "config.json").read_bytes(), "pytorch_model.bin": b"\x80\x04"}
    add_repo(store, "org/pickled", pickled)
    add_repo(store, "org/large", {"config.json": b"{}", "model.safetensors": LARGE})
    page = b"<!doctype html><title>Log in</title>" + bytes(range(1, 100))
    add_repo(store, "org/page", {**contents(path / "detector"), "model.safetensors": page})
    return path


@pytest.fixture(scope="module")
def hub(home):
    with HubProcess(home / "hub") as server:
        yield server


def start(script: str, environment: dict[str, str], *arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(script: str, environment: dict[str, str], *arguments: str | Path):
    """What a script prints as JSON."""
    process = start(script, environment, *arguments)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return json.loads(out)


def weights_requests(case: dict) -> list[str | None]:
    """The Range of each time that the content of the weights was asked for."""
    return [requested for method, path, requested in case["asked"] if method == "GET" and ".safetensors" in path]


# --- faults on the way ------------------------------------------------------------------------------------------------

FAULTS = """
from huggingface_hub import constants

WEIGHTS, CHART, INFO, CUT, SOON = *sys.argv[2:5], int(sys.argv[5]), {"Retry-After": "0"}
count = 0

def pull(faults=(), behaviour={}, source="org/detector", cache=None):
    global count
    count += 1
    cache = cache or Path(sys.argv[1]) / str(count)
    case = attempt(resolve_folder, source, faults=faults, behaviour=behaviour, cache_dir=cache)
    blobs = list(cache.glob("models--*/blobs/*"))
    case["left"] = [path.name for path in blobs if path.suffix == ".incomplete" and cache != held]
    weights = Path(case["result"]) / "model.safetensors"
    case["weights"] = weights.stat().st_size if weights.is_file() else 0
    case["cache"] = cache
    return case

def again(case, **options):
    return pull(cache=case["cache"], **options)

def fault(path, **kind):
    return {"path": path, **kind}

get = {"path": WEIGHTS, "methods": "GET"}
held = Path(sys.argv[1]) / "held"

def killed(end):
    "End a process of its own that has some of the weights, and gets no more; before the client's first use."
    control(faults=[get | {"stall": CUT, "stall_seconds": 100}], forget=True)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        constants.HF_HUB_DOWNLOAD_TIMEOUT = 100  # else it would ask again, if it is not ended in time
        try:
            resolve_folder("org/large", cache_dir=held)
        finally:
            os._exit(1)
    while not any(method == "GET" and re.search(WEIGHTS, path) for method, path, _ in control()):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.1)
    os.kill(child, end)
    os.waitpid(child, 0)

for end in (signal.SIGKILL, signal.SIGINT):
    killed(end)

cases = {"killed twice": pull(source="org/large", cache=held)}
cases["right"] = pull()
cases["right again"] = again(cases["right"])
cases["busy"] = pull([fault(INFO, status=429, headers={"Retry-After": "1"}, times=1)])
date = formatdate(time.time() + 2, usegmt=True)
cases["busy until a date"] = pull([fault(INFO, status=503, headers={"Retry-After": date}, times=1)])
cases["busy for an hour"] = pull([fault(INFO, status=429, headers={"Retry-After": "3600"})])
cases["fails twice"] = pull([get | {"status": 500, "headers": SOON, "times": 2}])
cases["fails always"] = pull([get | {"status": 503, "headers": SOON}])
cases["fails always, in the cache"] = again(cases["right"], faults=[fault(INFO, status=500, headers=SOON)])
cases["cut"] = pull([get | {"cut": CUT, "times": 1}], source="org/large")
cases["stalls"] = pull([get | {"stall": CUT, "stall_seconds": 3, "times": 1}], source="org/large")
cases["silent"] = pull([fault(INFO, delay=3)])
cases["silent, in the cache"] = again(cases["right"], faults=[fault(INFO, delay=3)])
cases["wrong bytes"] = pull([get | {"damage": True}])
cases["wrong bytes again"] = again(cases["wrong bytes"])
cases["a page"] = pull([get | {"body": "<html>", "headers": {"Content-Length": "6"}}])
cases["a page again"] = again(cases["a page"])
cases["wrong chart"] = pull([fault(CHART, methods="GET", damage=True)])
cases["wrong chart again"] = again(cases["wrong chart"])
cases["no Hub"] = pull([fault(INFO, body="<html>", headers={"Content-Length": "6"})])
cases["no codes"] = pull(behaviour={"error_codes": False})
cases["no codes, no repository"] = pull(behaviour={"error_codes": False}, source="org/nothing")
cases["no codes, no revision"] = pull(behaviour={"error_codes": False}, source="org/detector@v9")
cases["no codes, gated"] = pull(behaviour={"error_codes": False, "gated": {"org/detector": ["other"]}})
cases["gated"] = pull(behaviour={"gated": {"org/detector": ["other"]}})
cases["let in"] = pull(behaviour={"gated": {"org/detector": ["owner"]}})
cases["relative redirects"] = pull(behaviour={"redirects": "relative"})
cases["absolute redirects"] = pull(behaviour={"redirects": "absolute"})
cases["redirected and cut"] = pull([get | {"path": "resolve-cache.*safetensors", "cut": CUT, "times": 1}],
                                   source="org/large", behaviour={"redirects": "relative"})
cases["no config"] = pull(source="org/text")
cases["no safetensors"] = pull(source="org/pickle")
for case in cases.values():
    case["cache"] = str(case["cache"])
print(json.dumps(cases))
"""

TIMEOUTS = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}


def run_faults(script: str, hub: HubProcess, path: Path, xet: bool = False, by_xet: bool = False) -> dict[str, dict]:
    """What became of each case; with `by_xet` those bytes go wrong that Xet moves."""
    environment = hub.client_environment(path / "home", xet=xet) | TIMEOUTS
    places = (XORBS, XORBS) if by_xet else (WEIGHTS, "genotype.png")
    hub.behave(xet=by_xet)
    found = run(script, environment, path / "caches", *places, INFO, str(CHUNK + 1000))
    hub.behave(xet=False)
    return found


@pytest.fixture(scope="module")
def faults(hub, tmp_path_factory):
    return run_faults(FAULTS, hub, tmp_path_factory.mktemp("faults"))


def test_a_model_comes_whole_and_once(faults, home):
    case = faults["right"]
    snapshot = Path(case["result"])
    expected = contents(home / "detector")
    assert contents(snapshot).items() == expected.items()
    assert weights_requests(case) == [None]
    assert not case["said"]
    again = faults["right again"]
    assert again["result"] == case["result"]
    assert again["asked"], "whether there is a newer one"
    assert all(method == "GET" and path.startswith("/api/models/org/detector") for method, path, _ in again["asked"])


@pytest.mark.parametrize(
    "name",
    [
        *("busy", "busy until a date", "fails twice", "cut", "stalls", "no codes", "let in"),
        *("relative redirects", "absolute redirects", "redirected and cut"),
        *("wrong bytes again", "a page again", "wrong chart again"),
        *("fails always, in the cache", "silent, in the cache"),
    ],
)
def test_what_passes_is_got_over(faults, name):
    large = any("org/large" in path for _, path, _ in faults[name]["asked"])
    assert faults[name]["weights"] == len(LARGE) if large else faults["right"]["weights"]
    assert not faults[name]["left"]


def test_a_busy_hub_is_waited_for_as_long_as_it_asks_and_that_is_said(faults):
    assert faults["busy"]["seconds"] >= 1
    assert faults["busy"]["said"] == (
        "org/detector: too many requests for the Hub (429), which asks to wait 1 s; trying again in 1 s\n"
    )
    assert faults["fails twice"]["said"].count("\n") == 2
    assert len(weights_requests(faults["fails twice"])) == 3
    assert faults["busy until a date"]["seconds"] > 0.5
    assert "the Hub failed with status 503, which asks to wait" in faults["busy until a date"]["said"]
    assert faults["busy for an hour"]["seconds"] < 1


def test_a_cut_download_goes_on_where_it_was_cut(faults):
    for name in ("cut", "stalls"):
        assert weights_requests(faults[name]) == [None, f"bytes={CHUNK}-"]
    assert weights_requests(faults["redirected and cut"])[-1] == f"bytes={CHUNK}-"


def test_a_download_goes_on_after_its_process_was_ended(faults):
    case = faults["killed twice"]
    assert weights_requests(case) == [None], "from its beginning"
    assert (Path(case["result"]) / "model.safetensors").read_bytes() == LARGE


def test_a_download_with_another_checksum_never_enters_the_cache(faults, home):
    check_refused(faults, home, "detector")
    assert not faults["wrong bytes"]["left"]
    assert "org/detector: genotype.png: checksum mismatch" in faults["wrong chart"]["result"]
    assert not weights_requests(faults["wrong chart"])


def check_refused(cases: dict[str, dict], home: Path, name: str) -> None:
    sha256 = hashlib.sha256((home / name / "model.safetensors").read_bytes()).hexdigest()
    message = cases["wrong bytes"]["result"]
    assert f"org/{name}: model.safetensors: checksum mismatch: the download's sha256 is " in message
    assert f"the Hub's {sha256}; deleted, try again" in message
    assert weights_requests(cases["wrong bytes again"]) == [None]


def without_kills(*names: str) -> str:
    """The script with these cases, and without the processes that are killed."""
    head, *cases = FAULTS.split("\ncases[")
    chosen = [case for case in cases if case.startswith(tuple(f'"{name}' for name in names))]
    head = head.partition("\nfor end in")[0] + "\ncases = {}"
    return "\ncases[".join([head, *chosen]) + "\nfor case in cases" + FAULTS.rpartition("\nfor case in cases")[2]


def test_a_client_that_may_use_xet_pulls_the_same_from_a_hub_without_it(hub, home, tmp_path):
    found = run_faults(without_kills("right", "cut", "wrong bytes", "relative"), hub, tmp_path, xet=True)
    assert contents(Path(found["right"]["result"])) == contents(home / "detector")
    assert weights_requests(found["cut"]) == [None, f"bytes={CHUNK}-"]
    assert found["cut"]["weights"] == len(LARGE)
    assert found["relative redirects"]["weights"] == found["wrong bytes again"]["weights"] == found["right"]["weights"]
    check_refused(found, home, "detector")


@pytest.fixture(scope="module")
def xet_faults(hub, tmp_path_factory):
    pytest.importorskip("hf_xet")
    script = without_kills("right", "wrong", "no codes")
    return run_faults(script, hub, tmp_path_factory.mktemp("xet"), xet=True, by_xet=True)


def test_a_model_comes_whole_and_once_by_xet(xet_faults, home):
    case = xet_faults["right"]
    assert contents(Path(case["result"])) == contents(home / "detector")
    assert not weights_requests(case)
    assert len([path for _, path, _ in case["asked"] if path.startswith(XORBS)]) == 2, "weights and chart"
    assert xet_faults["right again"]["result"] == case["result"]
    assert all(path.startswith("/api/models/org/detector") for _, path, _ in xet_faults["right again"]["asked"])


@pytest.mark.parametrize("name", ["wrong bytes", "wrong chart"])
def test_damage_on_the_way_by_xet_is_found_and_the_cache_heals(xet_faults, home, name):
    assert "org/detector: genotype.png: checksum mismatch: the download's sha256 is " in xet_faults[name]["result"]
    assert contents(Path(xet_faults[f"{name} again"]["result"])) == contents(home / "detector")


def test_a_download_by_xet_is_whole_after_its_process_was_ended(hub, tmp_path):
    pytest.importorskip("hf_xet")
    head, end = FAULTS.partition('cases["right"]')[0], "\nfor case in cases"
    script = head.replace("(signal.SIGKILL, signal.SIGINT)", "(signal.SIGKILL,)") + end + FAULTS.rpartition(end)[2]
    case = run_faults(script, hub, tmp_path, xet=True, by_xet=True)["killed twice"]
    assert (Path(case["result"]) / "model.safetensors").read_bytes() == LARGE


REASONS = {
    "busy for an hour": "too many requests for the Hub (429), which asks to wait 3,600 s, and it is not in the cache",
    "fails always": "org/detector: model.safetensors: the Hub failed with status 503, which asks to wait 0 s",
    "silent": "the Hub did not answer in time (see HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT), and it is not in",
    "a page": "org/detector: model.safetensors: 6 bytes came instead of",
    "no Hub": "is not a Hub: check HF_ENDPOINT, the proxy and the firewall",
    "no codes, no repository": "org/nothing: no such folder, and from the Hub: no such repository, or it is private",
    "no codes, no revision": "org/detector@v9: no such folder, and from the Hub: no such repository or revision 'v9'",
    "no codes, gated": "no access; if the repository is gated, ask for access on its page",
    "gated": "org/detector: no such folder, and from the Hub: the repository is gated: ask for access on its page with",
    "no config": "org/text: the repository has no config.json, expected a model's",
    "no safetensors": "org/pickle: the repository has no model.safetensors; other weights are not read",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_does_not_pass_is_told_in_one_line(faults, name):
    check_told_in_one_line(faults[name], REASONS[name])


def check_told_in_one_line(case: dict, words: str) -> None:
    message = case["result"]
    assert message.startswith("NatsError: ")
    assert words in message
    assert "\n" not in message


def test_a_cached_model_serves_while_the_hub_fails_and_that_is_said(faults):
    assert faults["fails always, in the cache"]["said"].endswith("; used as it is in the cache\n")
    assert faults["silent, in the cache"]["said"].startswith("org/detector: the Hub did not answer in time")


# --- models, by every name --------------------------------------------------------------------------------------------

MODELS = """
import timm, torch
import nats_zoo
from nats_zoo.detection import create_detector, from_pretrained
from nats_zoo.base.names import MODEL_FILES
from nats_zoo.folders.find_genotype import find_genotype
from nats_zoo.models.named import find_network, genotype_name

def described(call, *arguments, **options):
    found = call(*arguments, **options)
    return type(found).__name__

image = torch.full((1, 3, 64, 64), 0.5)
made = {
    "timm": timm.create_model("hf-hub:org/backbone", pretrained=True),
    "timm@v1": timm.create_model("hf-hub:org/backbone@v1", pretrained=True),
    "nats_zoo": nats_zoo.from_pretrained("org/backbone", revision="v1"),
    "nats_zoo@v1": nats_zoo.from_pretrained("org/backbone@v1"),
    "folder": nats_zoo.from_pretrained(sys.argv[1] + "/backbone"),
}
with torch.no_grad():
    outputs = {name: model.eval()(image).tolist() for name, model in made.items()}
    same = [name for name in outputs if outputs[name] == outputs["folder"]]
    detectors = [from_pretrained(source).state_dict() for source in
                 ("org/detector", "org/detector@v1", "hf-hub:org/detector", sys.argv[1] + "/detector")]
equal = all(torch.equal(tensor, other[key]) for other in detectors for key, tensor in detectors[0].items())

names = ["hf-hub:org/genotype", "hf-hub:org/genotype@v1", "hf-hub:org/backbone", "hf-hub:org/detector@v1"]
genotypes = [timm.create_model("nats_any", architecture="test_resnet", genotype=name).genotype for name in names]
genotypes += [find_genotype(name) for name in (*names, *(name.removeprefix("hf-hub:") for name in names))]
body = create_detector(backbone="test_resnet", num_classes=2, genotype="hf-hub:org/genotype", weights="org/plain")
genotypes.append(body.backbone.body.genotype)
asked = control(forget=True)
by_genotype = attempt(find_genotype, "org/genotype")
source = find_network("org/backbone@v1")
errors = {
    name: attempt(from_pretrained, name)
    for name in ("org/nothing", "org/private", "org/newer", "org/other", "org/page", "org/plain", "org/detector@v9")
}
errors["two revisions"] = attempt(from_pretrained, "org/detector@v1", revision="main")
errors["no revision"] = attempt(from_pretrained, "org/detector@")
errors["sneaky"] = attempt(nats_zoo.from_pretrained, "org/sneaky")
errors["sneaky genotype"] = attempt(find_genotype, "org/sneaky")
errors["plain genotype"] = attempt(find_genotype, "hf-hub:org/plain")
errors["no genotype"] = attempt(find_genotype, "org/text")
errors["nothing"] = attempt(find_genotype, "hf-hub:org/nothing")
print(json.dumps({
    "same": same, "equal": equal, "genotypes": [genotype.to_dict() for genotype in genotypes],
    "labels": [source.label, genotype_name(genotypes[0]), genotype_name(genotypes[6]),
               genotype_name(source.genotype), source.weights_name(str(source.folder))],
    "asked for a genotype": by_genotype["asked"], "errors": errors,
}))
"""


@pytest.fixture(scope="module")
def models(hub, home, tmp_path_factory):
    return run(MODELS, hub.client_environment(tmp_path_factory.mktemp("models"), STRANGER_TOKEN), home)


def test_models_come_by_every_name(models):
    assert models["same"] == ["timm", "timm@v1", "nats_zoo", "nats_zoo@v1", "folder"]
    assert models["equal"]


def test_genotypes_come_by_name_from_repositories_of_each_kind(models):
    assert len(models["genotypes"]) == 13
    assert all(genotype == GENOTYPE.to_dict() for genotype in models["genotypes"])
    assert models["labels"] == ["backbone", "genotype", "backbone", "backbone", "backbone"]


def test_for_a_genotype_no_weights_are_downloaded(models):
    assert models["asked for a genotype"]
    assert not any("safetensors" in path for _, path, _ in models["asked for a genotype"])


ERRORS = {
    "org/nothing": "no such repository, or it is private and the token's account can not see it",
    "org/private": "no such repository, or it is private and the token's account can not see it",
    "org/newer": "is of a newer format (2)",
    "org/other": "these weights belong to another genotype",
    "org/page": "model.safetensors: not a safetensors file",
    "org/plain": "key 'framework' is missing, expected a detector's config",
    "org/detector@v9": "the repository has no revision 'v9', expected a branch, a tag or a commit",
    "two revisions": "org/detector@v1: names the revision 'v1', and 'main' was asked for too",
    "no revision": "org/detector@: expected a branch, a tag or a commit after the @",
    "sneaky": "genotype",
    "sneaky genotype": "genotype: expected an object with string keys, found str",
    "plain genotype": "hf-hub:org/plain: a plain network, it has no genotype",
    "no genotype": "org/text: neither genotype.json nor config.json is in the repository",
    "nothing": "hf-hub:org/nothing: from the Hub: no such repository",
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_no_model_of_ours_is_told_in_one_line(models, name):
    check_told_in_one_line(models["errors"][name], ERRORS[name])


def test_a_genotype_named_by_a_downloaded_config_is_not_fetched(models):
    for name in ("sneaky", "sneaky genotype"):
        assert not any("org/genotype" in path for _, path, _ in models["errors"][name]["asked"])


# --- timm's own loader ------------------------------------------------------------------------------------------------

BY_TIMM = """
import timm
import nats_zoo

def by_timm(source, faults=(), pretrained=True, **options):
    return attempt(lambda: type(timm.create_model(source, pretrained, **options)).__name__, faults=faults)

BACKBONE, damaged = "hf-hub:org/backbone", {"path": sys.argv[2], "methods": "GET", "damage": True}
print(json.dumps({
    "without weights": by_timm(BACKBONE, pretrained=False),
    "wrong bytes": by_timm(BACKBONE, [damaged]),
    "wrong bytes again": by_timm(BACKBONE),
    "from the cache": by_timm(BACKBONE),
    "features": by_timm(BACKBONE, features_only=True),
    "another cache": by_timm(BACKBONE, cache_dir=sys.argv[1] + "/timms_cache"),
    "saved by timm": by_timm("hf-hub:org/by_timm"),
    "swapped": by_timm("hf-hub:org/swapped"),
    "swapped folder": by_timm(f"local-dir:{sys.argv[1]}/swapped"),
    "swapped without weights": by_timm("hf-hub:org/swapped", pretrained=False),
    "pickled": by_timm("hf-hub:org/pickled"),
}))
"""


@pytest.fixture(scope="module")
def by_timm(hub, home, tmp_path_factory):
    return run(BY_TIMM, hub.client_environment(tmp_path_factory.mktemp("by_timm"), STRANGER_TOKEN), home, WEIGHTS)


def test_timms_loader_takes_weights_that_are_checked_and_takes_them_once(by_timm, home):
    assert not weights_requests(by_timm["without weights"])
    check_refused(by_timm, home, "backbone")
    for name in ("from the cache", "features"):
        assert not weights_requests(by_timm[name])
        assert "Error" not in by_timm[name]["result"]
    assert weights_requests(by_timm["another cache"]) == [None]
    assert list((home / "timms_cache").glob("models--org--backbone/snapshots/*/model.safetensors"))
    assert by_timm["saved by timm"]["result"] == by_timm["without weights"]["result"]


def test_timms_loader_refuses_weights_of_another_genotype(by_timm):
    for name in ("swapped", "swapped folder"):
        assert "these weights belong to another genotype" in by_timm[name]["result"]
    assert by_timm["swapped without weights"]["result"] == by_timm["without weights"]["result"]


def test_timms_loader_is_not_let_to_a_pickle(by_timm):
    assert "repository has no model.safetensors; other weights are not read" in by_timm["pickled"]["result"]
    assert not any("pytorch_model" in path for _, path, _ in by_timm["pickled"]["asked"])


# --- offline, and other tokens ----------------------------------------------------------------------------------------

PULLS = """
from nats_zoo.folders.find_genotype import find_genotype

def pulled(call, *arguments):
    try:
        found = call(*arguments)
    except NatsError as error:
        return f"NatsError: {error}"
    return str(found) if isinstance(found, Path) else found.to_dict()

def pull_all():
    names = ("org/detector", "org/detector@v1", "org/nothing", "org/private")
    return {name: pulled(resolve_folder, name) for name in names} | {"genotype": pulled(find_genotype, "org/genotype")}

print(json.dumps(pull_all()), flush=True)
if "HF_HUB_OFFLINE" not in os.environ:
    os.environ["HF_TOKEN"] = "hf_unheard_of"
    print(json.dumps(pulled(lambda: resolve_folder("org/backbone"))), flush=True)
    del os.environ["HF_TOKEN"]
    sys.stdin.readline()
    print(json.dumps(pull_all()))
"""


def test_the_cache_serves_without_a_network_and_without_a_hub(home, tmp_path):
    with HubProcess(home / "hub") as server:
        environment = server.client_environment(tmp_path, token=None)
        process = start(PULLS, environment)
        online, invalid = json.loads(process.stdout.readline()), process.stdout.readline()
    said, complaints = process.communicate("the Hub is gone now\n", timeout=120)
    assert process.returncode == 0, complaints
    gone = json.loads(said)
    forbidden = run(PULLS, environment | {"HF_HUB_OFFLINE": "1"})
    assert online["genotype"] == GENOTYPE.to_dict()
    for found in (gone, forbidden):
        for name in ("org/detector", "org/detector@v1", "genotype"):
            assert found[name] == online[name]
    assert "from the Hub: no such repository, or it is private: then run `hf auth login`" in online["org/private"]
    assert "the token is not valid: run `hf auth login` or set HF_TOKEN" in invalid
    assert "hf_unheard_of" not in invalid + complaints
    assert "the Hub can not be reached (" in gone["org/nothing"]
    assert gone["org/nothing"].endswith(", and it is not in the cache")
    assert "the Hub can not be reached (HF_HUB_OFFLINE is set), and it is not in the cache" in forbidden["org/nothing"]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1", ("org/name", "v1")),
        ("hf-hub:org/name@refs/pr/1", ("org/name", "refs/pr/1")),
    ],
)
def test_a_source_names_a_repository_and_a_revision(source, expected):
    assert split_revision(source) == expected
    if expected[1] is None:
        assert split_revision(source, "v2") == ("org/name", "v2")


@pytest.mark.parametrize("source", ["name", "name@v1", "hf-hub:name", "../name", "a/b/c@v1", "hf-hub:/etc"])
def test_what_names_no_repository_is_refused(source):
    with pytest.raises(NatsError, match="neither a folder nor the id of a Hub repository"):
        split_revision(source)
