"""The metrics of a dictionary over a whole set of activations: one pass, the same whatever the batches it comes in."""

import torch
from torch import Tensor

from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.fvu import FvuMeter
from finescope.sae.naming import metric_name
from finescope.sae.recovery import CrossEntropy
from finescope.sae.stability import Stability
from finescope.sae.statistics import LatentStatistics, latent_chunks


class DictionaryMeter:
    """FVU and latent statistics of one dictionary; several may be fed from one pass over the activations."""

    statistics: LatentStatistics

    def __init__(self, autoencoder: SparseAutoencoder) -> None:
        self.statistics = LatentStatistics(autoencoder.num_latents, autoencoder.encoder_weight.device)
        self._autoencoder = autoencoder
        self._fvu = FvuMeter()

    @torch.no_grad()
    def update(self, activations: Tensor) -> None:
        """Take raw activations [N, d_in] of any dtype, on the autoencoder's device."""
        autoencoder = self._autoencoder
        for part in latent_chunks(activations, autoencoder.num_latents):
            if autoencoder.architecture == "topk":
                code = autoencoder.encode_sparse(part)
                self.statistics.update_sparse(code.ids, code.values)
                reconstruction = autoencoder.decode_sparse(code)
            else:
                latents = autoencoder.encode(part)
                self.statistics.update(latents)
                reconstruction = autoencoder.decode(latents)
            self._fvu.update(autoencoder.select(part) / autoencoder.scale, reconstruction / autoencoder.scale)

    @property
    def fvu(self) -> float:
        """Over all that was seen, in standardised units; not a number where that has no variance."""
        return self._fvu.value


def metric_rows(
    dictionary: str, meter: DictionaryMeter | None, cross_entropy: CrossEntropy | None, stability: Stability | None
) -> list[tuple[str, float]]:
    """(name, value) of what was measured of a dictionary, for the table `metrics`.

    Args:
        dictionary: `naming.MAIN`, or the name of a variant, which goes before each of the names.
        stability: against another seed's dictionary, where there is one.
    """
    values: dict[str, float] = {}
    if meter is not None:
        statistics = meter.statistics
        values |= {
            "fvu": meter.fvu,
            "l0": statistics.l0,
            "dead_share": statistics.dead_share,
            "dense_share": statistics.dense_share,
        }
    if cross_entropy is not None:
        values |= {
            "ce_base": cross_entropy.base,
            "ce_spliced": cross_entropy.spliced,
            "ce_zeroed": cross_entropy.zeroed,
            "ce_recovered": cross_entropy.recovered,
        }
    if stability is not None:
        values |= {"stability": stability.cosine, "stable_share": stability.shared}
    return [(metric_name(dictionary, name), value) for name, value in values.items()]
