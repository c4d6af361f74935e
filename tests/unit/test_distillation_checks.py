import pytest

from finescope.distillation import checks
from finescope.distillation.checks import rejection

ORIGINAL = "Return the sum of the numbers of a list of numbers."
RUSSIAN = "Верните сумму всех чисел из данного списка чисел."
DUTCH = "Het is de som van alle getallen die in de lijst staan, en niet van een deel van de lijst die men te zien krijgt."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("  ", checks.EMPTY),
        (RUSSIAN, checks.LANGUAGE),
        ("### Response:\nGives back the sum of the numbers.", checks.ECHO),
        ("Here it is in my own words: the sum of the numbers.", checks.ECHO),
        ("The rewritten text gives back the sum.", checks.ECHO),
        ("I'm sorry, but I cannot help with this", checks.REFUSAL),
        ("I\u2019m sorry, I don\u2019t understand.", checks.REFUSAL),
        ("As an AI language model I have no list.", checks.REFUSAL),
        ("Please provide the list of numbers.", checks.REFUSAL),
        ("I'd be happy to sum your numbers.", checks.REFUSAL),
        ("I am unable to sum numbers.", checks.REFUSAL),
        ("Gives back the sum of the", checks.UNFINISHED),
        ("Gives back the sum of these numbers,", checks.UNFINISHED),
        ("Gives back their sum:\n```\nsum(numbers)", checks.UNFINISHED),
        ("Sum", checks.TOO_SHORT),
        ("word " * 10 + " ".join(f"w{i}" for i in range(100)), checks.TOO_LONG),
        ("the same four words the same four words the same four words the same four words", checks.REPETITION),
        ("sum " + "na" * 30, checks.REPETITION),
        ("Gives back the sum of all the numbers in the list", ""),
        ("Gives back the sum, and is sorry for nothing.", ""),
        ("Adds up what is in the list; please add the list.", ""),
        ("This is the text for a sum of numbers.", ""),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    assert rejection(ORIGINAL, text, finished=True) == reason


def test_a_budget_that_ran_out_is_a_reason() -> None:
    assert rejection(ORIGINAL, "The sum of a list of numbers is given back.", finished=False) == checks.CUT_OFF


def test_the_answer_comes_before_all_else() -> None:
    assert rejection("The total is 7.", "I'm sorry, I cannot help. It is 8.", finished=True) == checks.CONTRADICTION
    code = "def f(x):\n    return x"
    assert rejection(code, "I'm sorry, I cannot help.", finished=True) == checks.CODE_LOST


@pytest.mark.parametrize(
    ("original", "text", "reason"),
    [
        # The answer is the same and the way to it is not.
        (
            "She has 3 * 4 = 12 hens, and 15 - 12 = 3 left.\n#### 3",
            "15 birds less 3 * 4 = 14 is 3.\n#### 3",
            checks.MISCALCULATION,
        ),
        ("She has 3 * 4 = 12 hens, and 15 - 12 = 3 left.\n#### 3", "15 birds less 3 * 4 = 12 is 3.\n#### 3", ""),
        ("Some 65 % have the one gene, and 5 % the other.", "Some 65 % have the one gene, the rest others.", checks.NUMBER_LOST),
        ("Some 65 % have the one gene, and 5 % the other.", "5 % have the other gene, and 65 percent the one.", ""),
        (
            "It may be that you have Redpox or Blue Fever.",
            "It may be that you are ill, or have something else.",
            checks.NAMES_LOST,
        ),
        ("It may be that you have Redpox or Blue Fever.", "You may have redpox, or else the blue fever.", ""),
        ("We have $\\frac{1}{2} + \\frac{1}{2} = \\boxed{1}$.", "Two halves make $\\boxed{\\frac{2}{2}$", checks.UNFINISHED),
    ],
)
def test_what_is_said_of_numbers(original: str, text: str, reason: str) -> None:
    assert rejection(original, text, finished=True) == reason


SHELL = '#!/bin/sh\n\nfor name in *.log\ndo\n    gzip "$name"\ndone'
STEPS = "A pen costs 2 * $3 = $6.\nTwo pens cost 2 * $6 = $12.\nSo $20 - $12 = $8 is left.\n#### 8"
REMEDY = "Rest is what helps most. For 3 days drink a lot, and call a doctor where it has not gone then."


@pytest.mark.parametrize(
    ("original", "text", "reason"),
    [
        (SHELL, f"{SHELL}\n```", checks.UNFINISHED),
        (SHELL, f"```sh\n{SHELL}\n```", ""),
        (SHELL, f"### Instruction:\nPack the logs.\n\n### Reference response:\n{SHELL}", checks.ECHO),
        ("ls -l | wc -l", "### Reference response:\nls -l | wc -l", checks.ECHO),
        ("ls -l | wc -l", "This shell command counts the files of a directory.", checks.CONTRADICTION),
        ("It does not help.\nAnswer: no", "It does not help.", checks.CONTRADICTION),
        (STEPS, "The answer is 8.", checks.TOO_SHORT),
        (STEPS, STEPS.replace("2 * $6 = $12", "2 * $6 = $8"), checks.MISCALCULATION),
        (STEPS, STEPS.replace("A pen costs", "One pen is"), ""),
        (REMEDY, "The answer to this question is:", checks.UNFINISHED),
        (REMEDY, "I'm here to help you with all of your questions, and can tell you of 3 days of rest.", checks.REFUSAL),
        (REMEDY, "I'm sorry for your pain, but I'm happy to help. Drink a lot, and call a doctor in 3 days.", checks.REFUSAL),
        (REMEDY, "Rest helps most. Drink a lot and see a doctor if it is still there.", checks.NUMBER_LOST),
        (REMEDY, "What helps most is rest. Drink a lot for 3 days, and see a doctor if it is still there.", ""),
    ],
)
def test_shapes_of_what_a_small_model_writes(original: str, text: str, reason: str) -> None:
    assert rejection(original, text, finished=True) == reason


@pytest.mark.parametrize(
    ("original", "text"),
    [
        ("I'm sorry, but I cannot come.", "I am sorry, but I cannot be there."),
        ("### Response:\nThe sum.", "### Response:\nA sum."),
        ("It has values of a kind.\nOf the kind:", "It has some values of a kind.\nOf this kind:"),
        ("la la la la " * 8 + "and so on.", "la la la la " * 7 + "and so on."),
        (RUSSIAN, "Сложите все числа, которые есть в списке."),
        (DUTCH, DUTCH.replace("alle", "al de")),
    ],
)
def test_what_the_original_does_too_is_no_reason(original: str, text: str) -> None:
    assert rejection(original, text, finished=True) == ""


def test_the_last_number_of_code_is_no_answer() -> None:
    code = "def f(x):\n    return x\nprint(f(1))  # 20"
    assert rejection(code, code.replace("20", "twenty"), finished=True) == ""


def test_code_is_in_no_language() -> None:
    code = "\n".join(["import os", *(f"der_{i} = os.path.join('die', 'das', 'und', 'nicht')" for i in range(4))])
    text = "\n".join(["import os", *(f"the_{i} = os.path.join('the', 'of', 'and', 'that')" for i in range(4))])
    assert rejection(code, text, finished=True) == ""
