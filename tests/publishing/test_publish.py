"""Publishing to the loopback Hub: repeated, refused, failing midway; genotypes alone; an organisation's collection."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

import nats_zoo
from nats_zoo import Genotype, GenotypeError, NatsError
from nats_zoo.cli import main
from nats_zoo.detection import Metrics, create_detector, save_detector
from nats_zoo.publishing.genotype import save_genotype_folder
from tests.support.hub_server import OWNER_TOKEN, HubProcess, run_script
from tests.support.paths import ROOT

CONVS = {"layer3.0.conv2": [[128, 1, 1], [128, 2, 3]]}
GENOTYPE = Genotype("resnet18", CONVS, provenance={"method": "sampled", "command": "nats search --data d --output s"})
OTHER = Genotype("resnet18", {"layer3.0.conv2": [[128, 1, 1], [128, 3, 3]]}, provenance={"method": "random"})
TINY = {"fpn_channels": 8, "head_size": 8, "min_size": 64, "max_size": 96, "weights": None}
METRICS = Metrics(41.25, 60.0, 44.0, *[None] * 9, per_class={"cat": {"ap": 41.25, "ap50": 60.0}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    """Two genotypes, the folder of a search, and a detector."""
    root = tmp_path_factory.mktemp("folders")
    search = root / "search"
    (search / "checkpoints").mkdir(parents=True)
    GENOTYPE.save(search / "genotype.json")
    (search / "run.json").write_text(json.dumps({"data": "d", "output": "s", "mode": "sampled", "groups": 16}))
    first = {"step": 0, "epoch": 0.0, "data": {"train": {"images": 5, "boxes": 9}}, "hardware": {"device": "a GPU"}}
    (search / "log.jsonl").write_text(json.dumps(first) + "\n")
    (search / "optimiser.pt").write_text("pickle")
    torch.manual_seed(0)
    detector = create_detector("fasterrcnn", "mobilenetv3_small_050", 2, classes=("cat",), category_ids=(1,), **TINY)
    return SimpleNamespace(
        first=save_genotype_folder(GENOTYPE, root / "first"),
        second=save_genotype_folder(OTHER, root / "second"),
        search=search,
        detector=save_detector(detector, root / "detector", METRICS, "pets val"),
    )


# --- without network --------------------------------------------------------------------------------------------------


def test_a_genotype_folder_holds_what_is_published(folders):
    assert sorted(path.name for path in folders.first.iterdir()) == ["README.md", "genotype.json", "genotype.png"]
    assert Genotype.load(folders.first / "genotype.json") == GENOTYPE
    card = ModelCard.load(folders.first / "README.md")
    assert (card.data.library_name, card.data.license) == ("nats-zoo", "unknown")
    assert {"nats-zoo", "nats-zoo-genotype", "resnet18"} <= set(card.data.tags)
    for words in ("A search chose them (`sampled`)", "| method | sampled |", "50% of channels changed", "1909.02293"):
        assert words in card.text
    assert "No search found it" in (folders.second / "README.md").read_text()


def test_only_a_genotype_folder_is_replaced(folders, tmp_path):
    folder = Path(shutil.copytree(folders.first, tmp_path / "genotype"))
    save_genotype_folder(OTHER, folder)
    assert Genotype.load(folder / "genotype.json") == OTHER
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(NatsError, match="not replaced"):
        save_genotype_folder(GENOTYPE, folder)
    assert Genotype.load(folder / "genotype.json") == OTHER


def test_a_genotype_of_any_timm_network_is_loaded_by_the_generic_entry_point(tmp_path):
    folder = save_genotype_folder(Genotype("regnety_002", {}), tmp_path / "genotype")
    card = (folder / "README.md").read_text()
    assert 'timm.create_model("nats_any", architecture="regnety_002", genotype="hf-hub:ORG/NAME")' in card


def test_a_dry_run_of_a_search_names_what_goes_and_what_stays_behind(folders, capsys):
    assert main(["publish", str(folders.search), "org/found", "--dry_run", "--tag", "v1", "--license", "mit"]) == 0
    head, *files, total, behind = capsys.readouterr().out.splitlines()
    assert head == "org/found (public), branch main, tag v1:"
    assert [line.split()[0] for line in files] == ["README.md", "genotype.json", "genotype.png"]
    assert int(files[1].split()[1].replace(",", "")) == (folders.search / "genotype.json").stat().st_size
    assert total.startswith("3 files, ")
    assert behind == "stays behind: checkpoints/, log.jsonl, optimiser.pt, run.json"
    assert sorted(path.name for path in folders.search.iterdir()) == [
        *("checkpoints", "genotype.json", "log.jsonl", "optimiser.pt", "run.json")
    ]


@pytest.mark.parametrize("name", ["", "a b", "a..b", "-a", "/a", "a/", "a.lock", "a:b", "a\nb", "@", "a@{b"])
@pytest.mark.parametrize("option", ["tag", "revision"])
def test_what_can_name_no_branch_or_tag_is_refused_before_anything_else(folders, option, name):
    with pytest.raises(NatsError, match=f"{option}: .* can be no name of a branch or tag"):
        nats_zoo.publish(folders.first, "org/name", dry_run=True, **{option: name})


def test_folders_that_can_not_be_published_say_why(folders, tmp_path):
    shutil.copytree(folders.detector, tmp_path / "run" / "best")
    with pytest.raises(NatsError, match="is a run's folder, expected a model in it: best"):
        nats_zoo.publish(tmp_path / "run", "org/name", dry_run=True)
    with pytest.raises(NatsError, match=r"no config\.json in it"):
        nats_zoo.publish(tmp_path / "nowhere", "org/name", dry_run=True)
    (tmp_path / "genotype.json").write_text("{}")
    for broken in (tmp_path, tmp_path / "genotype.json"):
        with pytest.raises(GenotypeError, match=r"genotype\.json: key 'format' is missing"):
            nats_zoo.publish(broken, "org/name", dry_run=True)


def test_a_detector_with_the_weights_of_another_genotype_is_not_published(folders, tmp_path):
    folder = Path(shutil.copytree(folders.detector, tmp_path / "detector"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "genotype": GENOTYPE.to_dict()}))
    with pytest.raises(NatsError, match="these weights belong to another genotype"):
        nats_zoo.publish(folder, "org/name", dry_run=True)


def test_statements_for_the_card_need_a_card(folders, tmp_path):
    folder = Path(shutil.copytree(folders.detector, tmp_path / "detector"))
    (folder / "README.md").unlink()
    assert "README.md" not in nats_zoo.publish(folder, "org/name", dry_run=True)
    with pytest.raises(NatsError, match=r"has no README\.md to state licences and names in"):
        nats_zoo.publish(folder, "org/name", dry_run=True, license="mit")


# --- the Hub ----------------------------------------------------------------------------------------------------------

PRELUDE = """
import contextlib, io, json, os, re, sys, threading, time

sys.path.append(sys.argv.pop())  # the tests' folder, behind an installed nats_zoo
import nats_zoo
from huggingface_hub import HfApi
from nats_zoo.cli import main
from tests.support.hub_server import Controls, Fault

class Hub(Controls):
    url = os.environ["HF_ENDPOINT"]

hub, api, owner = Hub(), HfApi(), "hf_owner"
first, second, search, detector = sys.argv[1:]

def attempt(*arguments, **options):
    try:
        return nats_zoo.publish(*arguments, **{"token": owner, **options})
    except nats_zoo.NatsError as error:
        return f"NatsError: {error}"

def published(*arguments, **options):
    "What `publish` says, and the requests that changed something."
    hub.requests(forget=True)
    said = attempt(*arguments, **options)
    return said, [f"{m} {p}" for m, p, _ in hub.requests() if m != "GET" and "repos/create" not in p]

def history(repo, branch="main"):
    return [commit.commit_id for commit in api.list_repo_commits(repo, revision=branch, token=owner)]

def tags(repo):
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo, token=owner).tags}

def files(repo):
    return sorted(api.list_repo_files(repo, token=owner))
"""

REPEATED = """
found = dict(
    dry=published(first, "org/g", dry_run=True, token=None),
    new=published(first, "org/g"), again=published(first, "org/g"),
    tagged=published(first, "org/g", tag="v1"), tagged_again=published(first, "org/g", tag="v1"),
    changed_with_old_tag=published(second, "org/g", tag="v1"),
    search=published(search, "org/s", license="mit"), search_again=published(search, "org/s", license="mit"),
    file=published(search + "/genotype.json", "org/file"),
    to_tag=published(second, "org/g", revision="v1"),
    side=published(second, "org/g", revision="side/b", tag="v2"),
    side_again=published(second, "org/g", revision="side/b", tag="v2"),
    same_on_new_branch=published(first, "org/g", revision="copy"),
)
found["tags"], found["main"], found["side_history"] = tags("org/g"), history("org/g"), history("org/g", "side/b")
found["files"] = [files(repo) for repo in ("org/g", "org/s", "org/file")]
found["copy"] = history("org/g", "copy")
text = lambda repo: open(api.hf_hub_download(repo, "README.md", token=owner), encoding="utf-8").read()
pasted = {}
exec(re.search("```python\\n(.*?)```", text("org/s"), re.DOTALL)[1], pasted)
found["model"] = [type(pasted["model"]).__name__, pasted["model"].genotype.to_dict()]
found["card"] = text("org/s")

# a detector takes the genotype's place; what somebody added by hand stays
for name in ("photo.png", "notes/how.md"):
    api.upload_file(path_or_fileobj=b"\\x00mine", path_in_repo=name, repo_id="org/g", token=owner)
found["replaced"] = published(detector, "org/g")
found["replaced_files"] = files("org/g")
print(json.dumps(found))
"""

FAILING = """
found = {"base": attempt(first, "org/f")}
before = history("org/f")
hub.inject(Fault(path="/commit/", methods="POST", status=500, times=1))
found["failed"] = attempt(second, "org/f", tag="v1")
found["nothing_published"] = [history("org/f") == before, tags("org/f")]
found["succeeded"] = attempt(second, "org/f", tag="v1")
found["commits_more"] = len(history("org/f")) - len(before)

hub.inject(Fault(path="/commit/", methods="POST", status=500, times=1, done_first=True))  # only the answer is lost
found["lost_answer"] = [attempt(first, "org/f"), attempt(first, "org/f"), len(history("org/f")) - len(before)]

hub.inject(Fault(path="/tag/", methods="POST", status=500, times=1))
found["no_tag"], found["no_tag_head"] = attempt(second, "org/f", tag="v2"), history("org/f")[0]
found["tag_later"] = [attempt(second, "org/f", tag="v2"), tags("org/f")["v2"]]

def push_meanwhile():
    while not hub.requests("/commit/"):
        time.sleep(0.05)
    hub.inject()
    api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="org/f", token=owner)

hub.requests(forget=True)
hub.inject(Fault(path="/commit/", methods="POST", delay=3.0, times=1))
thread = threading.Thread(target=push_meanwhile)
thread.start()
found["race"] = attempt(first, "org/f", tag="v3")
thread.join()
found["race_files"], found["race_tags"] = files("org/f"), sorted(tags("org/f"))
found["after_race"] = attempt(first, "org/f", tag="v3")
refusal = json.dumps({"errors": [{"message": "license is none"}], "warnings": []})
hub.inject(Fault(path="/validate-yaml", methods="POST", status=400, body=refusal))
found["invalid"] = published(second, "org/f")
print(json.dumps(found))
"""

COLLECTION = """
def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return [code, out.getvalue(), err.getvalue()]

found = {"empty": run("collection", "org")}
statements = dict(license="other", license_name="pets-1.0", license_link="https://example.org/pets", dataset="org/pets")
attempt(detector, "org/detector", **statements)
attempt(second, "org/secret", private=True)
attempt(first, "owner/genotype")
api.create_repo("org/unrelated", token=owner)
hub.behave(gated={"org/detector": []})
found["anonymous"] = run("collection", "org", "--json")
os.environ["HF_TOKEN"] = owner
found["owner"] = run("collection", "org", "--json", "true")
found["table"] = run("collection", "org")
found["user"] = run("collection", "owner")
found["slash"] = run("collection", "org/detector")
hub.inject(Fault(path="/api/models", methods="GET", status=400))  # which the client does not try again
found["refused"] = run("collection", "org")
hub.inject()
found["card"] = str(nats_zoo.publish(detector, "org/detector", dry_run=True, **statements))
found["published"] = run("publish", detector, "org/detector", "--license", "mit", "--commit_message", "Under MIT")
found["titles"] = [commit.title for commit in api.list_repo_commits("org/detector", token=owner)]
print(json.dumps(found))
"""


def run_client(script: str, folders: SimpleNamespace, home: Path) -> dict:
    """What a script says that publishes to a Hub of its own, without a token in its environment."""
    with HubProcess(home / "root") as hub:
        arguments = [folders.first, folders.second, folders.search, folders.detector, ROOT]
        environment = hub.client_environment(home / "home", token=None)
        result = run_script(PRELUDE + script, environment, *arguments, timeout=170, cwd=home)
    assert OWNER_TOKEN not in result.stdout + result.stderr
    for path in (home / "home").rglob("*"):
        assert not path.is_file() or OWNER_TOKEN.encode() not in path.read_bytes(), path
    return {**json.loads(result.stdout), "url": hub.url}


@pytest.fixture(scope="module")
def repeated(folders, tmp_path_factory) -> dict:
    return run_client(REPEATED, folders, tmp_path_factory.mktemp("repeated"))


@pytest.fixture(scope="module")
def failing(folders, tmp_path_factory) -> dict:
    return run_client(FAILING, folders, tmp_path_factory.mktemp("failing"))


@pytest.fixture(scope="module")
def collection(folders, tmp_path_factory) -> dict:
    return run_client(COLLECTION, folders, tmp_path_factory.mktemp("collection"))


def test_a_dry_run_asks_the_hub_nothing(repeated):
    said, requests = repeated["dry"]
    assert said.startswith("org/g (public), branch main:")
    assert requests == []


def test_a_folder_is_one_commit_and_an_unchanged_one_is_none(repeated):
    said, requests = repeated["new"]
    assert sum("/commit/" in request for request in requests) == 1
    for name in ("again", "tagged_again"):
        assert repeated[name] == [f"nothing changed, {said}", []]
    assert repeated["search_again"] == [f"nothing changed, {repeated['search'][0]}", []]
    assert len(repeated["main"]) == 2
    assert said == f"{repeated['url']}/org/g/commit/{repeated['main'][0]}"


def test_an_unchanged_folder_is_tagged_without_a_commit(repeated):
    said, requests = repeated["tagged"]
    assert said == f"nothing changed, {repeated['new'][0]}"
    assert len(requests) == 1
    assert requests[0].startswith("POST /api/models/org/g/tag/")
    assert repeated["tags"]["v1"] == repeated["main"][0]


def test_a_tag_of_another_commit_is_refused_before_anything_is_uploaded(repeated):
    said, requests = repeated["changed_with_old_tag"]
    assert said.startswith(f"NatsError: org/g: has a tag 'v1' already, of commit {repeated['main'][0]}")
    assert requests == []


def test_a_branch_is_begun_at_main_and_published_to(repeated):
    assert repeated["to_tag"] == ["NatsError: org/g: revision: 'v1' is a tag, expected a branch", []]
    head, *before = repeated["side_history"]
    assert before == repeated["main"]
    assert repeated["side"][0].endswith(head)
    assert repeated["tags"]["v2"] == head
    assert repeated["side_again"] == [f"nothing changed, {repeated['side'][0]}", []]
    assert repeated["copy"] == repeated["main"]
    assert repeated["same_on_new_branch"][0] == f"nothing changed, {repeated['new'][0]}"


def test_of_a_search_only_its_genotype_is_published_with_card_and_chart(repeated):
    for files in repeated["files"]:
        assert files == [".gitattributes", "README.md", "genotype.json", "genotype.png"]
    for words in (
        *("license: mit\n", "| this model | mit |", "## Search", "nats search --data d --output s"),
        *("- train: 5 images, 9 boxes", "| device | a GPU |"),
        *("```yaml\ndata: d\noutput: s\nmode: sampled\ngroups: 16\n```", 'genotype="hf-hub:org/s"'),
    ):
        assert words in repeated["card"]


def test_the_card_of_a_genotype_loads_it_when_pasted(repeated):
    name, genotype = repeated["model"]
    assert name == "NatsResNet"
    assert genotype["convs"] == GENOTYPE.to_dict()["convs"]


def test_what_no_longer_belongs_goes_with_the_same_commit_and_other_peoples_files_stay(repeated):
    assert sum("/commit/" in request for request in repeated["replaced"][1]) == 1
    assert repeated["replaced_files"] == [
        *(".gitattributes", "README.md", "config.json", "model.safetensors", "notes/how.md", "photo.png")
    ]


def test_a_failed_commit_leaves_nothing_and_can_be_repeated(failing):
    assert failing["failed"].startswith("NatsError: org/f: not published: ")
    assert "\n" not in failing["failed"]
    assert failing["nothing_published"] == [True, {}]
    assert "/org/f/commit/" in failing["succeeded"]
    assert failing["commits_more"] == 1


def test_a_commit_whose_answer_was_lost_is_found_when_it_is_repeated(failing):
    lost, again, commits = failing["lost_answer"]
    assert lost.startswith("NatsError: org/f: not published: ")
    assert again.startswith("nothing changed, ")
    assert commits == 2


def test_a_tag_that_failed_is_reported_with_the_commit_and_made_later(failing):
    address = f"{failing['url']}/org/f/commit/{failing['no_tag_head']}"
    assert failing["no_tag"].startswith(f"NatsError: org/f: {address} is published, but not its tag 'v2'; run this")
    assert failing["tag_later"] == [f"nothing changed, {address}", failing["no_tag_head"]]


def test_a_push_in_between_is_not_overwritten(failing):
    assert failing["race"] == (
        "NatsError: org/f: not published: somebody pushed to main in the meantime; look at it and run this again"
    )
    assert "a.txt" in failing["race_files"]
    assert failing["race_tags"] == ["v1", "v2"]
    assert "/org/f/commit/" in failing["after_race"]


def test_metadata_that_the_hub_refuses_is_one_line_and_no_commit(failing):
    said, requests = failing["invalid"]
    assert said.startswith("NatsError: org/f: not published: ")
    assert "license is none" in said
    assert not any("/commit/" in request or request.startswith("PUT") for request in requests)


def test_a_collection_lists_what_the_asker_may_see(collection):
    code, out, _ = collection["anonymous"]
    assert code == 0
    (detector,) = json.loads(out)
    assert detector.pop("last_modified").startswith("20")
    assert detector == {
        "id": "org/detector",
        "kind": "detector",
        "network": "fasterrcnn on mobilenetv3_small_050",
        "ap": 41.25,
        "measured_on": "pets val",
        "license": "other",
        "private": False,
        "gated": True,
    }
    both = json.loads(collection["owner"][1])
    assert [entry["id"] for entry in both] == ["org/detector", "org/secret"]
    assert both[1]["private"]
    assert both[1]["kind"] == "genotype"
    assert both[1]["network"] == "resnet18"
    assert both[1]["ap"] is None


def test_a_collection_is_a_table(collection):
    code, out, _ = collection["table"]
    head, first, second = out.splitlines()
    assert code == 0
    assert head.split() == ["repository", "kind", "network", "AP", "on", "licence", "access", "modified"]
    cells = [re.split(" {2,}", line)[:-1] for line in (first, second)]
    assert cells == [
        ["org/detector", "detector", "fasterrcnn on mobilenetv3_small_050", "41.2", "pets val", "other", "gated"],
        ["org/secret", "genotype", "resnet18", "-", "-", "unknown", "private"],
    ]
    assert "owner/genotype" in collection["user"][1]


def test_an_empty_collection_a_wrong_name_and_a_refusal_are_one_line(collection):
    assert collection["empty"][:2] == [
        *(0, "org: no repository with the tag nats-zoo (private ones are seen with a token: hf auth login)\n")
    ]
    for case, words in (("slash", "expected the name of an organisation or user"), ("refused", "org: not listed: ")):
        code, out, err = collection[case]
        assert (code, out) == (2, "")
        assert words in err
        assert len(err.splitlines()) == 1


def test_the_command_publishes_with_message_and_licence(collection):
    code, out, err = collection["published"]
    assert (code, err) == (0, "")
    assert out.startswith(f"{collection['url']}/org/detector/commit/")
    assert collection["titles"][0] == "Under MIT"
    assert len(collection["titles"]) == 3
