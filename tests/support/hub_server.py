"""A Hub for tests: enough of the HTTP API of huggingface.co for its real clients, and faults.

Repositories live in memory. Every commit is a whole tree, so that a test can ask what a revision
holds; files from `LFS_BYTES` on go through LFS, as they do on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

USER, TOKEN = "tester", "hf_test_token"
LFS_BYTES = 2_000
TREES = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Commit:
    """A tree of files, as it was after one commit."""

    files: dict[str, bytes]
    parent: str | None
    message: str


@dataclass
class Repo:
    """Branches, commits, and what was uploaded."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Puts a tree onto a branch."""
        parent = self.branches.get(branch)
        tree = sorted((name, git_oid(content)) for name, content in files.items())
        text = f"{branch}{parent}{message}{len(self.commits)}{tree}"
        digest = hashlib.sha1(text.encode()).hexdigest()  # never that of another content
        self.commits[digest] = Commit(files, parent, message)
        self.branches[branch] = digest
        return digest

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a pull request or a commit id names."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def history(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first, without the empty one of its creation."""
        found, number = [], self.branches.get(branch)
        while number is not None:
            found.append(self.commits[number])
            number = self.commits[number].parent
        return [commit for commit in found if commit.message != "initial commit"]


@dataclass
class Fault:
    """What goes wrong with some requests.

    Attributes:
        kind: `status`, `cut` (the connection ends early), `stall`, `longer` and `shorter` (a
            body of another length than there is), `garbage` (other bytes of the right length).
        pattern: of the method and path.
        times: how often; every time if negative.
        status: for `status`.
        seconds: for `stall`.
    """

    kind: str
    pattern: str = ""
    times: int = 1
    status: int = 500
    seconds: float = 1.0
    seen: int = 0

    def strikes(self, request: str) -> bool:
        """Whether this request is struck."""
        if not re.search(self.pattern, request) or 0 <= self.times <= self.seen:
            return False
        self.seen += 1
        return True


class Hub:
    """The state of the server."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()

    def repo(self, name: str, kind: str = "model") -> Repo:
        """A repository that must exist."""
        return self.repos[kind, name]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a revision."""
        repo = self.repo(name, kind)
        number = repo.find(revision)
        assert number is not None
        return repo.commits[number].files

    def create(self, name: str, kind: str = "model", private: bool = False) -> Repo:
        """A new repository with an empty first commit."""
        repo = self.repos[kind, name] = Repo(private)
        repo.commit("main", {".gitattributes": b""}, "initial commit")
        return repo

    def reset(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.__dict__.update({k: v for k, v in Hub().__dict__.items() if k != "lock"})


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlparse(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, request = unquote(url.path), f"{self.command} {url.path}"
        self.fault = None
        with self.hub.lock:
            self.hub.requests.append(request)
            self.fault = next((f for f in self.hub.faults if f.strikes(request)), None)
        if self.fault is not None and self.fault.kind == "stall":
            time.sleep(self.fault.seconds)
        if self.fault is not None and self.fault.kind == "status":
            self._json({"error": f"planted {self.fault.status}"}, self.fault.status)
            return
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split("|"):
                with self.hub.lock:
                    answer = handle(self, **found.groupdict())
                self._send(*answer)
                return
        self._json({"error": f"no route for {request}"}, 404)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = self.fault.kind if self.fault is not None else ""
        length = len(body)
        if kind == "garbage":
            body = bytes(byte ^ 0x5A for byte in body)
        if kind == "longer":
            body += b"\0" * 7
        if kind in ("shorter", "cut"):
            body = body[: len(body) // 2]
        declared = len(body) if kind in ("longer", "shorter") else length
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(declared))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if kind in ("cut", "shorter"):
            self.close_connection = True


Answer = tuple[bytes, int, dict[str, str]]


def ok(value: Any, status: int = 200) -> Answer:
    return json.dumps(value).encode(), status, {"Content-Type": "application/json"}


def missing(code: str, status: int = 404) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": code}
    return b"{}", status, headers | {"Content-Type": "application/json"}


def whoami(request: Handler) -> Answer:
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        return ok({"error": "Invalid credentials"}, 401)
    return ok({"name": USER, "type": "user", "orgs": [{"name": "org"}]})


def may_write(request: Handler) -> bool:
    return request.headers.get("Authorization") == f"Bearer {TOKEN}"


def may_read(request: Handler, repo: Repo | None) -> bool:
    return repo is not None and (not repo.private or may_write(request))


def create_repo(request: Handler) -> Answer:
    wanted = json.loads(request.body)
    if not may_write(request):
        return ok({"error": "Unauthorized"}, 401)
    kind = wanted.get("type") or "model"
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    url = f"{endpoint(request)}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in request.hub.repos:
        return ok({"url": url, "error": "You already created this repo"}, 409)
    request.hub.create(name, kind, bool(wanted.get("private") or wanted.get("visibility")))
    return ok({"url": url, "name": name, "id": name})


def validate_yaml(request: Handler) -> Answer:
    return ok({"errors": [], "warnings": []})


def repo_of(request: Handler, tree: str, name: str) -> Repo | None:
    return request.hub.repos.get((TREES[tree], name))


def preupload(request: Handler, tree: str, name: str, revision: str) -> Answer:
    repo = repo_of(request, tree, name)
    if repo is None or not may_write(request):
        return missing("RepoNotFound")
    if repo.find(revision) is None and "create_pr" not in request.query:
        return missing("RevisionNotFound")
    number = repo.find(revision)
    files = repo.commits[number].files if number else {}
    answers = []
    for entry in json.loads(request.body)["files"]:
        old = files.get(entry["path"])
        answer = {"path": entry["path"], "shouldIgnore": False}
        answer["uploadMode"] = "lfs" if entry["size"] >= LFS_BYTES else "regular"
        if old is not None:
            answer["oid"] = git_oid(old) if len(old) < LFS_BYTES else sha256(old)
        answers.append(answer)
    return ok({"files": answers})


def lfs_batch(request: Handler, name: str, prefix: str = "") -> Answer:
    if not may_write(request):
        return ok({"error": "Unauthorized"}, 401)
    objects = []
    for wanted in json.loads(request.body)["objects"]:
        answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in request.hub.objects:
            href = f"{endpoint(request)}/lfs/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": href}}
        objects.append(answer)
    return ok({"transfer": "basic", "objects": objects})


def lfs_put(request: Handler, oid: str) -> Answer:
    if sha256(request.body) != oid:
        return ok({"error": "wrong bytes"}, 400)
    request.hub.objects[oid] = request.body
    request.hub.uploaded.append(oid)
    return ok({})


def commit(request: Handler, tree: str, name: str, revision: str) -> Answer:
    repo = repo_of(request, tree, name)
    if repo is None or not may_write(request):
        return missing("RepoNotFound")
    head = repo.find(revision)
    if head is None:
        return missing("RevisionNotFound")
    lines = [json.loads(line) for line in request.body.decode().splitlines() if line]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit") not in (None, head):
        return ok({"error": "A commit has happened since. Please refresh and try again."}, 412)
    files = dict(repo.commits[head].files)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in request.hub.objects:
                return ok({"error": f"{value['path']} was not uploaded"}, 400)
            files[value["path"]] = request.hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            files.pop(value["path"])
        elif line["key"] == "deletedFolder":
            files = {k: v for k, v in files.items() if not k.startswith(value["path"])}
    branch, answer = revision, dict[str, Any](success=True)
    if "create_pr" in request.query:
        repo.pull_requests += 1
        branch = f"refs/pr/{repo.pull_requests}"
        repo.branches[branch] = head
        answer["pullRequestUrl"] = f"{endpoint(request)}/{name}/discussions/{repo.pull_requests}"
    number = repo.commit(branch, files, header["summary"])
    where = f"{endpoint(request)}/{'' if tree == 'models' else tree + '/'}{name}"
    return ok(answer | {"commitOid": number, "commitUrl": f"{where}/commit/{number}"})


def create_branch(request: Handler, tree: str, name: str, branch: str) -> Answer:
    repo = repo_of(request, tree, name)
    if repo is None or not may_write(request):
        return missing("RepoNotFound")
    if branch in repo.branches:
        return ok({"error": "Reference already exists"}, 409)
    repo.branches[branch] = repo.branches["main"]
    return ok({})


def info(request: Handler, tree: str, name: str, revision: str = "main") -> Answer:
    repo = repo_of(request, tree, name)
    if repo is None or not may_read(request, repo):
        return missing("RepoNotFound")
    number = repo.find(revision)
    if number is None:
        return missing("RevisionNotFound")
    files = sorted(repo.commits[number].files.items())
    siblings = [{"rfilename": path, "size": len(content)} for path, content in files]
    facts = {"_id": "1", "id": name, "modelId": name, "sha": number, "siblings": siblings}
    return ok(facts | {"private": repo.private, "tags": [], "downloads": 0, "likes": 0})


def listing(
    request: Handler, tree: str, name: str, revision: str, path: str | None = None
) -> Answer:
    repo = repo_of(request, tree, name)
    if repo is None or not may_read(request, repo):
        return missing("RepoNotFound")
    number = repo.find(revision)
    if number is None:
        return missing("RevisionNotFound")
    inside = (path or "").strip("/")
    files = repo.commits[number].files
    found = {k: v for k, v in files.items() if not inside or k.startswith(inside + "/")}
    if inside and not found:
        return missing("EntryNotFound")
    return ok([entry_of(name, content) for name, content in sorted(found.items())])


def paths_info(request: Handler, tree: str, name: str, revision: str) -> Answer:
    repo = repo_of(request, tree, name)
    number = repo.find(revision) if repo else None
    if repo is None or number is None:
        return missing("RevisionNotFound" if repo else "RepoNotFound")
    text = request.body.decode()
    wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
    files = repo.commits[number].files
    return ok([entry_of(path, files[path]) for path in wanted if path in files])


def refs(request: Handler, tree: str, name: str) -> Answer:
    repo = repo_of(request, tree, name)
    if repo is None or not may_read(request, repo):
        return missing("RepoNotFound")
    branches = [
        {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": number}
        for branch, number in repo.branches.items()
        if not branch.startswith("refs/")
    ]
    return ok({"branches": branches, "converts": [], "tags": []})


def resolve(
    request: Handler, name: str, revision: str, path: str, tree: str | None = None
) -> Answer:
    repo = repo_of(request, (tree or "models/").strip("/"), name)
    if repo is None or not may_read(request, repo):
        return missing("RepoNotFound", 401)
    number = repo.find(revision)
    if number is None:
        return missing("RevisionNotFound")
    content = repo.commits[number].files.get(path)
    headers = {"X-Repo-Commit": number}
    if content is None:
        body, status, more = missing("EntryNotFound")
        return body, status, more | headers
    is_large = len(content) >= LFS_BYTES
    headers |= {"ETag": f'"{sha256(content) if is_large else git_oid(content)}"'}
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if is_large:
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"]}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked and request.command == "GET":
        start = int(asked[1])
        stop = int(asked[2]) + 1 if asked[2] else len(content)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return content[start:stop], 206, headers
    return content, 200, headers


def entry_of(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = git_oid(content)
    if len(content) >= LFS_BYTES:
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def endpoint(request: Handler) -> str:
    return f"http://{request.headers['Host']}"


_REPO = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<tree>models|datasets|spaces)/{_REPO}"
_REV = r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", rf"{_API}/preupload/{_REV}", preupload),
    ("POST", rf"{_API}/commit/{_REV}", commit),
    ("POST", rf"{_API}/branch/(?P<branch>.+)", create_branch),
    ("POST", rf"{_API}/paths-info/{_REV}", paths_info),
    ("GET", rf"{_API}/tree/{_REV}(?P<path>/.*)?", listing),
    ("GET", rf"{_API}/refs", refs),
    ("GET", rf"{_API}/revision/{_REV}", info),
    ("GET", _API, info),
    ("POST", rf"/(?P<prefix>datasets/|spaces/)?{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("GET|HEAD", rf"/(?P<tree>datasets/|spaces/)?{_REPO}/resolve/{_REV}/(?P<path>.+)", resolve),
]  # fmt: skip


@contextmanager
def running(port: int = 0) -> Iterator[tuple[Hub, str]]:
    """Serves a Hub; gives its state and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
