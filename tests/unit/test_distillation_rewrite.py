import pyarrow as pa
import pytest
import torch
from distillation_fixtures import tiny_llama, tiny_tokenizer

from finescope import schemas
from finescope.distillation import checks, rewrite
from finescope.distillation.generate import generate

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
    ("Nothing to extract here", "Anything at all 5", False),
    ("#### x + 1", "#### x+1", False),
]


@pytest.mark.parametrize(("original", "text", "expected"), ANSWERS)
def test_final_answers(original: str, text: str, expected: bool) -> None:
    assert checks.contradicts(original, text) is expected


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


def naive(model: torch.nn.Module, prompt: list[int], budget: int, ends: frozenset[int]) -> tuple[list[int], bool]:
    written: list[int] = []
    while len(written) < budget:
        token = int(model(input_ids=torch.tensor([prompt + written])).logits[0, -1].argmax())
        if token in ends:
            return written, True
        written.append(token)
    return written, False


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
@pytest.mark.parametrize("shared", [0, 6])
def test_generation_equals_one_row_at_a_time_without_a_cache(batch_tokens: int, shared: int) -> None:
    model = tiny_llama()
    generator = torch.Generator().manual_seed(1)
    head = torch.randint(3, 259, (shared,), generator=generator).tolist()
    prompts = [head + torch.randint(3, 259, (length,), generator=generator).tolist() for length in (3, 17, 9, 30, 1)]
    budgets, ends = [70, 5, 80, 1, 12], frozenset(range(0, 259, 5))
    told: list[int] = []
    found = generate(model, prompts, budgets, ends, batch_tokens, told.append)
    with torch.inference_mode():
        expected = [naive(model, *row, ends) for row in zip(prompts, budgets, strict=True)]
    assert [(row.tokens, row.finished) for row in found] == expected
    assert sum(told) == 5
    assert any(finished for _, finished in expected)
    assert not all(finished for _, finished in expected)


def documents() -> pa.Table:
    rows = {
        "doc_id": ["a", "b", "c", "d"],
        "prompt": pa.array(["1+1?", None, None, "?"], pa.string()),
        "response": ["two", "some text", "x" * 50, "never looked at"],
    }
    return rewrite.select_first(pa.table(rows), 0.75)


def test_rows_in_are_rows_out_with_a_reason_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    asked: list[str] = []

    def scripted(model, prompts, budgets, ends, batch_tokens, progress):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        progress(len(prompts))
        answers = [("Here is the text:\n\n2, that is two", True), ("other", False)]
        return [rewrite_result(tokenizer.encode(text), finished) for text, finished in answers]

    monkeypatch.setattr(rewrite, "generate", scripted)
    told: list[int] = []
    table = rewrite.Rewriter(tiny_llama(), tokenizer, 40, 4096)(documents(), told.append)
    assert table.schema == schemas.REWRITES
    assert table.column("used").to_pylist() == ["rewrite", "original", "original", "original"]
    assert table.column("reason").to_pylist() == ["", checks.CUT_OFF, rewrite.REFERENCE_TOO_LONG, rewrite.NOT_SELECTED]
    assert table.column("response").to_pylist() == ["2, that is two", "some text", "x" * 50, "never looked at"]
    assert table.column("response_original").to_pylist() == documents().column("response").to_pylist()
    assert sum(told) == 4
    assert "1+1?" in asked[0]
    assert "two" in asked[0]
    assert asked[0].endswith("<s>assistant\n")


def rewrite_result(tokens: list[int], finished: bool) -> object:
    from finescope.distillation.generate import Generated

    return Generated(tokens, finished)


def test_real_model_keeps_every_row_and_repeats_itself() -> None:
    rewriter = rewrite.Rewriter(tiny_llama(), tiny_tokenizer(), 40, 4096)
    once, again = (rewriter(documents(), lambda _: None) for _ in range(2))
    assert once.equals(again)
    assert once.num_rows == 4


def test_prompt_beyond_the_context_is_named() -> None:
    table = rewrite.select_first(pa.table({"doc_id": ["a"], "prompt": ["p" * 600], "response": ["r"]}), 1.0)
    out = rewrite.Rewriter(tiny_llama(), tiny_tokenizer(), 40, 4096)(table, lambda _: None)
    assert out.column("reason").to_pylist() == [rewrite.PROMPT_TOO_LONG]
