"""Texts as hashed counts of words, signs and pairs of them: what a cheap linear model sees of a document (hashing trick,
arXiv 0902.2206, as fastText uses it). Nothing is learned and nothing is kept, so that any process makes the same of a text.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import polars as pl

from finescope.curation.codes import Codes

# Buckets that n-grams are hashed into; a power of two.
_BITS = 18
BUCKETS = 1 << _BITS
# Words, and signs by themselves, which is most of mathematics and code. Scripts that are written without spaces: characters.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKEN = rf"[{_UNSPACED}]|[\w&&[^{_UNSPACED}]]+|[^\w\s]"
# Which number it is says little of what a text is about (docs/benchmarks.md).
_DIGITS = re.compile(r"\d+")
# Odd 64-bit numbers: the leading bits of a product with one are a good hash of a good hash (Knuth, multiplicative hashing).
_OF_ONE, _OF_FIRST, _OF_PAIR = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93))


def hashed_ngrams(texts: Sequence[str], characters: int) -> Codes:
    """One row a text over `BUCKETS`: 1 + log(count) of each bucket, at unit length; a text without words has an empty row.
    Case is no difference, and all numbers are the same one.

    Args:
        characters: of a text so many are read, from its start.
    """
    lists = pl.Series(list(texts), dtype=pl.String).str.head(characters).str.to_lowercase().str.extract_all(_TOKEN).to_arrow()
    lengths = np.diff(lists.offsets.to_numpy())
    owner = np.repeat(np.arange(len(texts)), lengths)
    words = lists.flatten().dictionary_encode()
    # A few distinct words make up a text, so that hashing each once, in Python, costs little.
    distinct = np.array([_hash(word) for word in words.dictionary.to_pylist()], np.uint64)
    hashes = distinct[words.indices.to_numpy()]
    paired = np.flatnonzero(owner[:-1] == owner[1:])
    pairs = (hashes[paired] * _OF_FIRST + hashes[paired + 1]) * _OF_PAIR
    buckets = np.concatenate([hashes * _OF_ONE, pairs]) >> np.uint64(64 - _BITS)
    keys, counts = np.unique(np.concatenate([owner, owner[paired]]) << _BITS | buckets.astype(np.int64), return_counts=True)
    offsets = np.searchsorted(keys, np.arange(len(texts) + 1) << _BITS)
    rows = Codes(offsets, (keys & (BUCKETS - 1)).astype(np.int32), 1 + np.log(counts).astype(np.float32), BUCKETS)
    norms = np.sqrt(rows.sum_rows(rows.values.astype(np.float64) ** 2))
    return rows.with_values(rows.values / np.repeat(norms, np.diff(offsets)))


def _hash(word: str) -> int:
    word = _DIGITS.sub("0", word)
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
