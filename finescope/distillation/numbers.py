"""Numbers in a text, whatever they are written in: `1,200`, `\\frac{1}{2}`, `2 1/2`, `40%`; and the sums done with them."""

import re
from fractions import Fraction

_CURRENCY = r"[$\u20ac\u00a3]"
_DECIMAL = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
NUMBER = rf"[-+]?{_CURRENCY}?(?:\d+ \d+/\d+|{_DECIMAL}(?:/\d[\d,]*)?)"
PERCENT = r"(?:\s*(?:%|percent\b))?"
# Neither part of a name, a date, a time, an index or an exponent; `3-5` is a range.
BEFORE = r"(?<![\w.^/:])(?<!\^\{)(?<!_\{)"
_ANY_NUMBER = re.compile(rf"{BEFORE}{NUMBER}(?!\d|[/:]\d){PERCENT}")
_ENUMERATOR = re.compile(r"^\s*(?:\(?\d+[.)]|(?:Step )?\d+:)\s", re.MULTILINE)
# One operation on two numbers; neither side is part of a longer expression.
_OPERAND = rf"{_CURRENCY}?({_DECIMAL})"
_SIGN = r"[-+*/x\u00d7\u00f7]"
_SUM = re.compile(
    rf"(?<![-+*/x\u00d7\u00f7^(\d.,$\u20ac\u00a3])(?<![-+*/x\u00d7\u00f7] ){_OPERAND}\s*({_SIGN})\s*{_OPERAND}\s*=\s*{_OPERAND}"
    r"(?![\d.,]*(?:\s*[-+*/\u00d7\u00f7^%]|\s*x\s*\d|\w))"
)

_LATEX = (
    (re.compile(r"(?<=\d)\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"\\(?:cdot|times)\b"), "*"),
    (re.compile(r"\^\{?\\circ\}?"), " degrees"),
    (re.compile(r"(?<=[a-zA-Z)])\^\{?\d+\}?"), ""),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"(?<![\d.,])(\d{1,3})[ \u00a0\u202f](?=\d{3}(?:\D|$))"), r"\1"),
)


def values_of(number: str) -> frozenset[Fraction]:
    """What a match of NUMBER and PERCENT is worth; 50 % is 50 and 1/2. Empty for a division by zero."""
    percent = number.endswith(("%", "percent"))
    plain = re.sub(rf"{_CURRENCY}|,|%|percent", "", number).strip()
    whole, _, rest = plain.rpartition(" ")
    numerator, _, denominator = rest.partition("/")
    if denominator and not int(denominator):
        return frozenset()
    value = Fraction(numerator) / Fraction(denominator or 1)
    if whole:
        value = Fraction(whole) + (-value if whole.startswith("-") else value)
    return frozenset({value, value / 100} if percent else {value})


def all_numbers(text: str) -> list[frozenset[Fraction]]:
    """The numbers of a text in order, those that count its lines left out."""
    plain = _ENUMERATOR.sub("", without_latex(text))
    return [values_of(match.group()) for match in _ANY_NUMBER.finditer(plain)]


def loses_numbers(original: str, rewrite: str) -> bool:
    """Whether a number of the original is nowhere in the rewrite."""
    found = frozenset[Fraction]().union(*all_numbers(rewrite))
    return any(number and not number & found for number in all_numbers(original))


def miscalculates(text: str) -> bool:
    """Whether a text says of two numbers that they make a third and they do not; what is rounded may be off in its last digit."""
    for first, sign, second, result in _SUM.findall(without_latex(text)):
        one, other, said = (Fraction(part.replace(",", "").rstrip(".")) for part in (first, second, result))
        divided = sign in "/\u00f7"
        if divided and not other:
            return True
        made = {"+": one + other, "-": one - other}.get(sign, one / other if divided else one * other)
        digits = len(result.partition(".")[2])
        exact = not divided and made.denominator == 1 and not digits
        if abs(made - said) > (0 if exact else Fraction(1, 10**digits)):
            return True
    return False


def without_latex(text: str) -> str:
    """The text with LaTeX's ways of writing numbers, units and spaces turned into plain ones."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text
