from fractions import Fraction

import pytest

from finescope.distillation.numbers import all_numbers, loses_numbers, miscalculates


def test_numbers_are_found_however_they_are_written() -> None:
    text = "1. Of 1,200 we keep $\\frac{1}{2}$, 2 1/2 a head, 40% or \u22123;\n2. x_{12}, m^2, v1.0, 3:30 and 4/25/2019 are none."
    halves = [{1200}, {Fraction(1, 2)}, {Fraction(5, 2)}, {40, Fraction(2, 5)}, {-3}]
    assert all_numbers(text) == halves


@pytest.mark.parametrize(
    ("original", "rewrite", "lost"),
    [
        ("It was 5 of 12.", "Of 12 it was 5.", False),
        ("It was 5 of 12.", "It was 5.", True),
        ("It was 50%.", "It was 1/2.", False),
        ("1. It was 5.\n2. It was 7.", "It was 5, then 7.", False),
        ("None.", "None at all.", False),
        ("It was 1,250.", "It was 1250, 3 times.", False),
    ],
)
def test_numbers_that_are_lost(original: str, rewrite: str, lost: bool) -> None:
    assert loses_numbers(original, rewrite) is lost


@pytest.mark.parametrize(
    "text",
    [
        "2.5 x 8 = 20",
        "$72 - $16 = $56 change",
        "60 + 6 + 4 = 70",
        "$60 + $6 - $4 = $62",
        "10 / 3 = 3.33",
        "10/3 = 3",
        "2 \\cdot 3 = 6",
        "18 + 6 = 2 * 12",
        "600 * 10% = 60",
        "2^2 + 3 = 7",
        "(3 + 4) / 2 = 3.5",
        "1/3 = 2/6",
        "1.5 * 10 = $15.00",
        "-3 + 5 = 2",
        "3 * x = 12",
        "1,000 - 1 = 999.",
        "No number here.",
    ],
)
def test_sums_that_are_right_or_not_read(text: str) -> None:
    assert not miscalculates(text)


@pytest.mark.parametrize(
    "text",
    [
        "2.5 x 8 = 18",
        "$72 - $16 = $28 change",
        "so 20/40 = $0.04.",
        "2 + 2 = 5",
        "10 / 3 = 3.5",
        "10*8=108 minutes",
        "1 \u00f7 0 = 1",
    ],
)
def test_sums_that_are_wrong(text: str) -> None:
    assert miscalculates(text)
