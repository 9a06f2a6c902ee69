"""Guard: what a user holds. Loads a bundle, reads text in one forward pass, returns verdicts.

A guard is immutable once loaded and may be shared between threads. It fails closed: whatever goes wrong raises an
EdgeguardError, and text that was not read in full is never "allow".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from edgeguard.bundle import Bundle, default_bundle_path
from edgeguard.calibration import sigmoid
from edgeguard.conversation import Conversation
from edgeguard.engines import Engine, create_engine, fastest_engine
from edgeguard.errors import BundleError, EngineError, InputError
from edgeguard.hub import resolve_bundle
from edgeguard.manifest import DEFAULT_OPERATING_POINT, SelfTestVector
from edgeguard.policy import decide, threshold_for
from edgeguard.prompt import Encoded, as_messages
from edgeguard.verdict import Verdict

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Guard", "Item"]

Item = str | Mapping[str, Any]
ITEM_KEYS = ("text", "prompt", "response", "messages")


class Guard:
    """A loaded bundle. Make one with :meth:`load`."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        tokenizer: Tokenizer,
        operating_point: str = DEFAULT_OPERATING_POINT,
        *,
        choice: Mapping[str, Any] | None = None,
    ) -> None:
        """Put loaded parts together; ``choice``: how the engine was chosen, for :meth:`info`.

        Raises PolicyError for an operating point that the bundle does not define.
        """
        self._bundle = bundle
        self._engine = engine
        self._tokenizer = tokenizer
        self._operating_point = operating_point
        self._thresholds = bundle.manifest.thresholds
        self._choice = choice
        threshold_for(self._thresholds, operating_point, "prompt")

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        *,
        engine: str = "auto",
        operating_point: str = DEFAULT_OPERATING_POINT,
        threads: int | None = None,
        self_test: bool = True,
    ) -> Guard:
        """Load a bundle: a folder, ``hf://owner/name[@revision]``, or None for the shipped one (no network).

        ``engine``: a name of :data:`edgeguard.engines.ENGINES`, or ``auto`` for the fastest here, measured once.
        ``threads``: of one forward pass, None for one a physical core. ``self_test`` reproduces the manifest's vectors
        first. Raises BundleError, EngineError or PolicyError (see :mod:`edgeguard.errors`).
        """
        opened = Bundle.open(default_bundle_path() if bundle is None else resolve_bundle(bundle))
        choice = None
        if engine == "auto":
            made, choice = fastest_engine(opened, threads)
        else:
            made = create_engine(engine, opened, threads)
        guard = cls(opened, made, opened.load_tokenizer(), operating_point, choice=choice)
        if self_test:
            guard.self_test()
        return guard

    @property
    def bundle(self) -> Bundle:
        """The bundle: ``path`` and ``manifest``."""
        return self._bundle

    @property
    def operating_point(self) -> str:
        """The operating point that is used when a call names none."""
        return self._operating_point

    def classify(
        self,
        text: str | None = None,
        *,
        prompt: str | None = None,
        response: str | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        operating_point: str | None = None,
    ) -> Verdict:
        """Judge a text or prompt, a response (with the prompt before it), or the last of ``messages``.

        Raises InputError for nothing to judge, PolicyError for an unknown operating point, EngineError when the model
        fails or returns a logit that is not finite.
        """
        start = time.perf_counter()
        point = self._known_point(operating_point)
        encoded = self._encode(text, prompt, response, messages)
        row = self._logits([encoded])[0]
        return self._verdict(encoded, row, point, 1000 * (time.perf_counter() - start))

    @overload
    def classify_many(
        self,
        items: Iterable[Item],
        *,
        batch_size: int = 16,
        operating_point: str | None = None,
        on_error: Literal["raise"] = "raise",
    ) -> list[Verdict]: ...

    @overload
    def classify_many(
        self,
        items: Iterable[Item],
        *,
        batch_size: int = 16,
        operating_point: str | None = None,
        on_error: str,
    ) -> list[Verdict | InputError]: ...

    def classify_many(
        self,
        items: Iterable[Item],
        *,
        batch_size: int = 16,
        operating_point: str | None = None,
        on_error: str = "raise",
    ) -> list[Any]:
        """Judge many items in batches of like length; results are in the order of ``items``.

        An item is a text or a mapping with ``text``, ``prompt``, ``response`` or ``messages`` (other keys are not
        read). An item that cannot be judged raises InputError with its index; with ``on_error="return"`` its
        InputError takes its place. ``latency_ms`` is the batch's time divided by its rows.
        """
        if on_error not in ("raise", "return"):
            raise InputError(f"on_error: expected 'raise' or 'return', found {on_error!r}.")
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size: expected a whole number of 1 and up, found {batch_size!r}.")
        point = self._known_point(operating_point)
        results: list[Any] = [self._try_encode(i, item, on_error) for i, item in enumerate(_listed(items))]
        for batch in _buckets(results, batch_size):
            start = time.perf_counter()
            rows = self._logits([results[i] for i in batch])
            latency_ms = 1000 * (time.perf_counter() - start) / len(batch)
            for i, row in zip(batch, rows, strict=True):
                results[i] = self._verdict(results[i], row, point, latency_ms)
        return results

    def conversation(self, operating_point: str | None = None) -> Conversation:
        """A dialogue to be judged turn by turn, in which a new turn costs its own tokens alone.

        That holds for the engines ``onnx-int8`` and ``gguf``; ``onnx`` reads the whole dialogue again. Raises
        PolicyError for an unknown operating point.
        """
        return Conversation(self, self._known_point(operating_point))

    def info(self) -> dict[str, Any]:
        """What is loaded, JSON-ready: the manifest's facts, the engine, its providers asked for and used, threads."""
        manifest = self._bundle.manifest.to_dict()
        del manifest["template"], manifest["self_test"]
        return {
            "bundle": self._bundle.label,
            "path": str(self._bundle.path),
            "size_bytes": self._bundle.size_bytes,
            "operating_point": self._operating_point,
            "engine": {
                "name": self._engine.name,
                "version": self._engine.version,
                "providers_asked": list(self._engine.providers_asked),
                "providers": list(self._engine.providers),
                "threads": self._engine.threads,
                "choice": None if self._choice is None else dict(self._choice),
            },
            "manifest": manifest,
        }

    def self_test(self) -> float:
        """Reproduce the manifest's vectors; returns the largest difference of a margin.

        Raises BundleError naming expected and found for another token count or a margin outside the tolerance.
        """
        test = self._bundle.manifest.self_test
        return max(self._try_vector(i, vector, test.tolerance) for i, vector in enumerate(test.vectors))

    def _try_vector(self, index: int, vector: SelfTestVector, tolerance: float) -> float:
        where = f"{self._bundle.path}: self-test vector {index}"
        try:
            encoded = self._encode(None, vector.prompt, vector.response, None)
            if len(encoded.ids) != vector.tokens:
                raise BundleError(f"{where}: expected {vector.tokens} tokens, found {len(encoded.ids)}.")
            row = self._logits([encoded])[0]
        except (InputError, EngineError) as error:
            raise BundleError(f"{where}: expected a margin of {vector.margin}, found an error: {error}") from error
        margin = float(row[1] - row[0])
        if abs(margin - vector.margin) > tolerance:
            raise BundleError(
                f"{where}: expected a margin of {vector.margin:.4f} within {tolerance:g}, found {margin:.4f}. "
                "Download the bundle again, or try another engine."
            )
        return abs(margin - vector.margin)

    def _known_point(self, operating_point: str | None) -> str:
        """The point to use, checked before any work is done."""
        point = self._operating_point if operating_point is None else operating_point
        threshold_for(self._thresholds, point, "prompt")
        return point

    def _encode(
        self,
        text: str | None,
        prompt: str | None,
        response: str | None,
        messages: Sequence[Mapping[str, str]] | None,
    ) -> Encoded:
        pairs = as_messages(text, prompt=prompt, response=response, messages=messages)
        return self._bundle.manifest.template.encode(self._tokenizer, pairs, self._bundle.manifest.max_tokens)

    def _try_encode(self, index: int, item: Item, on_error: str) -> Encoded | InputError:
        try:
            if isinstance(item, str):
                return self._encode(item, None, None, None)
            if not isinstance(item, Mapping):
                raise InputError(f"expected a text or an object with {', '.join(ITEM_KEYS)}, found {item!r:.80}.")
            return self._encode(*(item.get(key) for key in ITEM_KEYS))
        except InputError as error:
            if on_error == "return":
                return error
            raise InputError(f"items[{index}]: {error}") from error

    def _logits(self, batch: Sequence[Encoded]) -> NDArray[np.float32]:
        """Logits [B, K] of a batch, every one finite: NaN would compare as "not above the threshold", that is safe."""
        length = max(len(encoded.ids) for encoded in batch)
        ids = np.full((len(batch), length), self._bundle.manifest.template.pad_id, dtype=np.int64)
        mask = np.zeros((len(batch), length), dtype=np.int64)
        for row, encoded in enumerate(batch):
            ids[row, : len(encoded.ids)] = encoded.ids
            mask[row, : len(encoded.ids)] = 1
        return self._finite(self._engine.logits(ids, mask))

    def _read_on(self, encoded: Encoded, seen: object) -> tuple[NDArray[np.float32], object]:
        """Logits [K] of a row, from where ``seen`` ends, and what is seen now."""
        logits, seen = self._engine.read_on(encoded.ids, seen)
        return self._finite(logits)[0], seen

    def _finite(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(logits).all():
            raise EngineError(
                f"{self._bundle.label}: the engine {self._engine.name} returned a logit that is not finite."
            )
        return logits

    def _verdict(self, encoded: Encoded, row: NDArray[np.float32], point: str, latency_ms: float) -> Verdict:
        manifest = self._bundle.manifest
        logits = row.astype(np.float64)
        margin = float(logits[1] - logits[0])
        p_unsafe = manifest.calibration[encoded.target].probability(margin)
        threshold = threshold_for(self._thresholds, point, encoded.target)
        unsafe, action = decide(p_unsafe, threshold, truncated=encoded.truncated)
        return Verdict(
            unsafe=unsafe,
            p_unsafe=p_unsafe,
            margin=margin,
            action=action,
            hazards=dict(zip(manifest.head[2:], sigmoid(logits[2:]).tolist(), strict=True)),
            operating_point=point,
            tokens=len(encoded.ids),
            truncated=encoded.truncated,
            latency_ms=latency_ms,
            bundle=self._bundle.label,
            engine=self._engine.name,
        )


def _listed(items: Iterable[Item]) -> Iterable[Item]:
    if isinstance(items, str | bytes | Mapping):
        raise InputError("items: expected a list of texts or objects, found one. Use classify() for a single text.")
    return items


def _buckets(results: Sequence[Encoded | InputError], batch_size: int) -> Iterator[list[int]]:
    """Indices of encoded items in batches of like length, so that little of a batch is padding."""
    lengths = [(len(result.ids), i) for i, result in enumerate(results) if isinstance(result, Encoded)]
    order = [i for _, i in sorted(lengths)]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
