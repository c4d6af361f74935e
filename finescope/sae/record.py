"""A trained dictionary, and the record of everything about it that is not a weight."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from finescope.errors import DictionaryError
from finescope.models.hooks import HookPoint, Site
from finescope.sae.autoencoder import Architecture, SparseAutoencoder, weight_shapes

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Dictionary:
    """An autoencoder and where its activations come from."""

    autoencoder: SparseAutoencoder
    hook: HookPoint
    coordinates_method: str
    model_path: str
    model_revision: str | None
    model_fingerprint: str | None  # None: not known, the dictionary comes from elsewhere
    module: str  # path of the module whose output (mlp_hidden: input) is read, or the place as another tool names it
    fvu: float | None  # held out, in standardised units: what a reader who measures again should find; None: not known
    moments_known: bool = True  # False: mean and scale were never measured, they stand at 0 and 1

    @property
    def layer(self) -> int:
        """1-based: in, or after, this decoder block."""
        return self.hook.layer


class Record(BaseModel):
    """`dictionary.json`, and what another tool's `cfg.json` keeps of it under `metadata.finescope`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format_version: Literal[2]
    layer: int
    site: Site
    module: str
    architecture: Architecture
    k: int
    num_latents: int
    d_in: int
    coordinates_method: str
    coordinates: list[int]
    num_coordinates: int  # that the autoencoder sees: fewer than `coordinates` where there is a basis
    model_path: str
    model_revision: str | None
    model_fingerprint: str | None
    fvu: float | None
    moments_known: bool = True


def record_of(dictionary: Dictionary) -> Record:
    """What is written beside the weights."""
    autoencoder = dictionary.autoencoder
    return Record(
        format_version=FORMAT_VERSION,
        layer=dictionary.hook.layer,
        site=dictionary.hook.site,
        module=dictionary.module,
        architecture=autoencoder.architecture,
        k=autoencoder.k,
        num_latents=autoencoder.num_latents,
        d_in=autoencoder.d_in,
        coordinates_method=dictionary.coordinates_method,
        coordinates=autoencoder.coordinates.tolist(),
        num_coordinates=len(autoencoder.mean),
        model_path=dictionary.model_path,
        model_revision=dictionary.model_revision,
        model_fingerprint=dictionary.model_fingerprint,
        fvu=dictionary.fvu,
        moments_known=dictionary.moments_known,
    )


def dictionary_of(record: Record, weights: dict[str, Tensor], where: str) -> Dictionary:
    """The dictionary that `record` describes and whose tensors are `weights` (see `weight_shapes`).

    Raises:
        DictionaryError: they do not belong together; the message names `where`, the field and both values.
    """
    basis_of = len(record.coordinates) if "basis" in weights else None
    expected = weight_shapes(record.num_latents, record.num_coordinates, basis_of)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise DictionaryError(f"{where}: its record says {expected}, its weights are {found}")
    if weights["coordinates"].tolist() != record.coordinates:
        raise DictionaryError(f"{where}: record and weights do not belong together: other `coordinates`")
    inside = all(0 <= index < record.d_in for index in record.coordinates)
    if not inside or sorted(set(record.coordinates)) != record.coordinates:
        raise DictionaryError(f"{where}: coordinates: expected rising indices below d_in ({record.d_in})")
    if not 0 < record.k <= record.num_latents:
        raise DictionaryError(f"{where}: k: {record.k}, expected 1 to num_latents ({record.num_latents})")
    return Dictionary(
        SparseAutoencoder(weights, architecture=record.architecture, k=record.k, d_in=record.d_in),
        HookPoint(record.layer, record.site),
        record.coordinates_method,
        record.model_path,
        record.model_revision,
        record.model_fingerprint,
        record.module,
        record.fvu,
        record.moments_known,
    )
