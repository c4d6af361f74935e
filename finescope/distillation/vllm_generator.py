"""Generation by vLLM, which nothing but this imports."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from finescope.distillation.generate import Generated, Prompt
from finescope.models.load import ModelReference
from finescope.models.local_files import local_files


class VllmGenerator:
    """Generation by vLLM, which is the extra `vllm` and takes the whole GPU."""

    def __init__(self, reference: ModelReference, temperature: float) -> None:
        vllm: Any = importlib.import_module("vllm")
        self._parameters, self._temperature = vllm.SamplingParams, temperature
        with local_files(reference.path, weights=True) as path:
            self._engine = vllm.LLM(
                model=path, revision=reference.revision, dtype=reference.dtype, trust_remote_code=reference.trust_remote_code
            )
        self.context = int(self._engine.llm_engine.model_config.max_model_len)

    def __call__(self, prompts: Sequence[Prompt], progress: Callable[[int], Any]) -> list[Generated]:
        """As in `Generator`."""
        settings = [
            self._parameters(temperature=self._temperature, seed=prompt.seed, max_tokens=prompt.budget, detokenize=False)
            for prompt in prompts
        ]
        given = [{"prompt_token_ids": prompt.tokens} for prompt in prompts]
        answers = [answer.outputs[0] for answer in self._engine.generate(given, settings, use_tqdm=False)]
        progress(len(prompts))
        return [Generated(list(answer.token_ids), answer.finish_reason == "stop") for answer in answers]
