"""Where bundles come from: local folders, and a Hub served from this machine (no network)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_support import run_with_hub, serve_hub

from edgeguard import BundleError, Guard
from edgeguard.hub import resolve_bundle

REPOSITORY = "someone/tiny-guard"


@pytest.fixture
def asked() -> list[str]:
    """Paths that the Hub was asked for."""
    return []


@pytest.fixture
def hub(tiny_bundle: Path, asked: list[str]) -> Iterator[str]:
    """Address of a Hub on loopback that holds the tiny bundle."""
    with serve_hub(tiny_bundle, REPOSITORY, asked) as endpoint:
        yield endpoint


def load(spec: str, endpoint: str, cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    code = f"from edgeguard import Guard; print(Guard.load({spec!r}, threads=1).classify('hello').bundle)"
    return run_with_hub(code, endpoint, cache, **settings)


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
    with pytest.raises(BundleError, match="~nosuchuser/x: .* Name the folder in full"):
        Guard.load("~nosuchuser/x")


def test_any_fault_of_the_download_is_one_of_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    class RemoteProtocolError(Exception):
        """As of the HTTP client that the library has from version 1 on."""

    def drop(repo: str, revision: str | None) -> str:
        raise RemoteProtocolError("Server disconnected without sending a response.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", drop)
    with pytest.raises(BundleError, match="found RemoteProtocolError: Server disconnected"):
        resolve_bundle("hf://a/b")
