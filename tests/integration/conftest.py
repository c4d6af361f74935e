"""One finished run with the local runner, the reference of every test here."""

from pathlib import Path

import pytest
import torch
from cli_runs import Finished, SilentReporter
from tiny_run import recipe_values, write_inputs

from finescope import pipeline
from finescope.config import Recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    # Forty units of work: time enough to kill a run among them.
    root = write_inputs(tmp_path_factory.mktemp("tiny"), documents=400, rows_per_group=10)
    values = recipe_values(root, "reference")
    recipe = Recipe.model_validate(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes that it is compared with
        try:
            manifests = pipeline.run(recipe, SilentReporter())
        finally:
            torch.set_num_threads(threads)
    return Finished(root, recipe, Path(values["output"]), manifests)
