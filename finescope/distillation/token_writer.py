"""A writer that has the teacher's tokenizer and generates from tokens, by transformers or by vLLM."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finescope.distillation.examples import encode, prompt_text
from finescope.distillation.generate import Generated, Prompt, generate
from finescope.distillation.writer import Task, Written, document_seed


class Generator(Protocol):
    """Continues prompts."""

    context: int  # tokens of a prompt and what follows it, at most

    def __call__(self, prompts: Sequence[Prompt], progress: Callable[[int], Any]) -> list[Generated]:
        """What follows each of `prompts`; `progress` is told of prompts that are done."""
        ...


class TokenWriter:
    """Puts a message as the teacher's chat template has it, or as plain text where there is none."""

    def __init__(self, generator: Generator, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._generator, self._tokenizer, self._seed = generator, tokenizer, seed

    def __call__(self, tasks: Sequence[Task], progress: Callable[[int], Any]) -> list[Written | None]:
        """As in `Writer`."""
        prompts = [self._prompt(task) for task in tasks]
        fitting = [at for at, prompt in enumerate(prompts) if len(prompt.tokens) + prompt.budget <= self._generator.context]
        answers: list[Written | None] = [None] * len(tasks)
        progress(len(tasks) - len(fitting))
        if not fitting:
            return answers
        for at, generated in zip(fitting, self._generator([prompts[at] for at in fitting], progress), strict=True):
            text = str(self._tokenizer.decode(generated.tokens, skip_special_tokens=True))
            answers[at] = Written(text, generated.finished)
        return answers

    def _prompt(self, task: Task) -> Prompt:
        text = prompt_text(self._tokenizer, task.message)
        tokens = encode(self._tokenizer, text, bool(self._tokenizer.chat_template))
        return Prompt(tokens, task.budget, document_seed(self._seed, task.doc_id))


class TransformersGenerator:
    """Generation in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float, batch_tokens: int) -> None:
        """`batch_tokens`: cached positions (prompt and answer, padding counted) of the rows that are written together."""
        self.context = int(getattr(model.config, "max_position_embeddings", 0)) or 2**31
        self._model, self._temperature, self._batch_tokens = model.eval(), temperature, batch_tokens
        self._ends = _end_tokens(model, tokenizer)

    def __call__(self, prompts: Sequence[Prompt], progress: Callable[[int], Any]) -> list[Generated]:
        """As in `Generator`."""
        return generate(self._model, prompts, self._ends, self._temperature, self._batch_tokens, progress)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in [*listed, tokenizer.eos_token_id] if token is not None)
