"""What a document shares with evaluation sets."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import regex

# With the marks that stand on letters: vowel signs, accents that are characters of their own.
_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it permutes the 64-bit integers


def words(text: str) -> list[str]:
    """The runs of letters and digits of a text, casefolded, accents composed (NFC)."""
    return _WORD.findall(unicodedata.normalize("NFC", text.casefold()))


@dataclass(frozen=True)
class NgramIndex:
    """All n-grams of words of a set of texts. Looked up by hash, confirmed word by word. 24 bytes an n-gram."""

    n: int
    vocabulary: dict[str, int]  # word to number
    numbers: np.ndarray  # int32 [W]: the words of all texts, one after another
    starts: np.ndarray  # int64 [G]: where in `numbers` each n-gram begins, in order of hash
    hashes: np.ndarray  # uint64 [G], sorted, each once
    items: np.ndarray  # int32 [G]: the text that each n-gram is of
    short: dict[tuple[str, ...], int]  # texts of fewer than n words: only a document that is nothing else hits them
    names: tuple[str, ...]  # where each text stands

    @classmethod
    def build(cls, texts: Sequence[tuple[str, str]], n: int = 13) -> "NgramIndex":
        """Index (name, text); of an n-gram in several, the first text is named."""
        vocabulary: dict[str, int] = {}
        short: dict[tuple[str, ...], int] = {}
        numbers: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        items: list[np.ndarray] = []
        offset = 0
        for item, (_, text) in enumerate(texts):
            found = words(text)
            if len(found) < n:
                if found:
                    short.setdefault(tuple(found), item)
                continue
            numbers.append(np.array([vocabulary.setdefault(word, len(vocabulary)) for word in found], dtype=np.int32))
            starts.append(np.arange(offset, offset + len(found) - n + 1))
            items.append(np.full(len(found) - n + 1, item, dtype=np.int32))
            offset += len(found)
        all_numbers = np.concatenate(numbers) if numbers else np.zeros(0, dtype=np.int32)
        all_starts = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
        all_items = np.concatenate(items) if items else np.zeros(0, dtype=np.int32)
        hashes = _ngram_hashes(all_numbers, n)[all_starts]
        unique, first = np.unique(hashes, return_index=True)
        names = tuple(name for name, _ in texts)
        return cls(n, vocabulary, all_numbers, all_starts[first], unique, all_items[first], short, names)

    def hit(self, text: str) -> str | None:
        """The first n-gram that `text` shares with an indexed text, after that text's name: "NAME: ..."; else None."""
        found = words(text)
        if len(found) < self.n:
            item = self.short.get(tuple(found))
            return None if item is None else f"{self.names[item]}: {' '.join(found)}"
        # Words that no indexed text has get numbers that occur nowhere.
        numbers = np.array([self.vocabulary.get(word, -1) for word in found], dtype=np.int32)
        hashes = _ngram_hashes(numbers, self.n)
        places = np.searchsorted(self.hashes, hashes)
        inside = np.minimum(places, max(len(self.hashes) - 1, 0))
        candidates = np.flatnonzero(self.hashes[inside] == hashes) if len(self.hashes) else np.zeros(0, dtype=np.int64)
        for position in candidates.tolist():
            start = int(self.starts[inside[position]])
            if np.array_equal(self.numbers[start : start + self.n], numbers[position : position + self.n]):
                name = self.names[self.items[inside[position]]]
                return f"{name}: {' '.join(found[position : position + self.n])}"
        return None


def _ngram_hashes(numbers: np.ndarray, n: int) -> np.ndarray:
    """A polynomial hash modulo 2^64 of each n-gram of int32 [W]: uint64 [W - n + 1]."""
    if len(numbers) < n:
        return np.zeros(0, dtype=np.uint64)
    count = len(numbers) - n + 1
    # Spread the small word numbers over 64 bits first: sums of small numbers would collide.
    spread = (numbers.astype(np.int64) + 2).astype(np.uint64) * _MULTIPLIER
    spread ^= spread >> np.uint64(29)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * _MULTIPLIER + spread[offset : offset + count]
    return hashes
