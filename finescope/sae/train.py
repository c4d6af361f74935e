"""Training as every process of a group does it: the stream of tables to dictionaries on storage, and what was measured."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finescope import storage
from finescope.models.load import ModelReference, default_device
from finescope.runners.base import Progress, TableStream
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.dictionary import save_dictionary
from finescope.sae.extract import SiteColumns, activations_of
from finescope.sae.fit import FitPlan, FitResult, fit
from finescope.sae.metrics import metric_rows
from finescope.sae.naming import MAIN
from finescope.sae.record import Dictionary
from finescope.sae.statistics import latents_table

TRAINED = "trained.json"


@dataclass(frozen=True)
class TrainingJob:
    """What a process that trains is sent."""

    model: ModelReference
    plan: FitPlan
    names: tuple[str, ...]  # of the dictionaries, the main one first
    sites: tuple[SiteColumns, ...]  # in the order of the stream's columns
    site_of: tuple[int, ...]  # of each dictionary
    modules: tuple[str, ...]  # path of the module at each site
    uri: str  # of the step


def dictionary_uri(uri: str, name: str) -> str:
    """Where a dictionary of the step at `uri` is."""
    return storage.join(uri, "dictionary") if name == MAIN else storage.join(uri, "variants", name)


def train(job: TrainingJob, stream: TableStream, progress: Progress) -> None:
    """Train, and write each dictionary, its part of `latents` and, last, the record TRAINED. All processes call.

    Raises:
        StepFailed: too few activations, or a loss that is not finite.
    """

    def arrays(start: int, stop: int, step: int) -> Iterator[np.ndarray]:
        return (activations_of(table) for table in stream(start, stop, step))

    results = fit(job.plan, arrays, default_device(), progress)
    if not results:
        return
    records = []
    for number, result in enumerate(results):
        dictionary = _dictionary(job, number, result)
        save_dictionary(dictionary_uri(job.uri, job.names[number]), dictionary)
        table = latents_table(job.names[number], result.held_out.statistics)
        size = storage.put_parquet(storage.join(job.uri, "latents", f"part-{number:06d}.parquet"), table)
        records.append({**_facts(job.names[number], dictionary, result), "latents_bytes": size})
    ended = datetime.datetime.now(datetime.UTC).isoformat()
    storage.put_json(storage.join(job.uri, TRAINED), {"dictionaries": records, "ended": ended})


def _dictionary(job: TrainingJob, number: int, result: FitResult) -> Dictionary:
    """The autoencoder on columns of the stream as one on whole activations."""
    site, section = job.sites[job.site_of[number]], job.plan.sections[number]
    found = result.autoencoder.cpu()
    weights = {**found.state_dict(), "coordinates": torch.from_numpy(site.coordinates)}
    if site.basis is not None:
        weights["basis"] = torch.from_numpy(site.basis)
    return Dictionary(
        autoencoder=SparseAutoencoder(weights, architecture=section.architecture, k=section.k, d_in=site.d_in),
        hook=site.hook,
        coordinates_method=section.coordinates.method,
        model_path=job.model.path,
        model_revision=job.model.revision,
        model_fingerprint=job.model.fingerprint,
        module=job.modules[job.site_of[number]],
        fvu=result.held_out.fvu,
    )


def _facts(name: str, dictionary: Dictionary, result: FitResult) -> dict[str, Any]:
    autoencoder = dictionary.autoencoder
    return {
        "name": name,
        "layer": dictionary.layer,
        "site": dictionary.hook.site,
        "architecture": autoencoder.architecture,
        "num_latents": autoencoder.num_latents,
        "k": autoencoder.k,
        "coordinates": autoencoder.coordinates.tolist(),
        "fvu": result.held_out.fvu,
        "l0": result.held_out.statistics.l0,
        "dead_share": result.dead_share,
        "dense_share": result.held_out.statistics.dense_share,
        "tokens": result.trained_tokens,
        "held_out_tokens": result.held_out_tokens,
        "history": result.history,
        "metrics": metric_rows(name, result.held_out, None, None),
    }
