"""A Hugging Face hub of one process: the answers that its API gives of dataset repositories, over HTTP."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their hash, and branches that point at them."""

    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Put a commit with these files on a branch; its hash."""
        contents = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
        commit = hashlib.sha1(json.dumps([branch, len(self.commits), contents], sort_keys=True).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    url: str = ""
    token: str | None = None  # that opens gated repositories
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "METHOD path", and " [first-last]" of a range
    page: int = 1000  # entries of a listing that come at a time

    def repository(self, name: str, gated: bool = False) -> Repository:
        """An empty repository OWNER/NAME."""
        return self.repositories.setdefault(name, Repository(gated))


class _Refused(Exception):
    """An answer that is an error: status and the hub's code for it."""


def _entries(files: Files, below: str, recursive: bool) -> list[dict[str, Any]]:
    """The tree below a folder as the API tells it."""
    prefix = f"{below}/" if below else ""
    found: dict[str, dict[str, Any]] = {}
    for name, data in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            if depth == 1 or recursive:
                folder = prefix + "/".join(parts[:depth])
                found.setdefault(folder, {"type": "directory", "oid": hashlib.sha1(folder.encode()).hexdigest(), "path": folder})
        if len(parts) == 1 or recursive:
            found[name] = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
    return list(found.values())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {unquote(self.path)}" + (f" [{asked.removeprefix('bytes=')}]" if asked else ""))
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            if parts[:2] == ["api", "datasets"]:
                self._api("/".join(parts[2:4]), parts[4:], parse_qs(url.query), body)
            elif parts[0] == "datasets" and parts[3] == "resolve":
                self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
            else:
                raise _Refused(404, "EntryNotFound")
        except _Refused as refused:
            status, code = refused.args
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code} of the test's hub"})

    def _repository(self, name: str, to_read: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None:
            raise _Refused(401, "RepoNotFound")
        if to_read and found.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Refused(401, "GatedRepo")
        return found

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit

    def _api(self, name: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        repository = self._repository(name, to_read=rest == ["auth-check"])
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else (rest[0] if rest else "", "main")
        if verb == "auth-check":
            self._send(200, b"{}")
            return
        commit = self._commit(repository, revision)
        files = repository.commits[commit]
        if verb in ("", "revision"):
            self._json({"id": name, "sha": commit})
        elif verb == "tree":
            self._tree(files, "/".join(rest[2:]), query)
        elif verb == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            self._json([entry for entry in _entries(files, "", recursive=True) if entry["path"] in wanted])
        else:
            raise _Refused(404, "EntryNotFound")

    def _tree(self, files: Files, below: str, query: dict[str, list[str]]) -> None:
        entries = _entries(files, below, recursive=query.get("recursive", ["false"])[0].lower() == "true")
        if below and not entries:
            raise _Refused(404, "EntryNotFound")
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.hub.page
        more = {}
        if end < len(entries):
            path = self.path.partition("?")[0]
            more["Link"] = f'<{self.hub.url}{path}?recursive={query["recursive"][0]}&cursor={end}>; rel="next"'
        self._json(entries[start:end], more)

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, to_read=True)
        data = repository.commits[self._commit(repository, revision)].get(path)
        if data is None:
            raise _Refused(404, "EntryNotFound")
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, data)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or len(data)), len(data) - 1)
        self._send(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub at a port of this machine, as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
