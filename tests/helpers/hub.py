"""A model hub on loopback: the routes of its HTTP API that an upload uses, and what was committed.

Routes and shapes are those that huggingface_hub calls (`hf_api.py`, `_commit_api.py`, `lfs.py`).
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """Repositories with their files, and what was asked of the hub."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    read_only: bool = False


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def handle_all(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = content
            return self.reply({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid credentials"}, 401)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.reply({"name": "somebody", "type": "user"})
        if hub.read_only and self.command == "POST":
            return self.reply({"error": "this token may only read"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(x for x in (asked.get("organization"), asked["name"]) if x)
            hub.repositories.setdefault(name, {})
            hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            return self.reply({"url": f"{hub.url}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(content)["objects"]
            upload = [
                x | {"actions": {"upload": {"href": f"{hub.url}/large/{x['oid']}"}}} for x in asked
            ]
            return self.reply({"transfer": "basic", "objects": upload})
        return self.of_repository(path, content)

    def of_repository(self, path: str, content: bytes) -> None:
        hub = self.hub
        owner, model, *rest = path.removeprefix("/api/models/").split("/")
        name = f"{owner}/{model}"
        if name not in hub.repositories:
            return self.reply({"error": "Repository not found"}, 404)
        if not rest or rest[0] == "revision":
            return self.reply({"id": name, "sha": "0" * 40, "siblings": []})
        if rest[0] == "preupload":
            files = [
                {
                    "path": x["path"],
                    "uploadMode": "lfs" if x["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for x in json.loads(content)["files"]
            ]
            return self.reply({"files": files})
        for line in content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                hub.repositories[name][value["path"]] = hub.large[value["oid"]]
        commit = {"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
        return self.reply(commit)

    do_GET = do_POST = do_PUT = handle_all


@contextmanager
def local_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
