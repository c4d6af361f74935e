import pytest

from finescope.distillation import answers, checks

ANSWERS = [
    # original, rewrite, contradicts
    ("6 * 7 = 42\n#### 42", "Six sevens are 42.\n#### 42", False),
    ("#### 42", "#### 41", True),
    ("#### 1,200", "So she has $1200 in all.\n#### $1200.00", False),
    ("#### 42", "It is 42", False),
    ("#### 42", "It is forty-two", True),
    ("so \\boxed{\\frac{1}{2}}", "hence \\boxed{\\frac{1}{2}}", False),
    ("so \\boxed{\\frac{1}{2}}", "hence \\boxed{\\frac{1}{3}}", True),
    ("so \\boxed{\\frac{1}{2}}", "hence $\\frac{1}{2}$ holds", False),
    ("The total is 7 apples.", "There are 3 and 4 apples, 7 in all.", False),
    ("The total is 7 apples.", "There are 3 and 4 apples, 8 in all.", True),
    ("The ratio is 1/2.", "Half of it, 0.5", False),
    ("Nothing to extract here.", "Anything at all 5", False),
    ("#### x + 1", "#### x+1", False),
]


@pytest.mark.parametrize(("original", "text", "expected"), ANSWERS)
def test_final_answers(original: str, text: str, expected: bool) -> None:
    assert answers.contradicts(original, text) is expected


@pytest.mark.parametrize(
    ("text", "finished", "reason"),
    [
        ("  ", True, checks.EMPTY),
        ("The sum of a list of numbers is given back", False, checks.CUT_OFF),
        ("Sum", True, checks.TOO_SHORT),
        ("word " * 10 + " ".join(f"w{i}" for i in range(100)), True, checks.TOO_LONG),
        ("the same four words the same four words the same four words the same four words", True, checks.REPETITION),
        ("I'm sorry, but I cannot help with this", True, checks.REFUSAL),
        ("Gives back the sum of all the numbers in the list", True, ""),
    ],
)
def test_rejections(text: str, finished: bool, reason: str) -> None:
    assert checks.rejection("Return the sum of the numbers of a list of numbers.", text, finished) == reason
