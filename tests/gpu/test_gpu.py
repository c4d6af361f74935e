"""What only a GPU can show: the same codes as on the CPU, a student that trains in bf16, pruning on the device."""

import numpy as np
import pytest
import torch
from tiny_run import tiny_recipe, write_inputs

from finescope import pipeline, storage
from finescope.console import ConsoleReporter

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
