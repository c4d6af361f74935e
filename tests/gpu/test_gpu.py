"""What only a GPU can show: the same codes as on the CPU, a student that trains in bf16, pruning on the device."""

import numpy as np
import pytest
import torch
from tiny_run import rows, tiny_recipe, write_inputs

from finescope import pipeline, storage
from finescope.config import EmbedSection
from finescope.console import ConsoleReporter
from finescope.curation.embed import Embedder
from finescope.stages.references import model_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_codes_of_the_gpu_are_those_of_the_cpu(tmp_path, monkeypatch):
    write_inputs(tmp_path)
    on_gpu = pipeline.run(tiny_recipe(tmp_path, "gpu", dtype="float32"), ConsoleReporter("plain"), "embed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = pipeline.run(tiny_recipe(tmp_path, "cpu", dtype="float32"), ConsoleReporter("plain"), "embed")
    fvu = {
        name: np.concatenate([storage.read_parquet(file).column("fvu").to_numpy() for file in run["embed"].files("embeddings")])
        for name, run in (("gpu", on_gpu), ("cpu", on_cpu))
    }
    np.testing.assert_allclose(fvu["gpu"], fvu["cpu"], rtol=0.05, atol=0.02)


def test_the_whole_method_runs_in_bf16(tmp_path):
    write_inputs(tmp_path)
    done = pipeline.run(tiny_recipe(tmp_path, "whole", dtype="bfloat16"), ConsoleReporter("plain"))
    models = done["evaluate"].facts["models"]
    assert models["recovered"]["parameters"] < models["base"]["parameters"]
    assert np.isfinite(models["recovered"]["perplexity"]["target"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_the_same_each_time_and_near_those_in_parts(tmp_path, monkeypatch, dtype):
    write_inputs(tmp_path)
    done = pipeline.run(tiny_recipe(tmp_path, dtype, dtype=dtype), ConsoleReporter("plain"), "sae")
    section = EmbedSection(max_tokens=32, keep_latents=12, batch_tokens=256)
    found = Embedder(model_of(done["model"]), storage.join(done["sae"].uri, "dictionary"), section)
    texts = [row["text"] for row in rows(300)]
    first = found(texts)
    assert all(found(texts).equals(first) for _ in range(3))
    pooled = found._pooled

    def limited(ids, mask):
        if ids.size > 64:
            # What the device itself says where it is asked for more than it has.
            torch.empty(1 << 60, dtype=torch.uint8, device="cuda")
        return pooled(ids, mask)

    monkeypatch.setattr(found, "_pooled", limited)
    in_parts = found(texts)
    assert found._most_tokens <= 64
    tolerance = 1e-3 if dtype == "float32" else 0.05
    np.testing.assert_allclose(in_parts.column("fvu"), first.column("fvu"), rtol=tolerance, atol=tolerance)
