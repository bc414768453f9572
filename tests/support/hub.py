"""A stand-in for the Hugging Face hub: as much of its HTTP API as huggingface_hub uses to make a repository and to
commit files to it, small ones in the commit and tensors by git's large file storage."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_aVerySecretTokenThatNobodyMaySee"


class Hub:
    """Owns the server; what it was asked, and what its repositories hold."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}  # name -> path -> content
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []  # "POST /api/repos/create" …
        self.large: dict[str, bytes] = {}  # sha256 -> content
        self.fails: dict[str, int] = {}  # part of a path -> status
        self.silent = False  # answers nothing
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hub.answer(self)

            def do_PUT(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        self.asked.append(f"{request.command} {path}")
        while self.silent:
            time.sleep(0.05)
        failed = next((status for part, status in self.fails.items() if part in path), None)
        if failed is not None:
            self.reply(request, failed, {"error": f"trouble\nwith {path}"})
        elif request.command == "PUT":
            self.large[path.rpartition("/")[2]] = body
            self.reply(request, 200, {})
        elif request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(request, 401, {"error": "Invalid username or password."})
        else:
            status, content = self.post(path, body)
            self.reply(request, status, content)

    def reply(self, request: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            answer = {"url": f"{self.url}/{name}", "id": name}
            if name in self.repositories:
                return 409, answer | {"error": "You already created this model repo"}
            self.repositories[name], self.private[name] = {}, asked.get("visibility") == "private"
            return 200, answer
        if path == "/api/validate-yaml":
            return (200, {}) if json.loads(body)["content"].startswith("---\n") else (400, {"errors": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": files}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.url}/storage/{one['oid']}"},
                                   "verify": {"href": f"{self.url}/api/verify"}}}
                for one in json.loads(body)["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        if path == "/api/verify":
            asked = json.loads(body)
            stored = self.large.get(asked["oid"], b"")
            whole = hashlib.sha256(stored).hexdigest() == asked["oid"] and len(stored) == asked["size"]
            return (200, {}) if whole else (422, {"error": "not what was announced"})
        if path.endswith("/commit/main"):
            return self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        return 404, {"error": "not found"}

    def commit(self, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/0f", "commitOid": "0f" * 20}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.silent = False
        hub.server.shutdown()
        hub.server.server_close()
