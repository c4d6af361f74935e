"""Whether a rewrite may stand for the original: final answer first, then length, repetition, refusal.

The answer check is that of self-data distillation (arXiv 2410.09982 and 2402.13669): a rewrite whose final answer
contradicts the reference's is dropped and the reference kept.
"""

import re
from collections import Counter
from fractions import Fraction

# The reasons, in the order in which they are looked for. A rewrite that passes has the reason "".
EMPTY = "empty"
CUT_OFF = "cut off before its end"
CONTRADICTION = "final answer differs"
TOO_SHORT = "too short"
TOO_LONG = "too long"
REPETITION = "degenerate repetition"
REFUSAL = "refusal"

_LEAST_SHARE, _MOST_SHARE = 0.2, 2.5  # characters of a rewrite over those of the original
_SPARE_CHARACTERS = 100  # a one-line original may grow by so much all the same
_NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?"
_MARKED = re.compile(r"####[ \t]*(\S[^\n]*)")
# `2)` and `f(3)` end in a number too but no answer is written so; a unit of one short word may follow.
_FINAL_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}(?=\s*%?\s*[a-zA-Z$]{{0,12}}[.!]?\s*$)")
_ANY_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}")
_REFUSAL = re.compile(
    r"\b(i['\u2019]m sorry|i am sorry|i apologi[sz]e|i can(?:no|['\u2019])t (?:help|assist|provide|rewrite|do|answer|comply)"
    r"|i(?: am|['\u2019]m) (?:unable|not able) to|as an ai\b|as a language model)",
    re.IGNORECASE,
)
_LOOP = re.compile(r"(.{1,40}?)\1{11,}", re.DOTALL)


def rejection(original: str, rewrite: str, finished: bool) -> str:
    """Why `rewrite` may not replace `original`; empty where it may. `finished`: the model ended it by itself."""
    if not rewrite.strip():
        return EMPTY
    if not finished:
        return CUT_OFF
    if contradicts(original, rewrite):
        return CONTRADICTION
    if len(rewrite) < _LEAST_SHARE * len(original):
        return TOO_SHORT
    if len(rewrite) > _MOST_SHARE * len(original) + _SPARE_CHARACTERS:
        return TOO_LONG
    if _repeats(original, rewrite):
        return REPETITION
    if _REFUSAL.search(rewrite) and not _REFUSAL.search(original):
        return REFUSAL
    return ""


def contradicts(original: str, rewrite: str) -> bool:
    """Whether the original ends in an answer that can be extracted and the rewrite does not come to the same one.

    An answer is what follows `####`, what stands in the last `\\boxed{}`, or a number at the very end. In the rewrite it
    is looked for in the same marks; where they are missing, its last number counts, or for an answer that is no number
    its being there at all.
    """
    answer = final_answer(original)
    if answer is None:
        return False
    found = _marked_answer(rewrite)
    if found is None:
        numbers = _ANY_NUMBER.findall(rewrite)
        if _value(answer) is None:
            return _plain(answer) not in _plain(rewrite)
        found = numbers[-1] if numbers else ""
    return not _same(answer, found)


def final_answer(text: str) -> str | None:
    """The answer in which a text ends; None where none can be told."""
    marked = _marked_answer(text)
    if marked is not None:
        return marked
    number = _FINAL_NUMBER.search(text.rstrip().rsplit("\n", 1)[-1])
    return number.group() if number else None


def _marked_answer(text: str) -> str | None:
    marked = _MARKED.findall(text)
    return marked[-1].strip() if marked else _boxed(text)


def _boxed(text: str) -> str | None:
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    depth, start = 0, begin + len("\\boxed{")
    for position in range(start - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position].strip()
    return None


def _same(one: str, other: str) -> bool:
    values = _value(one), _value(other)
    if None in values:
        return _plain(one) == _plain(other)
    return values[0] == values[1]


def _value(text: str) -> Fraction | None:
    """The number that an answer is, with its unit left away; None where it is something else."""
    match = re.fullmatch(rf"({_NUMBER})\s*%?\s*[a-zA-Z]{{0,12}}[.!]?", text.strip().strip("$").strip())
    if match is None:
        return None
    numerator, _, denominator = match.group(1).replace("$", "").replace(",", "").partition("/")
    return Fraction(numerator) / Fraction(denominator) if denominator.strip("0") else Fraction(numerator)


def _plain(text: str) -> str:
    return re.sub(r"[\s$.]", "", text).lower()


def _repeats(original: str, rewrite: str) -> bool:
    share = _repeated_share(rewrite)
    looped = _LOOP.search(rewrite) is not None and _LOOP.search(original) is None
    return looped or (share > 0.3 and share > _repeated_share(original) + 0.15)


def _repeated_share(text: str) -> float:
    # Of the runs of four words, those that were there before.
    words = text.split()
    runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    total = sum(runs.values())
    return 1.0 - len(runs) / total if total else 0.0
