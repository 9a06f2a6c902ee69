"""Where a bundle is: a local folder, or a repository of the Hugging Face Hub (``hf://owner/name[@revision]``).

The Hub is only asked for an ``hf://`` name, and its library is imported only then; downloads stay in its cache, so the
second load works offline (``HF_HUB_OFFLINE=1``). ``HF_ENDPOINT`` and ``HF_TOKEN`` are honoured by that library.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgeguard.errors import BundleError

__all__ = ["HUB_PREFIX", "resolve_bundle"]

HUB_PREFIX = "hf://"
HUB_PATTERN = re.compile(r"hf://(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)


def resolve_bundle(spec: str | Path) -> Path:
    """The local folder that ``spec`` means; downloads it first when it is on the Hub.

    Raises BundleError for a malformed ``hf://`` name, for what cannot be downloaded, and for a ``~`` that means no
    folder. A local path is returned as it is: :meth:`edgeguard.bundle.Bundle.open` says whether it is a bundle.
    """
    if not isinstance(spec, str) or not spec.startswith(HUB_PREFIX):
        try:
            return Path(spec).expanduser()
        except RuntimeError as error:
            raise BundleError(f"{spec}: {error} Name the folder in full.") from error
    match = HUB_PATTERN.fullmatch(spec)
    if match is None:
        raise BundleError(f"{spec}: expected hf://owner/name or hf://owner/name@revision.")
    return _download(spec, match["repo"], match["revision"])


def _download(spec: str, repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision))
    # Any: no network, not in the cache, a full disk; and the library has changed its HTTP client, with its errors.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BundleError(
            f"{spec}: expected a bundle on the Hugging Face Hub, found {type(error).__name__}: {reason[0]} "
            "Check the name, the network and HF_TOKEN, or pass a local folder."
        ) from error
