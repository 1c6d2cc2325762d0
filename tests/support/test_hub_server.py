"""The loopback Hub against the unmodified huggingface_hub client, which runs in processes of its own."""

import http.client
import json
import random
import struct
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hub_server import OWNER_TOKEN, STRANGER_TOKEN, HubProcess, HubServer, run_script

PRELUDE = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()

def outcome(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return "done"
"""


def run_client(script: str, environment: dict[str, str], *arguments: str | Path):
    """Run a script with the client in a fresh process; what it prints is JSON."""
    return json.loads(run_script(PRELUDE + script, environment, *arguments, timeout=60).stdout)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model folder: text, binary, an empty file and a file in a subfolder."""
    path = tmp_path / "model"
    (path / "charts").mkdir(parents=True)
    (path / "config.json").write_text('{"architecture": "resnet18"}')
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Grüße\n", encoding="utf-8")
    (path / "model.safetensors").write_bytes(random.Random(0).randbytes(3_000_001))
    (path / "charts" / "genotype.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (path / "empty").touch()
    return path


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


def test_an_uploaded_folder_comes_back_bit_for_bit(hub, folder, tmp_path):
    upload = """
repo = api.create_repo("org/model", exist_ok=True).repo_id
again = api.create_repo("org/model", exist_ok=True).repo_id
first = api.upload_folder(repo_id=repo, folder_path=sys.argv[1], commit_message="first")
unchanged = api.upload_folder(repo_id=repo, folder_path=sys.argv[1])
tree = {f.path: f.lfs is not None for f in api.list_repo_tree(repo, recursive=True) if hasattr(f, "lfs")}
top = [f.path for f in api.list_repo_tree(repo)]
print(json.dumps(dict(
    user=api.whoami()["name"], repos=[repo, again], first=first.oid, unchanged=unchanged.oid, in_lfs=tree, top=top,
    titles=[commit.title for commit in api.list_repo_commits(repo)],
    info=[f.path for f in api.get_paths_info(repo, ["charts", "nothing", "README.md"])],
)))
"""
    published = run_client(upload, hub.client_environment(tmp_path / "writer"), folder)
    assert published["user"] == "owner"
    assert published["repos"] == ["org/model", "org/model"]
    assert published["unchanged"] == published["first"]
    assert published["titles"] == ["first", "initial commit"]
    assert published["in_lfs"] == {
        ".gitattributes": False,
        "README.md": False,
        "charts/genotype.png": True,
        "config.json": False,
        "empty": False,
        "model.safetensors": True,
    }
    assert published["top"] == [".gitattributes", "README.md", "charts", "config.json", "empty", "model.safetensors"]
    assert published["info"] == ["charts", "README.md"]

    pull = 'print(json.dumps(snapshot_download("org/model", ignore_patterns=[".gitattributes"])))'
    pulled = run_client(pull, hub.client_environment(tmp_path / "reader", token=None))
    assert contents(Path(pulled)) == contents(folder)
    assert Path(pulled).name == published["first"]


def test_files_go_and_come_by_xet_bit_for_bit(folder, tmp_path):
    pytest.importorskip("hf_xet")
    numbers = b"".join(struct.pack("<f", index / 7) for index in range(60_000))  # which Xet's client compresses
    (folder / "numbers.safetensors").write_bytes(numbers + bytes(100_000) + b"again and " * 20_000)
    upload = """
api.create_repo("org/xet")
print(json.dumps(api.upload_folder(repo_id="org/xet", folder_path=sys.argv[1]).oid))
"""
    pull = 'print(json.dumps(snapshot_download("org/xet", ignore_patterns=[".gitattributes"])))'
    with HubServer() as hub:
        hub.behave(xet=True)
        run_client(upload, hub.client_environment(tmp_path / "writer", xet=True), folder)
        pulled = run_client(pull, hub.client_environment(tmp_path / "reader", xet=True))
        asked = hub.requests()
    assert contents(Path(pulled)) == contents(folder)
    assert not any(method == "PUT" or ("/resolve/" in path and "safetensors" in path) for method, path, _ in asked)


def test_a_branch_a_tag_and_a_commit_name_a_revision(hub, tmp_path):
    script = """
repo = api.create_repo("org/revisions").repo_id

def push(text, **kwargs):
    return api.upload_file(repo_id=repo, path_in_repo="text", path_or_fileobj=text.encode(), **kwargs).oid

first = push("one")
api.create_tag(repo, tag="v1")
api.create_branch(repo, branch="side/branch", revision="v1")
second = push("two")
push("three", revision="side/branch")
revisions = ["main", "v1", first, second, "side/branch", None]
refs = api.list_repo_refs(repo)
print(json.dumps(dict(
    texts=[open(hf_hub_download(repo, "text", revision=revision)).read() for revision in revisions],
    snapshot=open(snapshot_download(repo, revision="v1") + "/text").read(),
    tags={tag.name: tag.target_commit == first for tag in refs.tags},
    branches=sorted(branch.name for branch in refs.branches),
    head=api.model_info(repo).sha == second,
    pinned=api.model_info(repo, revision="v1").sha == first,
    tag_again=outcome(api.create_tag, repo, tag="v1"),
)))
"""
    found = run_client(script, hub.client_environment(tmp_path))
    assert found == {
        "texts": ["two", "one", "one", "two", "three", "two"],
        "snapshot": "one",
        "tags": {"v1": True},
        "branches": ["main", "side/branch"],
        "head": True,
        "pinned": True,
        "tag_again": "HfHubHTTPError",
    }


def test_a_commit_deletes_files_and_folders(hub, folder, tmp_path):
    script = """
repo = api.create_repo("org/deletions").repo_id
api.upload_folder(repo_id=repo, folder_path=sys.argv[1])
api.delete_folder("charts", repo)
api.delete_file("empty", repo)
missing = outcome(api.delete_file, "empty", repo)
print(json.dumps([api.list_repo_files(repo), missing]))
"""
    files, missing = run_client(script, hub.client_environment(tmp_path / "home"), folder)
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert missing.removeprefix("Remote") == "EntryNotFoundError"


def test_the_kinds_of_404_are_told_apart(hub, tmp_path):
    script = """
repo = api.create_repo("org/small").repo_id
print(json.dumps([
    outcome(api.model_info, "org/nothing"),
    outcome(hf_hub_download, "org/nothing", "config.json"),
    outcome(snapshot_download, "org/nothing"),
    outcome(api.model_info, repo, revision="v9"),
    outcome(hf_hub_download, repo, "config.json", revision="v9"),
    outcome(snapshot_download, repo, revision="v9"),
    outcome(api.upload_file, repo_id=repo, path_in_repo="text", path_or_fileobj=b"x", revision="v9"),
    outcome(hf_hub_download, repo, "config.json"),
    outcome(api.create_repo, repo),
]))
"""
    found = run_client(script, hub.client_environment(tmp_path))
    assert [name.removeprefix("Remote") for name in found] == [
        *["RepositoryNotFoundError"] * 3,
        *["RevisionNotFoundError"] * 4,
        "EntryNotFoundError",
        "HfHubHTTPError",
    ]


def test_only_those_with_rights_read_a_private_repository_and_write(hub, tmp_path):
    create = 'print(json.dumps(api.create_repo("org/private", private=True).repo_id))'
    run_client(create, hub.client_environment(tmp_path / "creator"))
    script = """
print(json.dumps([
    outcome(api.model_info, "org/private"),
    outcome(api.create_repo, "org/mine"),
    outcome(api.upload_file, repo_id="org/private", path_in_repo="text", path_or_fileobj=b"x"),
]))
"""

    def outcomes(token: str | None) -> list[str]:
        return run_client(script, hub.client_environment(tmp_path / "home", token))

    assert outcomes(None) == ["RepositoryNotFoundError", "HfHubHTTPError", "RepositoryNotFoundError"]
    assert outcomes(STRANGER_TOKEN) == ["RepositoryNotFoundError", "HfHubHTTPError", "RepositoryNotFoundError"]
    assert outcomes("hf_unknown") == ["HfHubHTTPError"] * 3
    assert outcomes(OWNER_TOKEN) == ["done"] * 3


def test_an_ended_hub_leaves_the_cache_and_keeps_its_folder(folder, tmp_path):
    upload = """
api.create_repo("org/model")
print(json.dumps(api.upload_folder(repo_id="org/model", folder_path=sys.argv[1]).oid))
"""
    pull = """
result = [outcome(snapshot_download, repo) for repo in ("org/model", "org/other")]
print(json.dumps([snapshot_download("org/model") if result[0] == "done" else None, result]))
"""
    cached = tmp_path / "cached"
    with HubProcess(tmp_path / "root") as hub:
        run_client(upload, hub.client_environment(tmp_path / "writer"), folder)
        path, _ = run_client(pull, hub.client_environment(cached))
        hub.stop()
        offline_path, offline = run_client(pull, hub.client_environment(cached))
        _, uncached = run_client(pull, hub.client_environment(tmp_path / "fresh"))
    assert offline_path == path
    assert offline == ["done", "LocalEntryNotFoundError"]
    assert uncached == ["LocalEntryNotFoundError"] * 2

    with HubProcess(tmp_path / "root") as hub:
        restarted, _ = run_client(pull, hub.client_environment(tmp_path / "restarted"))
    assert contents(Path(restarted)) == contents(Path(path))


CONTENT = random.Random(1).randbytes(1000)


@pytest.fixture(scope="module")
def served_file(hub):
    """Host and path of a file with CONTENT."""
    repo = hub.store.create_repo("org/ranges", private=False)
    repo.add_commit("main", "add", "", {"file": hub.store.add_file(CONTENT)})
    return urlsplit(hub.url).netloc, "/org/ranges/resolve/main/file"


@given(first=st.integers(0, 1100), length=st.none() | st.integers(1, 1100))
def test_a_range_is_that_slice_of_the_file(served_file, first, length):
    host, path = served_file
    last = "" if length is None else first + length - 1
    connection = http.client.HTTPConnection(host)
    connection.request("GET", path, headers={"Range": f"bytes={first}-{last}"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if first >= len(CONTENT):
        assert response.status == 416
    else:
        assert response.status == 206
        assert body == CONTENT[first:][:length]
        assert response.headers["Content-Range"] == f"bytes {first}-{first + len(body) - 1}/{len(CONTENT)}"
