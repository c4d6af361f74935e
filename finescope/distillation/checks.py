"""Whether a rewrite may stand for the original: its answer and its code first, then language, form, length and repetition."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from finescope.distillation.answers import contradicts, stated_answer
from finescope.distillation.code_blocks import looks_like_code, loses_code, python_names
from finescope.distillation.language import other_language
from finescope.distillation.numbers import loses_numbers, miscalculates

# The reasons. A rewrite that passes has the reason "".
EMPTY = "empty"
CUT_OFF = "cut off before its end"
CODE_LOST = "code is missing or does not parse"
CONTRADICTION = "final answer differs"
MISCALCULATION = "an equation in it is false"
LANGUAGE = "another language"
ECHO = "repeats the instruction"
REFUSAL = "refusal"
UNFINISHED = "ends within a sentence"
NUMBER_LOST = "a number is missing"
NAMES_LOST = "most names are missing"
TOO_SHORT = "too short"
TOO_LONG = "too long"
REPETITION = "degenerate repetition"

_LEAST_SHARE, _MOST_SHARE = 0.5, 2.5  # characters of a rewrite over those of the original
_SPARE_CHARACTERS = 100  # a one-line original may grow by so much all the same
_REFUSAL = re.compile(
    r"\bi(?:['\u2019]m| am) (?:(?:\w+ )?sorry(?: \w+){0,4},? (?:but|i\b|as\b)|unable to|not able to|here to)"
    r"|\bi apologi[sz]e\b|\bi must decline|\bi (?:won['\u2019]t|will not)\b|\bi(?:['\u2019]d| would) be (?:happy|glad) to"
    r"|\b(?:i|we) can(?:no|['\u2019])t (?:\w+ )?"
    r"(?:help|assist|provide|rewrite|do|answer|comply|fulfil|complete|generate|write|give)"
    r"|\bi don['\u2019]t have (?:access|enough|any information|the ability)"
    r"|\b(?:please|could you) (?:provide|share|specify|clarify)"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    re.IGNORECASE,
)
# The words of the request (rewrite.py), and what models call that which they were asked for.
_ECHO = re.compile(
    r"#+ ?(?:instructions?|reference response|response|text)\b|reference (?:response|text)|in (?:your|my) own words"
    r"|(?:write|rewrite) the (?:response|text)|re-?written (?:response|text|version)"
    r"|keep (?:its meaning|every (?:fact|step|number))",
    re.IGNORECASE,
)
# A capital where no sentence begins.
_NAME = re.compile(r"(?<=[\w,;] )[A-Z][\w-]+")
_LOOP = re.compile(r"(.{1,40}?)\1{11,}", re.DOTALL)
# What no sentence ends with.
_OPEN = re.compile(
    r"(?:[,:(\[{\u2013-]|\b(?:a|an|the|of|and|or|to|with|for|from|by|at|as|that|which|is|are|was|were|be|because|if|than|such|its"
    r"|their))$",
    re.IGNORECASE,
)


def rejection(original: str, rewrite: str, finished: bool) -> str:
    """Why `rewrite` may not replace `original`; empty where it may. `finished`: the model ended it by itself."""
    if not rewrite.strip():
        return EMPTY
    if not finished:
        return CUT_OFF
    code = _is_code(original)
    failed = (check.reason for check in _CHECKS if not (code and check.of_prose) and check.fails(original, rewrite))
    return next(failed, "")


def _is_code(text: str) -> bool:
    return python_names(text) is not None or looks_like_code(text)


def _miscalculates(original: str, rewrite: str) -> bool:
    return miscalculates(rewrite) and not miscalculates(original)


def _only_rewrite(pattern: re.Pattern[str]) -> Callable[[str, str], bool]:
    return lambda original, rewrite: pattern.search(rewrite) is not None and pattern.search(original) is None


def _ends_open(original: str, rewrite: str) -> bool:
    return _open(rewrite) and not _open(original)


def _open(text: str) -> bool:
    # Within a fence, a brace or a sentence.
    return text.count("```") % 2 == 1 or text.count("{") > text.count("}") or _OPEN.search(text.strip()) is not None


def _loses_numbers(original: str, rewrite: str) -> bool:
    # Who comes to the same answer may do so by other numbers.
    return stated_answer(original) is None and loses_numbers(original, rewrite)


def _loses_names(original: str, rewrite: str) -> bool:
    names = {name.lower() for name in _NAME.findall(original)}
    kept = sum(name in rewrite.lower() for name in names)
    return stated_answer(original) is None and 2 * kept < len(names)


def _too_short(original: str, rewrite: str) -> bool:
    return len(rewrite) < _LEAST_SHARE * len(original)


def _too_long(original: str, rewrite: str) -> bool:
    return len(rewrite) > _MOST_SHARE * len(original) + _SPARE_CHARACTERS


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


@dataclass(frozen=True)
class _Check:
    reason: str
    fails: Callable[[str, str], bool]  # (original, rewrite)
    of_prose: bool = False  # it means nothing of an original that is code


# The first that fails gives the reason.
_CHECKS = (
    _Check(CODE_LOST, loses_code),
    _Check(CONTRADICTION, contradicts, of_prose=True),
    _Check(MISCALCULATION, _miscalculates, of_prose=True),
    _Check(LANGUAGE, other_language, of_prose=True),
    _Check(ECHO, _only_rewrite(_ECHO)),
    _Check(REFUSAL, _only_rewrite(_REFUSAL)),
    _Check(UNFINISHED, _ends_open),
    _Check(NUMBER_LOST, _loses_numbers, of_prose=True),
    _Check(NAMES_LOST, _loses_names, of_prose=True),
    _Check(TOO_SHORT, _too_short),
    _Check(TOO_LONG, _too_long),
    _Check(REPETITION, _repeats),
)
