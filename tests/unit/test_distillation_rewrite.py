import pyarrow as pa
import pytest
import torch
from distillation_fixtures import tiny_llama, tiny_tokenizer

from finescope import schemas
from finescope.distillation import checks, rewrite
from finescope.distillation.generate import Prompt, generate
from finescope.distillation.token_writer import TokenWriter, TransformersGenerator
from finescope.distillation.writer import Written, document_seed


def naive(model: torch.nn.Module, prompt: Prompt, ends: frozenset[int]) -> tuple[list[int], bool]:
    written: list[int] = []
    while len(written) < prompt.budget:
        token = int(model(input_ids=torch.tensor([prompt.tokens + written])).logits[0, -1].argmax())
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
    rests = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in (3, 17, 9, 30, 1)]
    prompts = [Prompt(head + rest, budget, 0) for rest, budget in zip(rests, (70, 5, 80, 1, 12), strict=True)]
    ends = frozenset(range(0, 259, 5))
    told: list[int] = []
    found = generate(model, prompts, ends, 0.0, batch_tokens, told.append)
    with torch.inference_mode():
        expected = [naive(model, prompt, ends) for prompt in prompts]
    assert [(row.tokens, row.finished) for row in found] == expected
    assert sum(told) == 5
    assert any(finished for _, finished in expected)
    assert not all(finished for _, finished in expected)


def documents() -> pa.Table:
    rows = {
        "doc_id": ["a", "b", "c", "d", "e"],
        "prompt": pa.array(["1+1?", None, None, "long", "?"], pa.string()),
        "response": ["two", "some text", "x" * 50, "short", "never looked at"],
    }
    return rewrite.select_first(pa.table(rows), 0.8)


def test_no_writer_is_made_where_nothing_is_rewritten() -> None:
    def unwanted():
        raise AssertionError("a teacher was loaded")

    nothing = rewrite.select_first(documents().drop_columns(["selected"]), 0.0)
    table = rewrite.Rewriter(unwanted, tiny_tokenizer(), 40)(nothing, lambda _: None)
    assert table.column("response").equals(nothing.column("response"))
    assert set(table.column("reason").to_pylist()) == {rewrite.NOT_SELECTED}


def test_rows_in_are_rows_out_with_a_reason_each() -> None:
    asked = []

    def scripted(tasks, progress):
        asked.extend(tasks)
        progress(len(tasks))
        return [Written("Here is the text:\n\n2, that is two", True), Written("other", False), None]

    told: list[int] = []
    table = rewrite.Rewriter(lambda: scripted, tiny_tokenizer(), 40)(documents(), told.append)
    assert table.schema == schemas.REWRITES
    assert table.column("used").to_pylist() == ["rewrite", "original", "original", "original", "original"]
    reasons = ["", checks.CUT_OFF, rewrite.REFERENCE_TOO_LONG, rewrite.PROMPT_TOO_LONG, rewrite.NOT_SELECTED]
    assert table.column("reason").to_pylist() == reasons
    assert table.column("response").to_pylist() == ["2, that is two", "some text", "x" * 50, "short", "never looked at"]
    assert table.column("response_original").to_pylist() == documents().column("response").to_pylist()
    assert sum(told) == 5
    assert [task.doc_id for task in asked] == ["a", "b", "d"]
    # One token a byte: half as many again as the original has, and 16, at most 40.
    assert [task.budget for task in asked] == [20, 29, 23]
    assert "1+1?" in asked[0].message
    assert "two" in asked[0].message


def writer(temperature: float, batch_tokens: int, seed: int = 0) -> TokenWriter:
    model, tokenizer = tiny_llama(tied=False), tiny_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # else it hardly looks at what stands before the last token
    return TokenWriter(TransformersGenerator(model, tokenizer, temperature, batch_tokens), tokenizer, seed)


def test_a_message_is_put_by_the_chat_template_and_one_beyond_the_context_is_not_asked() -> None:
    class Echo:
        context = 40

        def __call__(self, prompts, progress):
            progress(len(prompts))
            return [rewrite_result(prompt.tokens) for prompt in prompts]

    tokenizer = tiny_tokenizer()
    tasks = [rewrite.Task("a", "hello", 5), rewrite.Task("b", "h" * 40, 5)]
    told: list[int] = []
    answers = TokenWriter(Echo(), tokenizer, 0)(tasks, told.append)
    # What is decoded has no special tokens: `<s>` and `</s>` of the template are some.
    assert answers == [Written("user\nhello\nassistant\n", True), None]
    assert sum(told) == 2


def rewrite_result(tokens: list[int]) -> object:
    from finescope.distillation.generate import Generated

    return Generated(tokens, True)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_text_depends_on_neither_batch_nor_order(temperature: float) -> None:
    texts = {f"doc-{index}": "what is " + "x" * (3 * index) for index in range(9)}
    tasks = [rewrite.Task(name, text, 12) for name, text in texts.items()]
    alone = {task.doc_id: writer(temperature, 1)([task], lambda _: None)[0] for task in tasks}
    together = writer(temperature, 10_000)(tasks[::-1], lambda _: None)
    assert dict(zip(list(texts)[::-1], together, strict=True)) == alone
    assert len({answer.text for answer in alone.values() if answer}) > 1


def test_another_seed_samples_another_text() -> None:
    task = rewrite.Task("a", "hello", 12)
    texts = {writer(1.0, 100, seed)([task], lambda _: None)[0] for seed in (0, 1, 2)}
    assert len(texts) == 3
    assert writer(1.0, 100, 0)([task], lambda _: None) == writer(1.0, 100, 0)([task], lambda _: None)
    assert len({document_seed(seed, name) for seed in (0, 1) for name in ("a", "b", "0\na")}) == 6
