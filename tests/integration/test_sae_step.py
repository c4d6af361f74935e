"""The step `sae` as a run sees it: activations that are kept, dictionaries that go out and come back, every site."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from cli_runs import SilentReporter
from safetensors.torch import load_file
from tiny_run import tiny_recipe, write_inputs

from finescope import pipeline
from finescope.export import export_run
from finescope.manifest import Manifest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("sae"), documents=120)


class Warned(SilentReporter):
    """Keeps what a person should look at."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """See `Reporter`."""
        self.warnings.append(message)


def run(root: Path, name: str, until: str = "sae", **sae: Any) -> tuple[dict[str, Manifest], list[str]]:
    reporter = Warned()
    return pipeline.run(tiny_recipe(root, name, sae=sae), reporter, until), reporter.warnings


def weights(manifest: Manifest) -> dict[str, torch.Tensor]:
    return load_file(Path(manifest.uri) / "dictionary" / "dictionary.safetensors")


def test_activations_that_are_kept_serve_another_training(root: Path) -> None:
    plain, _ = run(root, "plain")
    kept, _ = run(root, "kept", cache=True)
    assert all(torch.equal(weights(kept["sae"])[name], weight) for name, weight in weights(plain["sae"]).items())
    (cache,) = Path(kept["sae"].uri).parent.glob("activations-*")
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(files) > 5
    other, _ = run(root, "kept", cache=True, k=4)
    assert other["sae"].facts["k"] == 4
    assert other["sae"].uri != kept["sae"].uri
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files


@pytest.mark.parametrize("layout", ["own", "sae-lens", "sparsify"])
def test_a_dictionary_goes_out_and_comes_back(root: Path, layout: str) -> None:
    first, _ = run(root, "first", "embed")
    place = str(Path(first["sae"].uri) / "dictionary")
    if layout != "own":
        place = export_run(str(root / "runs" / "first"), layout, str(root / f"exported-{layout}"))
    again, warnings = run(root, f"again-{layout}", "embed", path=place)
    facts = again["sae"].facts
    assert facts["path"] == place
    # The documents are the same held-out ones; nothing is estimated, as the exports keep mean and scale.
    assert facts["fvu"] == pytest.approx(first["sae"].facts["fvu"], rel=0.05)
    assert (facts["fvu_recorded"], facts["moments_estimated"]) == (pytest.approx(first["sae"].facts["fvu"]), False)
    assert warnings == []
    assert facts["measures"]["ce_spliced"] == pytest.approx(first["sae"].facts["measures"]["ce_spliced"], rel=1e-4)
    here, there = (pl.read_parquet(manifests["embed"].files("embeddings")) for manifests in (first, again))
    assert here["doc_id"].equals(there["doc_id"])
    np.testing.assert_allclose(there["fvu"].to_numpy(), here["fvu"].to_numpy(), rtol=1e-4, atol=1e-5)
    latents = pl.read_parquet(again["sae"].files("latents"))
    assert latents.height == 64


@pytest.mark.parametrize("site", ["attention", "mlp", "mlp_hidden"])
def test_every_site_goes_through_to_codes(root: Path, site: str) -> None:
    done, _ = run(root, f"site-{site}", "embed", site=site, coordinates={"method": "pca", "count": 8})
    assert done["sae"].facts["site"] == site
    assert 0 < done["sae"].facts["fvu"] < 1
    assert set(done["sae"].facts["measures"]) == {"ce_base", "ce_spliced", "ce_zeroed", "ce_recovered"}
    assert done["embed"].rows_out == 120


def test_a_corpus_too_small_for_the_tokens_is_told(root: Path) -> None:
    done, warnings = run(root, "small", num_tokens=100_000)
    (warning,) = warnings
    assert warning.startswith("sae.num_tokens: 100,000 activations were asked for; the corpus has ")
    assert done["sae"].facts["tokens"] < 3000


def test_variants_are_in_metrics_and_latents(root: Path) -> None:
    done, _ = run(root, "variants", variants=[{"seed": 1}, {"layer": 1, "num_latents": 48}])
    latents = pl.read_parquet(done["sae"].files("latents"))
    counts = dict(latents.group_by("dictionary").len().iter_rows())
    assert counts == {"main": 64, "seed-1": 64, "layer-1-num_latents-48": 48}
    names = set(pl.read_parquet(done["sae"].files("metrics"))["name"])
    assert {"fvu", "ce_recovered", "seed-1/stability", "seed-1/fvu", "layer-1-num_latents-48/ce_recovered"} <= names
    assert "layer-1-num_latents-48/stability" not in names
