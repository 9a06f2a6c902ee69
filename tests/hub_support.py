"""A Hub served from loopback, for what downloads from one (no network)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import edgeguard

COMMIT = "c0ffee" + "0" * 34
REVISIONS = ("main", "v1", COMMIT)


class HubHandler(BaseHTTPRequestHandler):
    """The few routes of the Hub that downloads use, over one folder, which is the one repository."""

    folder: Path
    repository: str
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path in (f"/api/models/{self.repository}/revision/{revision}" for revision in REVISIONS):
            siblings = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            body = json.dumps({"id": self.repository, "sha": COMMIT, "siblings": siblings}).encode()
            self.answer(200, body, {"Content-Type": "application/json"})
        elif path.startswith(tuple(f"/{self.repository}/resolve/{revision}/" for revision in REVISIONS)):
            file = self.folder / path.rsplit("/", 1)[1]
            if file.is_file():
                body = file.read_bytes()
                self.answer(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif path.startswith(f"/api/models/{self.repository}/"):
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serve_hub(folder: Path, repository: str, asked: list[str]) -> Iterator[str]:
    """The address of a Hub on loopback that holds ``folder``; ``asked`` gets the paths that it is asked for."""
    handler = type("Handler", (HubHandler,), {"folder": folder, "repository": repository, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run_with_hub(code: str, endpoint: str, cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own: the Hub's library reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **settings}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(edgeguard.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=240
    )
