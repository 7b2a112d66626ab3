"""A stand-in for the Hugging Face hub: as much of its HTTP interface as pushing and loading models takes.

Repositories are in memory, and large files go the way of LFS. What is kept is only ever what a commit named.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
_LARGE = (".safetensors", ".data", ".onnx")


@dataclass
class Repository:
    """Files as they are after each commit."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"


@dataclass
class Hub:
    """What the server holds, and how it answers."""

    url: str = ""
    role: str = "write"
    """Of the token."""
    fails: bool = False
    """Commits are answered by an error, as by a hub with no room left."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        parts = self._parts()
        if parts == ["api", "whoami-v2"]:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer({"error": "Invalid credentials"}, 401)
            role = {"accessToken": {"displayName": "test", "role": self.hub.role}}
            return self._answer({"type": "user", "name": "owner", "orgs": [{"name": "team"}], "auth": role})
        if parts[:2] == ["api", "models"] and (repository := self._repository("/".join(parts[2:4]))):
            if parts[4:5] == ["tree"]:
                return self._answer([self._entry(path, content) for path, content in repository.files.items()])
            siblings = [{"rfilename": path} for path in repository.files]
            return self._answer(
                {
                    "id": "/".join(parts[2:4]),
                    "sha": repository.sha,
                    "siblings": siblings,
                    "private": repository.private,
                }
            )
        if "resolve" in parts and (repository := self._repository("/".join(parts[: parts.index("resolve")]))):
            path = "/".join(parts[parts.index("resolve") + 2 :])
            if path in repository.files:
                return self._file(repository, path)
            return self._answer({}, 404, {"X-Error-Code": "EntryNotFound"})
        return None

    do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

    def do_POST(self) -> None:
        parts, body = self._parts(), self._body()
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
            made = {"url": f"{self.hub.url}/{name}"}
            if name in self.hub.repositories:
                return self._answer(made, 409)
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
            return self._answer(made)
        if parts == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                wanted | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self._answer({"objects": objects, "transfer": "basic"})
        repository = self._repository("/".join(parts[2:4]))
        if repository is None:
            return None
        if parts[4] == "preupload":
            return self._answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        if self.hub.fails:
            return self._answer({"error": "Storage limit reached"}, 403)
        repository.commits.append(self._committed(dict(repository.files), body))
        url = f"{self.hub.url}/{'/'.join(parts[2:4])}/commit/{repository.sha}"
        return self._answer({"commitUrl": url, "commitOid": repository.sha, "success": True})

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self._parts()[1]
        self.hub.objects[self._parts()[1]] = content
        self._answer({})

    def _committed(self, files: dict[str, bytes], body: bytes) -> dict[str, bytes]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return files

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
        return entry | ({"lfs": large} if path.endswith(_LARGE) else {})

    def _file(self, repository: Repository, path: str) -> None:
        content = repository.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _repository(self, name: str) -> Repository | None:
        """That of the name; None, and the request is answered, when there is none that may be seen."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
