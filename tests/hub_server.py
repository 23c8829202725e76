"""A stand-in for the Hugging Face Hub: repositories in memory, over HTTP, for downloads and for uploads.

It counts what it sends, and can break connections in the middle of a file. Uploads go through its LFS endpoints, as the
Hub's own do. What it answers is what huggingface_hub's client asks for; no file is kept.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["Hub", "serve_hub"]

_LFS_FROM_BYTES = 1000


@dataclass(kw_only=True)
class Hub:
    """The stand-in's state.

    Attributes:
        repos: name -> file -> bytes.
        sent: file -> bytes of its contents that were sent.
        breaks: file -> how often its connection is still to break, after half of what was asked for.
        damaged: file -> how often other bytes are still to be sent.
        commits: messages, oldest first.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    breaks: Counter[str] = field(default_factory=Counter)
    damaged: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    address: str = ""

    def commit(self, repo: str) -> str:
        """The commit that a repository is at: a hash of what is in it."""
        files = sorted(self.repos[repo].items())
        return hashlib.sha1(b"".join(name.encode() + data for name, data in files)).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub on a free port while the block runs."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._file(with_body=False)

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repo = "/".join(parts[2:4])
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            files = self.state.repos[repo]
            self._answer([{"type": "file", "path": name, "size": len(data), "oid": ""} for name, data in files.items()])
        elif parts[:2] == ["api", "models"]:
            self._info(repo)
        else:
            self._file(with_body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization") or "me", asked["name"]) if part)
            self.state.repos.setdefault(name, {})
            self._answer({"url": f"{self.state.address}/{name}", "name": name})
        elif path == "api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self._answer({"files": [self._upload_mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer(self._batch(json.loads(body)), kind="application/vnd.git-lfs+json")
        elif "/commit/" in path:
            self._commit(repo, body)
        else:
            self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.state.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer({})

    def _upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] >= _LFS_FROM_BYTES else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.state.address}/upload/{item['oid']}", "header": {}}},
            }
            for item in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repo: str, body: bytes) -> None:
        files = self.state.repos[repo]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.state.commits.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.state.commit(repo)
        self._answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.state.address}/{repo}/commit/{commit}"}
        )

    def _info(self, repo: str) -> None:
        if repo not in self.state.repos:
            self._refuse(404, "RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in self.state.repos[repo]]
        self._answer({"id": repo, "modelId": repo, "sha": self.state.commit(repo), "siblings": siblings})

    def _file(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repo, revision, name = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "", "/".join(parts[4:])
        if repo not in self.state.repos:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", self.state.commit(repo)):
            self._refuse(404, "RevisionNotFound")
        elif name not in self.state.repos[repo]:
            self._refuse(404, "EntryNotFound")
        else:
            self._send_file(repo, name, with_body=with_body)

    def _send_file(self, repo: str, name: str, *, with_body: bool) -> None:
        data, start = self.state.repos[repo][name], 0
        digest = hashlib.sha256(data).hexdigest()
        asked = self.headers["Range"]
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            self.state.ranges.append((name, asked))
        body = data[start:]
        if with_body and self.state.damaged[name]:
            self.state.damaged[name] -= 1
            body = bytes(len(body))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", self.state.commit(repo))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        if self.state.breaks[name]:
            self.state.breaks[name] -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.state.sent[name] += len(body)
        self.wfile.write(body)

    def _answer(self, value: Any, *, kind: str = "application/json") -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
