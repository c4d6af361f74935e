"""From documents to a dictionary: choose coordinates, stream activations of the first blocks, fit."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from finescope.config import SaeSection
from finescope.errors import ModelError, StepFailed
from finescope.models.hooks import HookPoint
from finescope.models.load import ModelReference, load_model
from finescope.runners.base import Progress
from finescope.sae.dictionary import Dictionary, check_belongs, load_dictionary
from finescope.sae.fit import FitResult, fit
from finescope.sae.fvu import FvuMeter
from finescope.sae.sensitivity import choose_coordinates
from finescope.sae.stream import TokenBatch, first_documents, stream_activations


@dataclass(frozen=True)
class TrainedDictionary:
    """What is saved, and what was measured on the way."""

    dictionary: Dictionary
    fit: FitResult


def train_dictionary(
    model: ModelReference, batches: Iterable[TokenBatch], section: SaeSection, progress: Progress
) -> TrainedDictionary:
    """Train a dictionary on documents. Reads no more batches than `section.num_tokens` and the held-out tail need.

    Args:
        batches: documents in an order that mixes them; the coordinates are chosen on the first ones.
        progress: gets `fit.work_units(section)` in all, less where the documents are fewer.

    Raises:
        StepFailed: too few documents, or the loss is not finite.
        ModelError: the model has no block `section.layer`.
    """
    network = load_model(model, num_layers=section.layer)
    stream = iter(batches)
    reference_sample = first_documents(stream, section.coordinates.documents)
    if not reference_sample:
        raise StepFailed("no document is left to train the autoencoder on")
    coordinates = choose_coordinates(network, reference_sample, section.layer, section.coordinates, section.seed)
    activations = stream_activations(network, itertools.chain(reference_sample, stream), section.layer)
    result = fit(activations, section, coordinates.indices, progress)
    dictionary = Dictionary(
        result.autoencoder.cpu(),
        HookPoint(section.layer),
        section.coordinates.method,
        model.path,
        model.revision,
        model.fingerprint,
        result.fvu,
    )
    return TrainedDictionary(dictionary, result)


def adopt_dictionary(uri: str, model: ModelReference, batches: Iterable[TokenBatch]) -> tuple[Dictionary, float]:
    """A dictionary that was trained elsewhere, and its FVU measured again on this model and these documents.

    Raises:
        ModelError: there is none, it does not fit the model, or it explains nothing of it (FVU of 1 or more).
    """
    dictionary = load_dictionary(uri)
    check_belongs(dictionary, model)
    fvu = measure_fvu(model, batches, dictionary)
    if fvu >= 1:
        same = "the same" if dictionary.model_fingerprint == model.fingerprint else "other"
        raise ModelError(
            f"dictionary '{uri}': its FVU on '{model.path}' is {fvu:.2f}, {dictionary.fvu:.2f} was expected; "
            f"it was trained on {same} weights, those of '{dictionary.model_path}'"
        )
    return dictionary, fvu


@torch.no_grad()
def measure_fvu(model: ModelReference, batches: Iterable[TokenBatch], dictionary: Dictionary) -> float:
    """FVU of a dictionary on documents, over all of them, in standardised units.

    Raises:
        StepFailed: the documents have no activation.
    """
    network = load_model(model, num_layers=dictionary.layer)
    autoencoder, meter = dictionary.autoencoder.to(network.device), FvuMeter()
    for chunk in stream_activations(network, batches, dictionary.layer):
        meter.update(autoencoder.select(chunk) / autoencoder.scale, autoencoder(chunk) / autoencoder.scale)
    if not meter.count:
        raise StepFailed("no activation to measure the dictionary on")
    return meter.value
