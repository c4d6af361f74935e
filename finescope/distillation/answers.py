"""The answer that a response comes to, and whether another text comes to the same one.

Self-data distillation (arXiv 2410.09982, 2402.13669) keeps the original where a rewrite's final answer contradicts it. An answer
is, in this order: what follows `####` or stands in the last `\\boxed{}`; a choice's letter; what follows "Answer:" or "the answer
is"; a number at the very end; and a command or a few words that are no sentence, which are an answer as they stand.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from finescope.distillation.numbers import BEFORE, NUMBER, PERCENT, all_numbers, values_of, without_latex

# Of the words behind a number, at most two are a unit; those that go on with a sentence are none.
_NO_UNIT = r"(?!(?:in|on|at|by|of|to|and|or|for|from|with|as|is|the|an?|its|their)\b)"
_UNIT = rf"(?:\s*%|\s*{_NO_UNIT}[a-zA-Z\u00b0\u00b5$][\w/^\u00b2\u00b3-]{{0,14}}){{0,2}}"
_FINAL_NUMBER = re.compile(rf"{BEFORE}({NUMBER}{PERCENT}){_UNIT}[\s.!)*_$]*$")
_ONLY_NUMBER = re.compile(rf"({NUMBER}{PERCENT}){_UNIT}[\s.!]*")
# Behind it a number is a reference and answers nothing, and so is a year that an event is in.
_REFERENCE = re.compile(
    r"\b(?:sections?|sub-?sections?|act|articles?|chapter|clause|rule|schedule|type|page|part|figure|step|no|s)\b[\s.,(]*$",
    re.IGNORECASE,
)
_YEAR, _BEFORE_YEAR = re.compile(r"1[5-9]\d\d|20\d\d"), re.compile(r"(?:\b(?:in|of|since|by|from|until|and|to)|,)\s*$")

_MARKED = re.compile(r"####[ \t]*(\S[^\n]*)")
_STATED = re.compile(
    r"(?:\banswer\s*\**\s*:|\banswer(?:\s+to\s+[^\n.:]{1,80})?\s+is\b\s*:?)\s*\**\s*(\S[^\n]*?)\**(?=\.(?:\s|$)|, [a-z]|\n|$)",
    re.IGNORECASE,
)
# A and I are words too, where one goes on behind them.
_LETTER = r"\(?([B-HJ]|[AI](?!\s+(?!is\b|because\b|since\b)[a-z]))(?![\w'])\)?"
_LETTER_STATED = re.compile(
    rf"\b(?i:answer|correct (?:option|choice))\s*\**\s*(?::|\bis\b)+\s*\**\s*(?i:option\s+|choice\s+)?{_LETTER}"
    r"|\b(?i:option|choice)\s+\(?([A-J])\)?\s+is\s+(?i:correct|right|the)\b"
)
_ONLY_LETTER = re.compile(r"\**\(?([A-J])[).:]?\**\.?|\(?([A-J])\)\s[^\n]*")
_BARE_LETTER = re.compile(r"\(([A-J])\)|\b([B-HJ])\b")
_VERDICTS = frozenset({"yes", "no", "maybe", "true", "false"})
_SENTENCE = re.compile(r"[.!?][\"'\u2019\u201d)*_]*(?:\[\d+\])*$")
# A line that is none is an answer as it stands where it has few words, or is a command or an expression.
_FEW_WORDS = 6
_CODE_SIGN = re.compile(r"[|<>{}\[\];~`]|\w\(|=\S|\s--?\w|/\w|\*\.")


@dataclass(frozen=True)
class Answer:
    """What a text comes to."""

    text: str
    values: frozenset[Fraction] = frozenset()  # the number that it is; 50 % is 50 and 1/2; empty where it is none
    letter: str = ""  # of the choice that it is


def final_answer(text: str) -> Answer | None:
    """The answer that a text comes to; None where none can be told."""
    text = text.strip()
    stated = stated_answer(text)
    if stated is not None:
        return stated
    if letter := _group(_ONLY_LETTER.fullmatch(text)):
        return Answer(text, letter=letter)
    last = without_latex(text.rsplit("\n", 1)[-1])
    line = "\n" not in text and not _SENTENCE.search(text)
    if line and _CODE_SIGN.search(last):
        return Answer(text)
    number = _FINAL_NUMBER.search(last)
    if number is not None and not _refers(last[: number.start(1)], number.group(1)):
        return Answer(number.group(), values_of(number.group(1)))
    return Answer(text) if line and len(text.split()) <= _FEW_WORDS else None


def stated_answer(text: str) -> Answer | None:
    """The answer that a text marks or names as such; None where it does not."""
    marked = _MARKED.findall(text)
    inside = marked[-1] if marked else _boxed(text)
    if inside is not None:
        return _read(inside)
    letters = [_group(match) for match in _LETTER_STATED.finditer(text)]
    if letters:
        return Answer(letters[-1], letter=letters[-1])
    stated = _STATED.findall(text)
    return _read(stated[-1]) if stated else None


def contradicts(original: str, rewrite: str) -> bool:
    """Whether the original comes to an answer that can be told and the rewrite does not come to the same one.

    Where the rewrite marks or states no answer its last number counts, the last letter that it names, or for other answers that
    it has them at all; yes, no and their like must be its first or its last word.
    """
    answer = final_answer(original)
    if answer is None:
        return False
    stated = stated_answer(rewrite)
    if answer.letter:
        return _letter(rewrite, stated) != answer.letter
    if answer.values:
        numbers = [stated.values] if stated is not None and stated.values else all_numbers(rewrite)
        return not numbers or not answer.values & numbers[-1]
    if stated is not None and _plain(stated.text) == _plain(answer.text):
        return False
    words = re.findall(r"\w+", rewrite.lower())
    if answer.text.lower().strip(" .*") in _VERDICTS:
        return stated is not None or answer.text.lower().strip(" .*") not in words[:1] + words[-1:]
    return not _holds(rewrite, answer.text)


def _read(text: str) -> Answer:
    plain = without_latex(text).strip().strip("$").strip()
    letter = re.fullmatch(r"\(?([A-J])\)?\.?", plain)
    number = _ONLY_NUMBER.fullmatch(plain.rpartition("=")[2].strip())
    return Answer(text.strip(), values_of(number.group(1)) if number else frozenset(), letter.group(1) if letter else "")


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


def _letter(rewrite: str, stated: Answer | None) -> str:
    if stated is not None and stated.letter:
        return stated.letter
    if only := _group(_ONLY_LETTER.fullmatch(rewrite.strip())):
        return only
    letters = [_group(match) for match in _BARE_LETTER.finditer(rewrite)]
    return letters[-1] if letters else ""


def _refers(before: str, number: str) -> bool:
    year = _YEAR.fullmatch(number) is not None and _BEFORE_YEAR.search(before) is not None
    return year or _REFERENCE.search(before) is not None


def _group(match: re.Match[str] | None) -> str:
    return next((group for group in match.groups() if group), "") if match else ""


def _holds(text: str, answer: str) -> bool:
    if re.fullmatch(r"[\w '-]+", answer):
        words = r"\s+".join(map(re.escape, answer.split()))
        return re.search(rf"\b{words}\b", text, re.IGNORECASE) is not None
    return _plain(answer) in _plain(text)


def _plain(text: str) -> str:
    return re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"[\s$]|\.(?!\d)|\\[,;:! ]", "", text)).lower()
