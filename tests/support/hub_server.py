"""A Hugging Face Hub for model repositories on the loopback interface, for the tests.

It speaks as much of the Hub's HTTP protocol as the unmodified `huggingface_hub` client and timm use to publish and to
pull, and moves large files by plain HTTP (LFS) or by Xet, as its client prefers. In the test's own process:

    with HubServer() as hub:
        subprocess.run([...], env=hub.client_environment(home))

As a process of its own, which a test can end to be offline (closing a server in a thread does not stop the threads
that serve connections which are already open):

    with HubProcess(root) as hub:
        ...

or by hand, `python -m tests.support.hub_server --root DIR`, which prints its port on one line.

Both can be told to misbehave, and what they were asked:

    hub.inject(Fault(path="/resolve/.*safetensors", status=429, headers={"Retry-After": "1"}, times=2))
    hub.behave(error_codes=False, redirects="relative", xet=True)
    hub.requests()
"""

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.support import xet

ROOT = Path(__file__).resolve().parents[2]

OWNER_TOKEN = "hf_owner"
STRANGER_TOKEN = "hf_stranger"
# What a token's bearer may write: the bearer's own namespace, then organisations.
TOKENS = {OWNER_TOKEN: ("owner", "org", "timm"), STRANGER_TOKEN: ("stranger",)}

LFS_MIN_BYTES = 10_000_000

XET_PATHS = ("/v1/", "/v2/", "/xet/")
CONTROL = "/_control"  # where a test reads the log of requests, and says what shall go wrong


class HubError(Exception):
    """A request that is answered with an error status.

    Args:
        status: HTTP status.
        code: Value of `X-Error-Code`, by which the client tells the kinds of 404 apart.
        message: Text for a person.
        headers: Further headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.reply = Reply.json(
            {"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        )


@dataclass(frozen=True)
class Reply:
    """One HTTP answer."""

    status: int
    body: bytes
    headers: dict[str, str]

    @classmethod
    def json(cls, value, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> "Reply":
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class Fault:
    """What goes wrong with some requests.

    Attributes:
        path: regular expression, searched in the request's path.
        methods: of the requests, with spaces in between.
        times: how many requests it hits; None: all.
        status: answered instead of the right answer; None: the right one.
        headers: of the answer, beside or instead of its own.
        body: answered instead of the right one, as text.
        delay: seconds before the answer begins.
        cut: after so many bytes of the body the connection is closed.
        stall: after so many bytes of the body nothing comes for `stall_seconds`.
        damage: the last byte of the body is another one.
        done_first: with a status: the request is carried out all the same, as when only its answer was lost.
    """

    path: str = ""
    methods: str = "GET HEAD POST PUT"
    times: int | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    delay: float = 0.0
    cut: int | None = None
    stall: int | None = None
    stall_seconds: float = 60.0
    damage: bool = False
    done_first: bool = False

    def hits(self, method: str, path: str) -> bool:
        return self.times != 0 and method in self.methods.split() and re.search(self.path, path) is not None

    def change(self, reply: Reply) -> Reply:
        body = reply.body if self.body is None else self.body.encode()
        if self.damage and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        return Reply(self.status or reply.status, body, {**reply.headers, **self.headers})


@dataclass
class Behaviour:
    """In what Hubs differ, and all are right.

    Attributes:
        error_codes: errors say their kind in `X-Error-Code`.
        redirects: `resolve` answers with a redirect to another path of the same host: "absolute", "relative" or None.
        xet: large files go by Xet to and from clients that want it so, as with today's Hub; else only by plain HTTP.
        gated: repositories of which anybody sees the metadata but only some users read the files, and which users.
    """

    error_codes: bool = True
    redirects: str | None = None
    xet: bool = False
    gated: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class File:
    """A file of one commit. `oid` is git's name for the blob (of the pointer, if the file is in LFS)."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict:
        """The entry of `path` in a tree listing."""
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.lfs:
            pointer = lfs_pointer(self.sha256, self.size)
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
            entry["xetHash"] = xet.file_hash(self.sha256)
        return entry


@dataclass(frozen=True)
class Commit:
    """A commit: its parent and all files, by path."""

    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, File]

    @property
    def oid(self) -> str:
        tree = {path: file.oid for path, file in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([self.parent, self.title, self.message, tree]).encode()).hexdigest()


@dataclass
class Repo:
    """A model repository. Branches and tags map names to the ids of commits."""

    id: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict) -> "Repo":
        commits = {
            oid: Commit(**{**commit, "files": {path: File(**file) for path, file in commit["files"].items()}})
            for oid, commit in values.pop("commits").items()
        }
        return cls(**values, commits=commits)

    def resolve(self, revision: str) -> str:
        """The commit id of a branch, a tag or a commit id."""
        refs = self.tags | self.branches
        oid = refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def add_commit(self, branch: str, title: str, message: str, files: dict[str, File]) -> str:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(self.branches.get(branch), title, message, now, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid


def git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def upload_mode(file: Mapping) -> str:
    """How the Hub stores a file, from its size and its first bytes: binary and large files go to LFS."""
    sample = base64.b64decode(file["sample"])
    return "lfs" if b"\0" in sample or file["size"] >= LFS_MIN_BYTES else "regular"


class Store:
    """Repositories, their files' contents and what was uploaded by Xet, in a folder.

    `repos/NAMESPACE/NAME.json`, `objects/SHA256` and `xorbs/HASH`.
    """

    def __init__(self, root: Path):
        self.lock = threading.RLock()
        self._objects = root / "objects"
        self._repos = root / "repos"
        self.xorbs = root / "xorbs"
        for folder in (self._objects, self.xorbs):
            folder.mkdir(parents=True, exist_ok=True)
        self.repos = {repo.id: repo for repo in map(self._load, sorted(self._repos.glob("*/*.json")))}

    @staticmethod
    def _load(path: Path) -> Repo:
        return Repo.from_dict(json.loads(path.read_text()))

    def _path(self, repo_id: str) -> Path:
        return self._repos / f"{repo_id}.json"

    def save(self, repo: Repo) -> None:
        path = self._path(repo.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(repo)))
        self.repos[repo.id] = repo

    def has(self, sha256: str) -> bool:
        return (self._objects / sha256).is_file()

    def read(self, sha256: str) -> bytes:
        return (self._objects / sha256).read_bytes()

    def write(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        (self._objects / sha256).write_bytes(content)
        return sha256

    def find_xet(self, name: str) -> bytes:
        """The content of what Xet calls `name`."""
        for path in self._objects.iterdir():
            if xet.file_hash(path.name) == name:
                return path.read_bytes()
        raise HubError(HTTPStatus.NOT_FOUND, "", f"no such file: {name}")

    def add_file(self, content: bytes) -> File:
        return File(self.write(content), len(content), git_blob_oid(content), lfs=False)

    def lfs_file(self, sha256: str) -> File:
        """The entry of a file that has been uploaded to LFS before."""
        if not self.has(sha256):
            raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", f"LFS object {sha256} was not uploaded")
        size = len(self.read(sha256))
        return File(sha256, size, git_blob_oid(lfs_pointer(sha256, size)), lfs=True)

    def create_repo(self, repo_id: str, private: bool) -> Repo:
        repo = Repo(repo_id, private)
        attributes = self.add_file(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo.add_commit("main", "initial commit", "", {".gitattributes": attributes})
        self.save(repo)
        return repo

    def apply(self, files: dict[str, File], operations: list[dict]) -> dict[str, File]:
        """The files after the operations of one commit (the lines of its body after the header)."""
        files = dict(files)
        for operation in operations:
            path = operation["value"]["path"]
            match operation["key"]:
                case "file":
                    files[path] = self.add_file(base64.b64decode(operation["value"]["content"]))
                case "lfsFile":
                    files[path] = self.lfs_file(operation["value"]["oid"])
                case "deletedFile":
                    if files.pop(path, None) is None:
                        raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", "A file with this name doesn't exist")
                case "deletedFolder":
                    files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
        return files


def tree_entries(files: Mapping[str, File]) -> dict[str, dict]:
    """The listing of all files and of the folders that hold them, by path."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    entries = {
        path: {"type": "directory", "path": path, "size": 0, "oid": git_blob_oid(path.encode())} for path in folders
    }
    entries |= {path: file.describe(path) for path, file in files.items()}
    return dict(sorted(entries.items()))


PLACEHOLDERS = {"repo": "[^/]+/[^/]+", "rev": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}"}
ROUTES: list[tuple[set[str], re.Pattern, Callable]] = []


def route(methods: str, template: str) -> Callable:
    """Register a handler's method for requests whose path matches the template."""
    pattern = re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{PLACEHOLDERS[match[1]]})", template)

    def register(function: Callable) -> Callable:
        ROUTES.append((set(methods.split()), re.compile(pattern), function))
        return function

    return register


class HubHandler(BaseHTTPRequestHandler):
    """Answers requests. A route's method gets the named parts of the path and returns a `Reply`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every POST of the client waits 40 ms for an acknowledgement
    server: "HubHTTPServer"

    def handle_request(self) -> None:
        self.body = self._read_body()
        if self.path == CONTROL:
            self._send(self._control())
            return
        self.store = self.server.store
        fault = self.server.faults.draw(self.command, urlsplit(self.path).path)
        self.server.log.append([self.command, unquote(self.path), self.headers.get("Range")])
        if fault is None:
            self._send(self._reply())
            return
        time.sleep(fault.delay)
        carried_out = fault.status is None or fault.done_first
        self._send(fault.change(self._reply() if carried_out else Reply(fault.status, b"{}", {})), fault)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _reply(self) -> Reply:
        try:
            self.user, self.namespaces = self._authenticate()
            with self.store.lock:
                return self._dispatch()
        except HubError as error:
            if not self.server.behaviour.error_codes:
                error.reply.headers.pop("X-Error-Code")
            return error.reply

    def _control(self) -> Reply:
        """A test's own request: what shall go wrong, how to behave; answers with the log of requests."""
        request = json.loads(self.body or b"{}")
        if "faults" in request:
            self.server.faults.set([Fault(**fault) for fault in request["faults"]])
        for name, value in request.get("behaviour", {}).items():
            setattr(self.server.behaviour, name, value)
        log = list(self.server.log)
        if request.get("forget"):
            self.server.log.clear()
        return Reply.json(log)

    def _dispatch(self) -> Reply:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for methods, pattern, function in ROUTES:
            match = pattern.fullmatch(url.path)
            if match and self.command in methods:
                return function(self, **{key: value and unquote(value) for key, value in match.groupdict().items()})
        raise HubError(HTTPStatus.NOT_FOUND, "NotFound", f"no such endpoint: {self.command} {url.path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, reply: Reply, fault: Fault | None = None) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):  # a client that gave up, or was killed
            self._send_body(reply.body, fault)

    def _send_body(self, body: bytes, fault: Fault | None) -> None:
        if fault is not None and fault.stall is not None and fault.stall < len(body):
            self.wfile.write(body[: fault.stall])
            self.wfile.flush()
            time.sleep(fault.stall_seconds)
            body = body[fault.stall :]
        if fault is not None and fault.cut is not None and fault.cut < len(body):
            body, self.close_connection = body[: fault.cut], True
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        """Requests are not logged: the client's process shares the terminal."""

    # Who asks, and for what

    def _authenticate(self) -> tuple[str | None, tuple[str, ...]]:
        header = self.headers.get("Authorization")
        if header is None or self.path.startswith(XET_PATHS):  # the token for Xet's storage is no user's
            return None, ()
        namespaces = self.server.tokens.get(header.removeprefix("Bearer "))
        if namespaces is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header")
        return namespaces[0], namespaces

    def _require_writer(self, namespace: str) -> None:
        if self.user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        if namespace not in self.namespaces:
            raise HubError(HTTPStatus.FORBIDDEN, "", f"You don't have the rights to write to {namespace}")

    def _readable(self, repo_id: str) -> Repo:
        repo = self.store.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.partition("/")[0] not in self.namespaces):
            # The Hub does not tell a missing repository from one that the asker may not see.
            status = HTTPStatus.UNAUTHORIZED if self.user is None else HTTPStatus.NOT_FOUND
            raise HubError(status, "RepoNotFound", "Repository not found")
        return repo

    def _writable(self, repo_id: str) -> Repo:
        repo = self._readable(repo_id)
        self._require_writer(repo_id.partition("/")[0])
        return repo

    def _branch_files(self, repo: Repo, branch: str) -> dict[str, File]:
        if branch not in repo.branches:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {branch}")
        return repo.commits[repo.branches[branch]].files

    def _check_access(self, repo: Repo) -> None:
        """The files of a gated repository are for those who were let in; its metadata are for all."""
        if self.user not in self.server.behaviour.gated.get(repo.id, [self.user]):
            status = HTTPStatus.UNAUTHORIZED if self.user is None else HTTPStatus.FORBIDDEN
            raise HubError(status, "GatedRepo", f"Access to model {repo.id} is restricted.")

    @property
    def _url(self) -> str:
        return f"http://{self.headers['Host']}"

    # Account and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Reply:
        if self.user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        organisations = [{"name": name} for name in self.namespaces[1:]]
        return Reply.json({"type": "user", "name": self.user, "orgs": organisations, "auth": {"type": "access_token"}})

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Reply:
        request = json.loads(self.body)
        namespace = request["organization"] or self.user
        repo_id = f"{namespace}/{request['name']}"
        self._require_writer(namespace)
        url = {"url": f"{self._url}/{repo_id}"}
        if repo_id in self.store.repos:
            return Reply.json({**url, "error": "You already created this model repo"}, HTTPStatus.CONFLICT)
        private = request.get("visibility") == "private" or bool(request.get("private"))  # new clients, old ones
        self.store.create_repo(repo_id, private=private)
        return Reply.json(url)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Reply:
        return Reply.json({"errors": [], "warnings": []})

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")
    def model_info(self, repo: str, rev: str | None) -> Reply:
        model = self._readable(repo)
        oid = model.resolve(rev or "main")
        siblings = [
            {"rfilename": path, "size": file.size, "blobId": file.oid}
            | ({"lfs": {**file.describe(path)["lfs"], "sha256": file.sha256}} if file.lfs else {})
            for path, file in model.commits[oid].files.items()
        ]
        info = {"id": repo, "modelId": repo, "sha": oid, "private": model.private, "siblings": siblings}
        info["gated"] = "auto" if repo in self.server.behaviour.gated else False
        return Reply.json({**info, "lastModified": model.commits[oid].date, "tags": [], "downloads": 0, "likes": 0})

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?")
    def tree(self, repo: str, rev: str, path: str | None) -> Reply:
        model = self._readable(repo)
        entries = self._entries(model, rev)
        if path is not None and path not in entries:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{path} does not exist on {rev}")
        folder = PurePosixPath(path or ".")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        return Reply.json(
            [
                entry
                for name, entry in entries.items()
                if PurePosixPath(name).parent == folder or (recursive and folder in PurePosixPath(name).parents)
            ]
        )

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def paths_info(self, repo: str, rev: str) -> Reply:
        model = self._readable(repo)
        entries = self._entries(model, rev)
        return Reply.json([entries[path] for path in parse_qs(self.body.decode())["paths"] if path in entries])

    def _entries(self, model: Repo, rev: str) -> dict[str, dict]:
        entries = tree_entries(model.commits[model.resolve(rev)].files)
        hidden = () if self.server.behaviour.xet else ("xetHash",)
        return {path: {k: v for k, v in entry.items() if k not in hidden} for path, entry in entries.items()}

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def commits(self, repo: str, rev: str) -> Reply:
        model = self._readable(repo)
        history, oid = [], model.resolve(rev)
        while oid is not None:
            commit = model.commits[oid]
            history.append(
                {"id": oid, "authors": [], "date": commit.date, "title": commit.title, "message": commit.message}
            )
            oid = commit.parent
        return Reply.json(history)

    # Branches and tags

    @route("GET", "/api/models/{repo}/refs")
    def refs(self, repo: str) -> Reply:
        model = self._readable(repo)

        def listing(kind: str, refs: dict[str, str]) -> list[dict]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        branches, tags = listing("heads", model.branches), listing("tags", model.tags)
        return Reply.json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("POST", "/api/models/{repo}/tag/{rev}")
    def create_tag(self, repo: str, rev: str) -> Reply:
        model = self._writable(repo)
        return self._create_ref(model, model.tags, json.loads(self.body)["tag"], rev)

    @route("POST", "/api/models/{repo}/branch/{rev}")
    def create_branch(self, repo: str, rev: str) -> Reply:
        model = self._writable(repo)
        return self._create_ref(model, model.branches, rev, json.loads(self.body).get("startingPoint", "main"))

    def _create_ref(self, repo: Repo, refs: dict[str, str], name: str, revision: str) -> Reply:
        if name in refs:
            raise HubError(HTTPStatus.CONFLICT, "", f"Reference {name} already exists")
        refs[name] = repo.resolve(revision)
        self.store.save(repo)
        return Reply.json({})

    # Publishing

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo: str, rev: str) -> Reply:
        present = self._branch_files(self._writable(repo), rev)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": upload_mode(file), "shouldIgnore": False}
            files.append(answer | ({"oid": present[path].etag} if path in present else {}))
        return Reply.json({"files": files})

    @route("POST", "/{repo}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> Reply:
        self._writable(repo)
        objects = []
        for requested in json.loads(self.body)["objects"]:
            answer = {"oid": requested["oid"], "size": requested["size"]}
            if not self.store.has(requested["oid"]):
                href = f"{self._url}/{repo}.git/lfs/{requested['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return Reply.json({"transfer": "basic", "objects": objects})

    @route("PUT", "/{repo}\\.git/lfs/{oid}")
    def lfs_upload(self, repo: str, oid: str) -> Reply:
        # No authorisation: as with the Hub's storage, the address that the batch handed out is the permission.
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", f"the uploaded bytes are not those of {oid}")
        self.store.write(self.body)
        return Reply.json({})

    @route("POST", "/{repo}\\.git/lfs/{oid}/verify")
    def lfs_verify(self, repo: str, oid: str) -> Reply:
        self._writable(repo)
        if self.store.lfs_file(oid).size != json.loads(self.body)["size"]:
            raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", f"{oid} has another size")
        return Reply.json({})

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def commit(self, repo: str, rev: str) -> Reply:
        model = self._writable(repo)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        expected = header["value"].get("parentCommit")
        if expected is not None and expected != model.branches.get(rev):
            raise HubError(HTTPStatus.PRECONDITION_FAILED, "", "A commit has happened since. Please refresh.")
        files = self.store.apply(self._branch_files(model, rev), operations)
        oid = model.add_commit(rev, header["value"]["summary"], header["value"]["description"], files)
        self.store.save(model)
        return Reply.json({"success": True, "commitOid": oid, "commitUrl": f"{self._url}/{repo}/commit/{oid}"})

    # Pulling

    @route("GET HEAD", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, repo: str, rev: str, path: str) -> Reply:
        model = self._readable(repo)
        self._check_access(model)
        oid = model.resolve(rev)
        headers = {"X-Repo-Commit": oid}
        redirects = self.server.behaviour.redirects
        if redirects is not None:
            host = self._url if redirects == "absolute" else ""
            location = f"{host}/api/resolve-cache/models/{repo}/{oid}/{quote(path)}"
            return Reply(HTTPStatus.TEMPORARY_REDIRECT, b"", {**headers, "Location": location})
        return self._file(model, oid, path)

    @route("GET HEAD", "/api/resolve-cache/models/{repo}/{rev}/{path}")
    def resolved(self, repo: str, rev: str, path: str) -> Reply:
        """Where `resolve` may redirect to."""
        model = self._readable(repo)
        self._check_access(model)
        return self._file(model, model.resolve(rev), path)

    def _file(self, model: Repo, oid: str, path: str) -> Reply:
        headers = {"X-Repo-Commit": oid}
        file = model.commits[oid].files.get(path)
        if file is None:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.lfs and self.server.behaviour.xet:
            refresh = f"{self._url}/api/models/{model.id}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": xet.file_hash(file.sha256), "X-Xet-Refresh-Route": refresh}
        return self._content(self.store.read(file.sha256), headers)

    def _range(self, size: int) -> tuple[int, int] | None:
        """The first and the last byte that are asked for of so many; None: all."""
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested is None:
            return None
        first, last = int(requested[1]), min(int(requested[2] or size), size - 1)
        if first > last:
            unsatisfied = {"Content-Range": f"bytes */{size}"}
            raise HubError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "", "range beyond the end", unsatisfied)
        return first, last

    def _content(self, content: bytes, headers: dict[str, str]) -> Reply:
        requested = self._range(len(content))
        if requested is None:
            return Reply(HTTPStatus.OK, content, headers)
        first, last = requested
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return Reply(HTTPStatus.PARTIAL_CONTENT, content[first : last + 1], headers)

    # Xet

    @route("GET", "/api/models/{repo}/xet-(?P<access>read|write)-token/{rev}")
    def xet_token(self, repo: str, access: str, rev: str) -> Reply:
        model = self._readable(repo) if access == "read" else self._writable(repo)
        self._check_access(model)
        if not self.server.behaviour.xet:
            raise HubError(HTTPStatus.NOT_FOUND, "", "no Xet here")
        found = {"casUrl": self._url, "accessToken": f"xet_{access}", "exp": int(time.time()) + 3600}
        names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
        return Reply.json(found, headers={names[key]: str(value) for key, value in found.items()})

    @route("POST", "/v1/xorbs/[^/]+/{oid}")
    def upload_xorb(self, oid: str) -> Reply:
        is_new = not (self.store.xorbs / oid).exists()
        (self.store.xorbs / oid).write_bytes(self.body)
        return Reply.json({"was_inserted": is_new})

    @route("POST", "/v1/shards")
    def upload_shard(self) -> Reply:
        for sha256, segments in xet.read_shard(self.body):
            content = xet.assemble(segments, lambda xorb: (self.store.xorbs / xorb).read_bytes())
            if self.store.write(content) != sha256:
                raise HubError(HTTPStatus.BAD_REQUEST, "BadRequest", f"the uploaded bytes are not those of {sha256}")
        return Reply.json({"result": 1})

    @route("GET", "/v1/reconstructions/{oid}")
    def reconstruct(self, oid: str) -> Reply:
        size = len(self.store.find_xet(oid))
        first, last = self._range(size) or (0, size - 1)
        return Reply.json(xet.reconstruction(oid, f"{self._url}/xet/xorbs/{oid}", size, first, last))

    @route("GET", "/xet/xorbs/{oid}")
    def download_xorb(self, oid: str) -> Reply:
        return self._content(xet.pack(self.store.find_xet(oid)), {"Content-Type": "application/octet-stream"})

    # Listing

    @route("GET", "/api/models")
    def list_models(self) -> Reply:
        """Those that the asker may see; of an author, and with tags in the metadata of their README.md."""
        authors, wanted = self.query.get("author"), set(self.query.get("filter", []))
        found = []
        for repo_id, model in sorted(self.store.repos.items()):
            namespace = repo_id.partition("/")[0]
            if (authors and namespace not in authors) or (model.private and namespace not in self.namespaces):
                continue
            card = self._card_metadata(model)
            if wanted <= set(card.get("tags", [])):
                info = json.loads(self.model_info(repo_id, None).body)
                found.append(info | {"tags": card.get("tags", []), "cardData": card})
        return Reply.json(found)

    def _card_metadata(self, model: Repo) -> dict:
        readme = model.commits[model.branches["main"]].files.get("README.md")
        head = re.match(r"---\n(.*?)\n---\n", self.store.read(readme.sha256).decode(), re.DOTALL) if readme else None
        return yaml.safe_load(head[1]) if head else {}


class HubHTTPServer(ThreadingHTTPServer):
    """The listening socket with what its handlers share."""

    def __init__(self, root: Path, tokens: Mapping[str, tuple[str, ...]]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.store = Store(root)
        self.tokens = tokens
        self.faults = Faults()
        self.behaviour = Behaviour()
        self.log: list[list] = []


class Faults:
    """The faults that are in force; each request meets the first that hits it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def set(self, faults: Sequence[Fault]) -> None:
        with self._lock:
            self._faults = list(faults)

    def draw(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.hits(method, path):
                    if fault.times is not None:
                        self._faults[index] = replace(fault, times=fault.times - 1)
                    return fault
        return None


class Controls:
    """What a test may tell a running Hub; of classes that have its `url`."""

    url: str

    def inject(self, *faults: Fault) -> None:
        """Let these faults, and no others, happen from now on."""
        self._control(faults=[asdict(fault) for fault in faults])

    def behave(self, **behaviour) -> None:
        """Set attributes of `Behaviour`."""
        self._control(behaviour=behaviour)

    def requests(self, path: str = "", forget: bool = False) -> list[list]:
        """[method, path, Range] of what was asked for so far, as far as this regular expression is in the path."""
        return [entry for entry in self._control(forget=forget) if re.search(path, entry[1])]

    def _control(self, **request):
        with urllib.request.urlopen(self.url + CONTROL, json.dumps(request).encode(), timeout=10) as answer:
            return json.load(answer)


def client_environment(url: str, home: Path, token: str | None = OWNER_TOKEN, xet: bool = False) -> dict[str, str]:
    """Environment of a process whose Hub is at `url` and whose cache is in the folder `home`.

    The client reads these variables when it is imported, so they can not be set later. With the token None the
    client is anonymous. With xet the client moves large files by that protocol, as it does by default.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = inherited | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        **({} if xet else {"HF_HUB_DISABLE_XET": "1"}),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return environment if token is None else environment | {"HF_TOKEN": token}


def run_script(
    script: str, environment: Mapping[str, str], *arguments: object, timeout: float = 120, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of Python to its end in a fresh process, such as a client's, and assert that it ends well."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


class HubServer(AbstractContextManager, Controls):
    """A Hub served by a thread of this process while the context is open.

    Args:
        root: Folder of the repositories; by default one that ends with the context.
        tokens: For each token what its bearer may write: the bearer's namespace first, then organisations.
    """

    def __init__(self, root: Path | None = None, tokens: Mapping[str, tuple[str, ...]] = TOKENS):
        self._own_root = None if root else tempfile.TemporaryDirectory()
        self._server = HubHTTPServer(Path(root or self._own_root.name), tokens)
        self.store = self._server.store
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def client_environment(self, home: Path, token: str | None = OWNER_TOKEN, xet: bool = False) -> dict[str, str]:
        return client_environment(self.url, home, token, xet)

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._own_root:
            self._own_root.cleanup()


class HubProcess(AbstractContextManager, Controls):
    """A Hub in a process of its own, which `stop` ends for good: from then on its clients are offline."""

    def __init__(self, root: Path):
        command = [sys.executable, "-m", "tests.support.hub_server", "--root", str(root.resolve())]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def client_environment(self, home: Path, token: str | None = OWNER_TOKEN, xet: bool = False) -> dict[str, str]:
        return client_environment(self.url, home, token, xet)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def __exit__(self, *exception) -> None:
        self.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a loopback Hugging Face Hub; its port is printed on one line.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories")
    server = HubHTTPServer(parser.parse_args().root, TOKENS)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
