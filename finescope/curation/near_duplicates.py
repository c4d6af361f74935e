"""Documents that are the same text, or nearly: sets of n-grams of words and signs (shingles) whose Jaccard similarity is high.

MinHash with locality-sensitive hashing (the library rensa) finds which documents may be alike; their texts then decide, by
the exact Jaccard similarity. So none is removed that should stay; one in a hundred of those at the very threshold is missed.
"""

import hashlib
import pickle
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

import regex
from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)

# Words, and every sign by itself: in mathematics and code a sign or an operator is all that differs.
_TOKEN = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*|[^\s\p{L}\p{N}]")
# Slots of a sketch, and the seed of its hashes. Fixed: they decide which pairs are compared, not which are duplicates.
_SLOTS, _SEED = 256, 1
# What one takes, pickled.
SKETCH_BYTES = 1_400
# Of pairs at the threshold, the share that must be compared.
_RECALL = 0.99
# Sets of shingles that are kept at hand: a text that one document resembles, the next one often does too.
_CACHED = 4096


def normalised_hash(text: str) -> bytes:
    """Equal for texts that are equal up to case and white space: 16 bytes."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def shingles(text: str, length: int) -> frozenset[str]:
    """The runs of `length` words and signs of a text, whatever the case; of a shorter text all of them as one; none of none."""
    found = _TOKEN.findall(unicodedata.normalize("NFC", text.casefold()))
    if len(found) <= length:
        return frozenset([" ".join(found)] if found else [])
    return frozenset(" ".join(found[start : start + length]) for start in range(len(found) - length + 1))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of the intersection over size of the union; 0.0 of two empty sets."""
    common = len(one & other)
    return common / max(len(one) + len(other) - common, 1)


def sketches(texts: Sequence[str], length: int) -> list[bytes]:
    """The MinHash sketch of each text's shingles, about a kilobyte, for `NearDuplicates` in another process."""
    sets = [sorted(shingles(text, length)) for text in texts]
    return [pickle.dumps(sketch) for sketch in RMinHash.from_token_sets(sets, _SLOTS, _SEED)]


def rows_a_band(threshold: float) -> int:
    """Slots that two sketches must share in one of `_SLOTS` / rows bands to be compared: as many as the recall allows."""
    rows = 1
    while 2 * rows <= _SLOTS and 1 - (1 - threshold ** (2 * rows)) ** (_SLOTS // (2 * rows)) >= _RECALL:
        rows *= 2
    return rows


class NearDuplicates:
    """The documents that are kept, by number. 2 kB a document; their texts are read again where they are compared."""

    def __init__(self, threshold: float, length: int, text_of: Callable[[int], str]) -> None:
        self._threshold = threshold
        self._index = RMinHashLSH(threshold, _SLOTS, _SLOTS // rows_a_band(threshold))
        self._shingles = lru_cache(_CACHED)(lambda number: shingles(text_of(number), length))

    def most_similar(self, number: int, sketch: bytes) -> tuple[int, float] | None:
        """The document among those kept that `number` resembles most, of equals the first, and how much; None: none enough."""
        likely = sorted(self._index.query(pickle.loads(sketch)))
        if not likely:
            return None
        mine = self._shingles(number)
        similarity, first = max((jaccard(mine, self._shingles(other)), -other) for other in likely)
        return (-first, similarity) if similarity >= self._threshold else None

    def keep(self, number: int, sketch: bytes) -> None:
        """Compare later documents with this one too."""
        self._index.insert(number, pickle.loads(sketch))
