"""Publishing to a loopback Hub, a process of its own, that is busy, fails, or loses answers; or to which a publisher
was in the middle of publishing when it was killed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from nats_zoo import Genotype, save_backbone
from tests.support.hub_server import OWNER_TOKEN, HubProcess, run_script
from tests.support.paths import ROOT

GENOTYPE = Genotype("test_resnet", {"layer2.0.conv2": [(16, 1, 1), (32, 1, 3)]}, provenance={"method": "by hand"})
CONTROL = """
import contextlib, io, json, os, signal, sys, time, urllib.request
from pathlib import Path

import nats_zoo
from huggingface_hub import HfApi
sys.path.insert(0, sys.argv[1])
from tests.support.hub_server import Controls, Fault

class Hub(Controls):
    url = os.environ["HF_ENDPOINT"]

hub, api = Hub(), HfApi()

def forget_uploads():
    for file in (Path(sys.argv[3]) / "objects").iterdir():
        if file.stat().st_size > 20_000:  # weights and chart; they are in LFS
            file.unlink()

def publish(repo, *faults, **options):
    hub.inject(*faults)
    hub.requests(forget=True)
    said, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said):
        try:
            result = nats_zoo.publish(sys.argv[2], repo, **options)
        except nats_zoo.NatsError as error:
            result = f"NatsError: {error}"
    seconds, asked = time.monotonic() - began, hub.requests()
    hub.inject()
    commits = [commit.title for commit in api.list_repo_commits(repo)]
    return {"result": result, "said": said.getvalue(), "seconds": seconds, "asked": asked, "commits": len(commits)}
"""
KILLED = """
def killed(fault):
    "The number of commits when a process of its own was killed that met this fault; before the client's first use."
    hub.inject(fault)
    hub.requests(forget=True)
    child = os.fork()
    if not child:
        try:
            nats_zoo.publish(sys.argv[2], "org/killed")
        finally:
            os._exit(1)
    while not [method for method, _, _ in hub.requests(fault.path) if method in fault.methods.split()]:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    time.sleep(0.3)  # a commit whose answer is held back is done by then
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hub.inject()
    request = urllib.request.Request(hub.url + "/api/models/org/killed/commits/main",
                                     headers={"Authorization": "Bearer " + os.environ["HF_TOKEN"]})
    return len(json.load(urllib.request.urlopen(request)))
"""
CASES = (
    KILLED
    + """
UPLOAD, SOON, LATER = "/lfs/[0-9a-f]*$", {"Retry-After": "0"}, {"Retry-After": "1"}
commits = [
    killed(Fault(UPLOAD, "PUT", delay=100)),
    killed(Fault("/commit/", delay=100)),
    killed(Fault("/commit/", stall=0, stall_seconds=100)),
]
found = {
    "killed": publish("org/killed") | {"before": commits},
    "create": publish("org/create", Fault("repos/create", times=1, status=503, headers=SOON)),
    "refs": publish("org/refs", Fault("/refs$", times=2, status=500, headers=SOON), tag="v1"),
    "tree": publish("org/tree", Fault("/tree/", times=1, status=500, headers=SOON)),
    "preupload": publish("org/preupload", Fault("/preupload/", times=1, status=429, headers=SOON)),
    "batch": publish("org/batch", Fault("/objects/batch", times=1, status=500, headers=SOON)),
    "busy at the commit": publish("org/busy", Fault("/commit/", times=1, status=429, headers=LATER)),
    "busy at the tag": publish("org/tag", Fault("/tag/", times=1, status=429, headers=SOON), tag="v1"),
    "busy for an hour": publish("org/hour", Fault("/commit/", status=429, headers={"Retry-After": "3600"})),
}
forget_uploads()
found["refused upload"] = publish("org/refused", Fault(UPLOAD, "PUT", status=400))
found["upload"] = publish("org/upload", Fault(UPLOAD, "PUT", times=1, status=500, headers=SOON),
                          Fault("/commit/", times=1, status=429, headers=SOON))
print(json.dumps(found))
"""
)
XET = 'print(json.dumps(publish("org/one")))'
BY_XET = (
    KILLED
    + """
commits = [
    killed(Fault("/v1/xorbs/", "POST", delay=100)),
    killed(Fault("/v1/shards", "POST", delay=100)),
    killed(Fault("/commit/", delay=100)),
]
found = {
    "killed": publish("org/killed", tag="v1") | {"before": commits},
    "again": publish("org/killed"),
    "failed": publish("org/failed", Fault("/commit/", status=500)),
}
from nats_zoo.folders.model_folder import model_files
from nats_zoo.hub.client import resolve_folder

found["files"] = [path.name for path in model_files(resolve_folder("org/killed"))]
pulled = nats_zoo.from_pretrained("org/killed@v1").state_dict()
kept = nats_zoo.from_pretrained(sys.argv[2]).state_dict()
found["pulled"] = all(bool((kept[name] == tensor).all()) for name, tensor in pulled.items())
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    import timm

    model = timm.create_model("nats_any", architecture="test_resnet", genotype=GENOTYPE, num_classes=2)
    return save_backbone(model, tmp_path_factory.mktemp("faults") / "backbone")


def run(script: str, hub: HubProcess, path: Path, folder: Path, xet: bool = False) -> dict:
    """What a script prints as JSON."""
    arguments = [ROOT, folder, path / "hub"]
    done = run_script(CONTROL + script, hub.client_environment(path / "home", xet=xet), *arguments, timeout=170)
    assert OWNER_TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cases(folder, tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("cases")
    with HubProcess(path / "hub") as hub:
        return run(CASES, hub, path, folder)


@pytest.mark.parametrize(
    "name", ["create", "refs", "tree", "preupload", "batch", "upload", "busy at the commit", "busy at the tag"]
)
def test_a_hub_that_fails_for_a_while_gets_one_commit(cases, name):
    case = cases[name]
    assert "/commit/" in case["result"]
    assert not case["result"].startswith("NatsError")
    assert case["commits"] == 2  # the Hub's own first one is the other


def test_a_busy_hub_is_waited_for_before_the_commit_and_that_is_said(cases):
    case = cases["busy at the commit"]
    assert case["seconds"] >= 1
    line = "org/busy: too many requests for the Hub (429), which asks to wait 1 s; trying again in 1 s"
    assert line in case["said"].splitlines()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "busy for an hour",
            "org/hour: not published: too many requests for the Hub (429), which asks to wait 3,600 s",
        ),
        ("refused upload", "org/refused: not published: "),
    ],
)
def test_a_hub_that_does_not_recover_has_nothing_published(cases, name, words):
    case = cases[name]
    assert case["result"].startswith(f"NatsError: {words}")
    assert "\n" not in case["result"]
    assert case["commits"] == 1


def test_what_was_uploaded_is_not_sent_again_for_the_commit(cases):
    uploads = [path for method, path, _ in cases["upload"]["asked"] if method == "PUT"]
    commits = [path for method, path, _ in cases["upload"]["asked"] if "/commit/" in path]
    assert len(uploads) == len(set(uploads)) + 1, "the one that failed"
    assert len(commits) == 2


def test_a_killed_publisher_leaves_nothing_half_done_and_is_repeated(cases):
    case = cases["killed"]
    assert case["before"] == [1, 1, 2], "killed while uploading, while committing, and before the answer came"
    assert case["result"].startswith("nothing changed, ")
    assert case["commits"] == 2


# --- another protocol -------------------------------------------------------------------------------------------------


def test_a_client_that_may_use_xet_publishes_to_a_hub_without_it(folder, tmp_path):
    with HubProcess(tmp_path / "hub") as hub:
        found = run(XET, hub, tmp_path, folder, xet=True)
    assert found["result"].startswith(f"{hub.url}/org/one/commit/")
    assert found["commits"] == 2
    can_xet = find_spec("hf_xet") is not None  # which came with the client only later
    assert any("xet-write-token" in path for _, path, _ in found["asked"]) == can_xet
    assert any(method == "PUT" for method, _, _ in found["asked"])


def test_publishing_and_pulling_by_xet_are_whole_after_a_publisher_was_killed(folder, tmp_path):
    pytest.importorskip("hf_xet")
    with HubProcess(tmp_path / "hub") as hub:
        hub.behave(xet=True)
        found = run(BY_XET, hub, tmp_path, folder, xet=True)
    assert found["killed"]["before"] == [1, 1, 1], "killed while uploading bytes, their places, and while committing"
    assert "/commit/" in found["killed"]["result"]
    assert found["killed"]["commits"] == 2
    assert not any(method == "PUT" for method, _, _ in found["killed"]["asked"]), "no plain upload"
    assert found["again"]["result"].startswith("nothing changed, ")
    assert found["pulled"]
    assert found["files"] == ["README.md", "config.json", "genotype.png", "model.safetensors"], "to be published again"
    assert found["failed"]["commits"] == 1
    assert found["failed"]["result"].endswith("status 500; its repository is there, without files of a model")
