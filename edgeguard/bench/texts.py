"""Texts of ordinary words whose encoded conversation, template included, has exactly so many tokens.

A text depends on the seed, its length and its key alone, so the same seed gives the same texts whatever else is
measured. No two trials of a length share a text: an engine that keeps what it computed must not be told the same thing
twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgeguard.bench.records import BenchError
from edgeguard.bench.runners import Sample
from edgeguard.prompt import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgeguard.bundle import Manifest

__all__ = ["TextMaker"]

# Common English words of one to four syllables. Short ones stand first: they fill the last gap.
WORDS = tuple(
    """a I to of in it is on we be at he or by so if my an up no do go me us the and you for was are his her but not
    can had one our out day get has him how man new now old see two way who boy did its let put say she too use that
    with have this will your from they know want been good much some time very when come here just like long make many
    over such take than them well were what work year about after again could every first found great house large learn
    never other place plant point right small sound spell still study their there these thing think three water where
    which world would write answer before family father follow letter little mother number people person school second
    should sister summer table travel window winter yellow another because between brother country evening history
    kitchen machine morning nothing picture problem science weather children exercise language mountain question
    remember sentence together tomorrow yesterday afternoon beautiful different important newspaper neighbour
    restaurant understand vegetable television temperature""".split()
)
ATTEMPTS = 20


class TextMaker:
    """Makes the texts of one bundle."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, seed: int) -> None:
        """``seed``: of all texts."""
        self._manifest, self._tokenizer, self._seed = manifest, tokenizer, seed

    def sample(self, tokens: int, key: str, earlier: Sequence[Message] = ()) -> Sample:
        """A conversation of exactly ``tokens`` tokens: ``earlier`` turns, then a user's text, another for each ``key``.

        Raises BenchError when there is none: fewer tokens than the template takes, or more than the bundle reads.
        """
        if tokens > self._manifest.max_tokens:
            raise BenchError(f"{tokens} tokens: this bundle reads at most {self._manifest.max_tokens}.")
        rng = random.Random(f"{self._seed}/{tokens}/{key}")

        def length(text: str) -> int:
            encoded = self._encode([*earlier, ("user", text)])
            return tokens + 1 if encoded is None else len(encoded)

        text = _text(length, tokens, rng)
        if text is None:
            least = min(map(length, WORDS))
            raise BenchError(
                f"{tokens} tokens: no text of ordinary words has exactly so many with this bundle. Its template and "
                f"one word take {least}."
            )
        messages = (*earlier, ("user", text))
        return Sample(messages, tuple(self._encode(messages) or ()))

    def possible(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Those of ``lengths`` that there is a text of. Raises BenchError when there is none of any."""
        found, reason = [], None
        for tokens in lengths:
            try:
                self.sample(tokens, "try")
            except BenchError as error:
                reason = error
            else:
                found.append(tokens)
        if reason is not None and not found:
            raise reason
        return tuple(found)

    def _encode(self, messages: Sequence[Message]) -> list[int] | None:
        """Token ids; None for a conversation that does not fit."""
        manifest = self._manifest
        encoded = manifest.template.encode(self._tokenizer, messages, manifest.max_tokens)
        return None if encoded.truncated else encoded.ids


def _text(length: Callable[[str], int], tokens: int, rng: random.Random) -> str | None:
    """Random words that ``length`` finds to be ``tokens`` long; None where a few attempts find none."""
    for _ in range(ATTEMPTS):
        words = [rng.choice(WORDS) for _ in range(tokens)]
        kept = words[: _most_words(length, tokens, words)]
        # What is left is filled by one word, or by one word in place of the last one or two.
        for start in (kept, kept[:-1], kept[:-2]):
            for word in ("", *rng.sample(WORDS, len(WORDS))):
                text = " ".join([*start, word] if word else start)
                if text and length(text) == tokens:
                    return text
    return None


def _most_words(length: Callable[[str], int], tokens: int, words: Sequence[str]) -> int:
    """How many of ``words`` fit into ``tokens``, by bisection."""
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if length(" ".join(words[:middle])) <= tokens:
            low = middle
        else:
            high = middle - 1
    return low
