"""Fixtures that all tests share: a tiny real bundle, built without network, and a guard on it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tiny import write_bundle
from tokenizers import Tokenizer

from edgeguard import Guard
from edgeguard.cache import CACHE_VARIABLE

# No deadline: a busy machine is not a failure. No database: every run tries the same kind of examples afresh.
settings.register_profile("edgeguard", deadline=None, database=None)
settings.load_profile("edgeguard")
# A shell's background jobs ignore Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete bundle. Read only: tests that change it use ``bundle_copy``."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def int4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle with a tiny INT4 Llama. Read only."""
    from export_support import write_int4_bundle

    return write_int4_bundle(tmp_path_factory.mktemp("bundles") / "int4")


@pytest.fixture(scope="session")
def tiny_guard(tiny_bundle: Path) -> Guard:
    """A guard on the tiny bundle, one thread."""
    return Guard.load(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_guard: Guard) -> Tokenizer:
    """The tokenizer as the runtime sets it up."""
    return tiny_guard.bundle.load_tokenizer()


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))
