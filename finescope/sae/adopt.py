"""`sae.path`: a dictionary that is there already is held to the model and the documents that it is to be used with."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finescope.errors import DictionaryError, StepFailed
from finescope.models.hooks import capture, module_path
from finescope.models.load import ModelReference, load_model
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.dictionary import check_belongs, load_dictionary
from finescope.sae.hook_names import normed_outputs
from finescope.sae.record import Dictionary
from finescope.sae.stream import TokenBatch, used_positions

# Standard errors of a difference between two samples; a smaller difference is chance.
_ERRORS = 3 * math.sqrt(2)
# Share of the variance; a smaller difference is real where there are many documents, but nothing to be told of.
_FLOOR = 0.02


@dataclass(frozen=True)
class Adopted:
    """A dictionary that fits, and what was measured of it here."""

    dictionary: Dictionary  # with mean and scale; its `fvu` is the recorded one, or the measured one where none was
    fvu: float  # measured here, over all activations, in standardised units
    fvu_error: float | None  # its standard error over documents; None where the moments were estimated on the same ones
    recorded_fvu: float | None
    tokens: int
    moments_estimated: bool  # mean and scale were not known and are those of the activations seen here
    warning: str | None  # what a person should look at


@torch.no_grad()
def adopt_dictionary(uri: str, model: ModelReference, batches: Iterable[TokenBatch]) -> Adopted:
    """Load a dictionary in any layout that `load_dictionary` takes, and measure it on documents, in one pass over them.

    Memory does not grow with the documents. Where the dictionary does not know the mean and standard deviation of its
    coordinates, those of these documents are taken.

    Raises:
        DictionaryError: there is none, it does not fit the model, or it explains nothing of it (FVU of 1 or more).
        StepFailed: the documents have no activation.
    """
    dictionary = load_dictionary(uri)
    check_belongs(dictionary, model)
    _check_norms(dictionary, model)
    network = load_model(model, num_layers=dictionary.layer)
    autoencoder = dictionary.autoencoder.to(network.device)
    sums = _Sums(autoencoder)
    for input_ids, attention_mask in batches:
        ids, mask = (torch.from_numpy(array).to(network.device) for array in (input_ids, attention_mask))
        used = used_positions(mask)
        activations = capture(network, ids, mask, [dictionary.hook])[0][used].float()
        if len(activations):
            sums.update(activations, used.sum(1))
    if sums.count < 2:
        raise StepFailed(f"no activation to measure the dictionary '{uri}' on")
    if not dictionary.moments_known:
        sums.give_moments()
    fvu, error = sums.fvu(), sums.fvu_error() if dictionary.moments_known else None
    recorded = dictionary.fvu
    if not fvu < 1:
        known = dictionary.model_fingerprint
        weights = "unknown" if known is None else "the same" if known == model.fingerprint else "other"
        expected = "" if recorded is None else f", {recorded:.2f} was expected"
        raise DictionaryError(
            f"dictionary '{uri}': its FVU on '{model.path}' is {fvu:.2f}{expected}; "
            f"it was trained on {weights} weights, those of '{dictionary.model_path}'"
        )
    adopted = replace(
        dictionary,
        autoencoder=autoencoder.cpu(),
        module=module_path(network, dictionary.hook),
        fvu=fvu if recorded is None else recorded,
        moments_known=True,
    )
    warning = None if recorded is None or error is None else _difference(uri, fvu, error, recorded)
    return Adopted(adopted, fvu, error, recorded, sums.count, not dictionary.moments_known, warning)


def _check_norms(dictionary: Dictionary, model: ModelReference) -> None:
    lens = dictionary.module.startswith("blocks.")
    if lens and dictionary.hook.site in ("attention", "mlp") and normed_outputs(model.model_type):
        raise DictionaryError(
            f"sae.path: '{dictionary.module}' of family '{model.model_type}' is read after the norm that follows the sublayer; "
            f"site {dictionary.hook.site} is read before it. Dictionaries of the residual stream can be used"
        )


def _difference(uri: str, fvu: float, error: float, recorded: float) -> str | None:
    """A warning, if the recorded FVU and the measured one differ by more than two samples of documents would."""
    tolerance = max(_FLOOR, _ERRORS * error)
    if abs(fvu - recorded) <= tolerance:
        return None
    return (
        f"dictionary '{uri}': FVU {fvu:.3f} on these documents, {recorded:.3f} recorded; by chance they would differ by "
        f"{tolerance:.3f} at most: other documents, another precision or other weights"
    )


class _Sums:
    """Running sums per coordinate (C), in float64, from which FVU, mean and scale of the whole set follow.

    `FvuMeter` needs the scale before the first activation; here it may be known only after the last.
    """

    def __init__(self, autoencoder: SparseAutoencoder) -> None:
        self._autoencoder = autoencoder
        zeros = torch.zeros_like(autoencoder.mean, dtype=torch.float64)
        self.count = 0
        self._mean, self._spread, self._error = zeros, zeros, zeros
        # Over documents, of squared error e and squared distance v to the training mean, both standardised: v, e e, e v, v v.
        self._products = torch.zeros(4, dtype=torch.float64)

    def update(self, activations: Tensor, lengths: Tensor) -> None:
        """Take activations [N, d_in] of documents of `lengths` [B] tokens that are used, N in all."""
        seen = self._autoencoder.select(activations).double()
        squares = (seen - self._autoencoder(activations).double()).square()
        self._error = self._error + squares.sum(0)
        # Chan et al. 1979: merging two sets' sums of squares without the cancellation of E[x^2] - E[x]^2.
        mean, total = seen.mean(0), self.count + len(seen)
        apart = mean - self._mean
        self._spread = self._spread + (seen - mean).square().sum(0) + apart.square() * (self.count * len(seen) / total)
        self._mean = self._mean + apart * (len(seen) / total)
        self.count = total
        scale = self._autoencoder.scale.double()
        distances = ((seen - self._autoencoder.mean.double()) / scale).square().sum(1)
        document = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        e = distances.new_zeros(len(lengths)).index_add_(0, document, (squares / scale.square()).sum(1)).cpu()
        v = distances.new_zeros(len(lengths)).index_add_(0, document, distances).cpu()
        self._products += torch.stack([v.sum(), e @ e, e @ v, v @ v])

    def give_moments(self) -> None:
        """Give the autoencoder mean and standard deviation of what was seen; a constant coordinate has scale 1."""
        deviation = (self._spread / self.count).sqrt()
        self._autoencoder.mean = self._mean.float()
        self._autoencoder.scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation)).float()

    def fvu(self) -> float:
        """FVU of all that was seen, in standardised units; not a number where there is no variance."""
        error, total = self._standardised()
        return error / total if total > 0 else math.nan

    def fvu_error(self) -> float:
        """Its standard error as a ratio of two sums over documents (linearised), documents being drawn and not tokens.

        Only of a mean and a scale that were there from the first activation on.
        """
        total, errors, mixed, distances = self._products.tolist()
        fvu = self.fvu()
        return math.sqrt(max(errors - 2 * fvu * mixed + fvu * fvu * distances, 0.0)) / total if total > 0 else math.nan

    def _standardised(self) -> tuple[float, float]:
        """Squared error and squared distance to the mean, over all activations."""
        weights = self._autoencoder.scale.double().square().reciprocal()
        return float(self._error @ weights), float(self._spread @ weights)
