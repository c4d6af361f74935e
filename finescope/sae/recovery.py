"""What a dictionary's reconstruction costs the model that it explains: cross-entropy with it spliced in."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finescope.models.hooks import spliced
from finescope.models.likelihood import check_logits, token_nll
from finescope.runners.base import Progress
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.record import Dictionary
from finescope.sae.statistics import latent_chunks
from finescope.sae.stream import TokenBatch, used_positions


class CrossEntropy(NamedTuple):
    """Next-token cross-entropy of the whole model in nats, over all targets of a set; not a number where it has none."""

    base: float  # of the model as it is
    spliced: float  # what the dictionary sees is replaced by its reconstruction
    zeroed: float  # what the dictionary sees is replaced by zero
    tokens: int  # targets: all tokens but the first of each document

    @property
    def recovered(self) -> float:
        """(zeroed - spliced) / (zeroed - base): 1 where the reconstruction is as good as the activations, 0 as good as nothing.

        Zeroing a residual stream ruins most models, so that this is near 1 for dictionaries of very different quality:
        `spliced - base` is the finer measure.
        """
        gap = self.zeroed - self.base
        return (self.zeroed - self.spliced) / gap if gap else math.nan


@torch.no_grad()
def cross_entropy_recovered(
    model: PreTrainedModel, dictionaries: Sequence[Dictionary], batches: Iterable[TokenBatch], progress: Progress
) -> list[CrossEntropy]:
    """Of each dictionary, in their order, over the same documents; `batches` is read once.

    The first token of each document keeps its activation, as the dictionary never saw any (METHOD 1); padding is in nobody's
    way. `progress` is told of documents done. Moves the dictionaries to the model's device.

    Args:
        model: all of its blocks, and the head.

    Raises:
        ModelError: the model has no such hook point, or changes its logits in a way that is not known.
    """
    check_logits(model)
    was_training = model.training
    model.eval()
    base, tokens = 0.0, 0
    changed = [[0.0, 0.0] for _ in dictionaries]  # sums of the spliced and of the zeroed model's losses
    for ids, mask in batches:
        batch_ids, batch_mask = torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device).bool()
        loss, targets = _loss(model, batch_ids, batch_mask)
        base, tokens = base + loss, tokens + targets
        for dictionary, sums in zip(dictionaries, changed, strict=True):
            autoencoder = dictionary.autoencoder.to(model.device)
            for number, change in enumerate((autoencoder.splice, _zeroing(autoencoder))):
                with spliced(model, dictionary.hook, _at(used_positions(batch_mask), autoencoder, change)):
                    sums[number] += _loss(model, batch_ids, batch_mask)[0]
        progress(len(ids))
    model.train(was_training)
    per = tokens or math.nan
    return [CrossEntropy(base / per, reconstructed / per, zeroed / per, tokens) for reconstructed, zeroed in changed]


def _loss(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """(sum of the losses in nats, number of targets) of a batch [B, T], padded on either side."""
    predicted = mask[:, 1:] & mask[:, :-1]  # [B, T - 1]
    # Counted from each document's first token, so that the side of the padding has no say where positions are learned.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = model.base_model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    hidden = outputs.last_hidden_state[:, :-1][predicted]  # [N, d_model]
    losses = token_nll(model, hidden, ids[:, 1:][predicted])
    return float(losses.double().sum()), len(losses)


def _zeroing(autoencoder: SparseAutoencoder) -> Callable[[Tensor], Tensor]:
    def zeroed(activations: Tensor) -> Tensor:
        if autoencoder.basis is None:
            return activations.index_fill(-1, autoencoder.coordinates, 0.0)
        seen = autoencoder.select(activations) @ autoencoder.basis
        return activations.index_add(-1, autoencoder.coordinates, -seen.to(activations.dtype))

    return zeroed


def _at(used: Tensor, autoencoder: SparseAutoencoder, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` of [N, d_in], applied to the positions `used` (bool [B, T]) of a value [B, T, d_in]."""

    def replace(value: Tensor) -> Tensor:
        replaced = value.clone()
        replaced[used] = torch.cat([change(part) for part in latent_chunks(value[used], autoencoder.num_latents)])
        return replaced

    return replace
