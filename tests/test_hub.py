"""Where bundles come from: local folders, and a Hub served from this machine (no network)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import edgeguard
from edgeguard import BundleError, Guard
from edgeguard.hub import resolve_bundle

COMMIT = "c0ffee" + "0" * 34
REPOSITORY = "someone/tiny-guard"


class HubHandler(BaseHTTPRequestHandler):
    """The few routes of the Hub that a snapshot download uses, over one folder."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path in (f"/api/models/{REPOSITORY}/revision/{revision}" for revision in ("main", "v1", COMMIT)):
            siblings = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
            self.answer(200, body, {"Content-Type": "application/json"})
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            body = (self.folder / path.rsplit("/", 1)[1]).read_bytes()
            self.answer(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
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


@pytest.fixture
def asked() -> list[str]:
    """Paths that the Hub was asked for."""
    return []


@pytest.fixture
def hub(tiny_bundle: Path, asked: list[str]) -> Iterator[str]:
    """Address of a Hub on loopback that holds the tiny bundle."""
    handler = type("Handler", (HubHandler,), {"folder": tiny_bundle, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def load(spec: str, endpoint: str, cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Load ``spec`` in a process of its own: the Hub's library reads its settings when it is imported."""
    code = f"from edgeguard import Guard; print(Guard.load({spec!r}, threads=1).classify('hello').bundle)"
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **settings}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(edgeguard.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=120
    )


def test_a_bundle_from_the_hub_then_offline(hub: str, asked: list[str], tmp_path: Path) -> None:
    for spec, revision in ((f"hf://{REPOSITORY}@v1", "v1"), (f"hf://{REPOSITORY}", "main")):
        asked.clear()
        found = load(spec, hub, tmp_path)
        assert (found.returncode, found.stdout) == (0, "tiny@0.0.1\n"), found.stderr
        assert f"/api/models/{REPOSITORY}/revision/{revision}" in asked
    offline = load(f"hf://{REPOSITORY}", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, "tiny@0.0.1\n"), offline.stderr


@pytest.mark.parametrize("settings", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_what_the_hub_does_not_have(hub: str, tmp_path: Path, settings: dict[str, str]) -> None:
    found = load("hf://someone/else", hub, tmp_path, **settings)
    assert found.returncode == 1
    assert "BundleError: hf://someone/else: expected a bundle on the Hugging Face Hub, found" in found.stderr


@pytest.mark.parametrize(
    "spec",
    [
        "hf://",
        "hf://name",
        "hf://a/b/c",
        "hf://a/b@",
        "hf:///b",
        "hf://a/../b",
        "hf://a/b c",
        "hf://../b",
        "hf://a/b\n",
    ],
)
def test_malformed_names(spec: str) -> None:
    with pytest.raises(BundleError, match="expected hf://owner/name or hf://owner/name@revision"):
        resolve_bundle(spec)


def test_local_folders_stay_what_they_are(tmp_path: Path) -> None:
    assert resolve_bundle(tmp_path) == tmp_path
    assert resolve_bundle(str(tmp_path)) == tmp_path
    assert resolve_bundle("~/x") == Path.home() / "x"
    with pytest.raises(BundleError, match="expected a bundle folder, found nothing"):
        Guard.load("owner/name")
