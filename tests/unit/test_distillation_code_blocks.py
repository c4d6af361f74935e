import pytest

from finescope.distillation.code_blocks import loses_code, python_names

ADD = "def add(a, b):\n    return a + b"
FENCED = f"Use this:\n```python\n{ADD}\n```\nIt adds."
C = '#include <stdio.h>\nint main() {\n    puts("hi");\n    return 0;\n}'


def test_python_is_told_from_what_merely_parses() -> None:
    assert python_names(ADD) == {"add"}
    assert python_names("import os\nfrom re import sub as s\nprint(os.name)") == {"os", "s"}
    assert python_names("x = 1\nprint(x)") == frozenset()
    for text in ("word", "x = 5", "a, b", "not applicable", "Return the sum.", "def add(a, b)", "one\ntwo"):
        assert python_names(text) is None


@pytest.mark.parametrize(
    ("original", "rewrite"),
    [
        (ADD, "def add(first, second):\n    return first + second"),
        (ADD, FENCED),
        (FENCED, ADD),
        (FENCED, f"The function:\n```\n{ADD}\n```"),
        ('{"a": 1}', '```json\n{"a": 2}\n```'),
        ("[1, 2]", "[2, 1]"),
        (C, f"A program:\n```c\n{C}\n```"),
        ("Plain prose has no code in it.", "There is no code in this."),
        ("x = 5", "x is 5"),
        ("\\begin{align*}\nx &= 1;\\\\\ny &= \\boxed{2}\n\\end{align*}", "x is 1 and y is 2"),
    ],
)
def test_code_that_is_kept(original: str, rewrite: str) -> None:
    assert not loses_code(original, rewrite)


@pytest.mark.parametrize(
    ("original", "rewrite"),
    [
        (ADD, "A function that adds two numbers."),
        (ADD, "def add(a, b)\n    return a + b"),  # no colon
        (f"import math\n{ADD}", ADD),
        (ADD, "def plus(a, b):\n    return a + b"),  # what calls it would fail
        (ADD, f"{ADD}\n```\n"),  # a fence that was never opened
        (FENCED, "Use the function add, which adds."),
        ('{"a": 1}', '{"a": 1'),
        ('{"a": 1}', "[1]"),
        (C, "A program that says hi."),
    ],
)
def test_code_that_is_lost(original: str, rewrite: str) -> None:
    assert loses_code(original, rewrite)
