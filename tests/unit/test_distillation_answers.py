from fractions import Fraction

import pytest

from finescope.distillation.answers import contradicts, final_answer

VALUES = [
    ("6 * 7 = 42\n#### 42", 42),
    ("#### 1,200", 1200),
    ("In all \\boxed{1{,}200} ways.", 1200),
    ("It weighs 1\u202f200 g", 1200),
    ("It weighs 1 200 000 g.", 1_200_000),
    ("In 2019 300 came, of 2019 400", 400),
    ("so \\boxed{\\frac{1}{2}}", Fraction(1, 2)),
    ("so $x = \\boxed{-\\dfrac{3}{4}}$.", Fraction(-3, 4)),
    ("so $y=\\frac12$.", Fraction(1, 2)),
    ("We need \\boxed{2\\frac{1}{2}} cups.", Fraction(5, 2)),
    ("We need 2 1/2 cups.", Fraction(5, 2)),
    ("x = 5", 5),
    ("Thus $x = 5$.", 5),
    ("Hence x equals .25", Fraction(1, 4)),
    ("The area is 12 square meters.", 12),
    ("The area is $12\\text{ cm}^2$.", 12),
    ("The area is 12 cm\u00b2.", 12),
    ("It went at 60 km/h.", 60),
    ("He owes \u2212$1,250.50.", Fraction("-1250.50")),
    ("(9 + 5) / 2\nAnswer: 7 thousand", 7),
    ("Therefore the answer is **14**.", 14),
    ("**Answer:** 14 dollars", 14),
    ("The angle is $30^\\circ$.", 30),
    ("Renewal Term: successive 5 years", 5),
    ("It is 1995.", 1995),
    ("It won by a vote of 7 to 0.", 0),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_number_is_read(text: str, value: int | Fraction) -> None:
    answer = final_answer(text)
    assert answer is not None
    assert answer.values == {value}


def test_a_percentage_is_a_share_too() -> None:
    for text in ("The margin is 40%.", "It is 40 percent.", "#### 40 %", "So \\boxed{40\\%}."):
        answer = final_answer(text)
        assert answer is not None
        assert answer.values == {40, Fraction(2, 5)}


@pytest.mark.parametrize(
    "text",
    [
        "Nothing to extract here.",
        "The act came into force in 1995 in all of India.",
        "See section 3.2.1.",
        "It is dealt with in section 41.",
        "Repealed by the Shipping Act, 1921 (7 of 1921), S. 12.",
        "It was first seen in 1995.",
        "There are type 1 and type 2.",
        "So they say.[31]",
        "It was signed on 4/25/2019.",
        "The meeting is at 10:30.",
        "Use f(3) for it, or x_{12}.",
        "Step 1 of 3 and then go on.",
    ],
)
def test_no_number_is_read_where_none_is_the_answer(text: str) -> None:
    assert final_answer(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("C) Paris", "C"),
        ("**D**", "D"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The answer is C.", "C"),
        ("The answer is (C).", "C"),
        ("The correct answer is option D because of the cold.", "D"),
        ("Option A is correct, as water boils.", "A"),
        ("A is too low.\n#### E", "E"),
        ("So the choice is \\boxed{\\text{(A)}}.", "A"),
    ],
)
def test_a_letter_is_read(text: str, letter: str) -> None:
    answer = final_answer(text)
    assert answer is not None
    assert answer.letter == letter


@pytest.mark.parametrize(
    "text",
    [
        "The answer is a matter of taste.",
        "I think so.",
        "A cat sat on it.",
        "Vitamin B is needed.",
        "I answer C questions.",
        "A. B. Writer",
    ],
)
def test_no_letter_is_read_where_none_is_the_answer(text: str) -> None:
    answer = final_answer(text)
    assert answer is None or not answer.letter


SAME = [
    # original, rewrite
    ("6 * 7 = 42\n#### 42", "Six sevens are 42.\n#### 42"),
    ("#### 1,200", "So she has $1200 in all.\n#### $1200.00"),
    ("#### 42", "It is 42"),
    ("so \\boxed{\\frac{1}{2}}", "hence \\boxed{\\frac{1}{2}}"),
    ("so \\boxed{\\frac{1}{2}}", "hence $\\frac{1}{2}$ holds"),
    ("so \\boxed{\\frac{1}{2}}", "hence it is 0.5"),
    ("so \\boxed{[0, 25]}", "hence \\boxed{[0,25]}"),
    ("so \\boxed{\\dfrac{\\pi}{2}}", "hence it is $\\frac{\\pi}{2}$."),
    ("The total is 7 apples.", "There are 3 and 4 apples, 7 in all."),
    ("The total is 7 apples.", "The answer is 7, as 3 + 4 = 7 and not 8"),
    ("The ratio is 1/2.", "Half of it, 0.5"),
    ("The share is 25%.", "It is a share of 1/4"),
    ("A quarter, 0.25", "That is 25 percent"),
    ("It is 12 square meters.", "The area comes to 12 m^2."),
    ("#### x + 1", "#### x+1"),
    ("Nothing to extract here.", "Anything at all 5"),
    ("Answer: B", "(B) fits best."),
    ("Answer: B", "It must be B."),
    ("The answer is A.", "The answer is (A)."),
    ("It helps many.\nAnswer: no", "No, though it helps many."),
    ("It helps many.\nAnswer: no", "It helps many.\nAnswer: no"),
    ("firm handshake", "It is called a Firm\nHandshake."),
    ("tar xzf a.tgz", "`tar xzf a.tgz`"),
    ("find . -perm 0600", "Use `find . -perm 0600`."),
    ("Those who smoke for years have the highest risk of it", "The risk is highest for smokers."),
    ("It won by a vote of 7 to 0.", "By 7 to 0 it won."),
]
OTHER = [
    ("#### 42", "#### 41"),
    ("#### 42", "It is forty-two"),
    ("#### 42", "First 42, then 43"),
    ("#### 1.5x", "#### 15x"),
    ("so \\boxed{\\frac{1}{2}}", "hence \\boxed{\\frac{1}{3}}"),
    ("so \\boxed{[0, 25]}", "hence \\boxed{(0,25]}"),
    ("The total is 7 apples.", "There are 3 and 4 apples, 8 in all."),
    ("The share is 25%.", "It is a share of 1/5"),
    ("It is 12 square meters.", "The area comes to 2 m^12."),
    ("Answer: B", "Answer: C"),
    ("Answer: B", "It grows in the sun."),
    ("The answer is A.", "A plant grows in the sun."),
    ("It helps many.\nAnswer: no", "It helps many."),
    ("It helps many.\nAnswer: no", "There is no doubt that it helps many.\nAnswer: yes"),
    ("It helps many.\nAnswer: no", "There is no doubt that it helps many."),
    ("firm handshake", "It is called a hug."),
    ("gas", "It is called gasoline."),
    ("find . -perm 0600", "It looks for files with permission 0600"),
    ("squares = [n * n for n in range(10)]", "The squares of the numbers below 10"),
    ("3,034; 284 thousand", "It was 3,043 and then 284 thousand"),
    ("Due Date: 4/25/2019", "The due date is 5/24/2019"),
    ("tar xzf a.tgz", "The command unpacks an archive."),
]


@pytest.mark.parametrize(("original", "rewrite"), SAME)
def test_the_same_answer_is_no_contradiction(original: str, rewrite: str) -> None:
    assert not contradicts(original, rewrite)


@pytest.mark.parametrize(("original", "rewrite"), OTHER)
def test_another_answer_is_one(original: str, rewrite: str) -> None:
    assert contradicts(original, rewrite)
