"""What the layouts of other tools have in common: full-width weights, and our record kept in their configuration."""

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finescope import directories, storage
from finescope.errors import DictionaryError
from finescope.models.hooks import HookPoint
from finescope.sae.autoencoder import Architecture, SparseAutoencoder
from finescope.sae.record import Dictionary, Record, dictionary_of, record_of

_Model = TypeVar("_Model", bound=BaseModel)


class WideWeights(NamedTuple):
    """z = act((a - decoder_bias) encoder^T + encoder_bias), a_hat = z decoder + decoder_bias, on the whole activation."""

    encoder: Tensor  # [L, d_in] float32, as all
    encoder_bias: Tensor  # [L]
    decoder: Tensor  # [L, d_in]
    decoder_bias: Tensor  # [d_in]
    threshold: Tensor  # [L]


class Kept(BaseModel):
    """What another tool's layout has no place for, as JSON beside the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: Record
    mean: list[float]  # [C]
    scale: list[float]  # [C]
    basis: list[list[float]] | None  # [C, J]


def kept_of(dictionary: Dictionary) -> dict[str, Any]:
    """What `narrow` needs besides the weights, ready for JSON."""
    autoencoder = dictionary.autoencoder
    basis = autoencoder.basis
    kept = Kept(
        record=record_of(dictionary),
        mean=autoencoder.mean.tolist(),
        scale=autoencoder.scale.tolist(),
        basis=None if basis is None else basis.tolist(),
    )
    return kept.model_dump(mode="json")


def widen(autoencoder: SparseAutoencoder) -> WideWeights:
    """Scatter the weights to all `d_in` coordinates; those that the dictionary does not read get zeros.

    The codes are the same; the reconstruction is zero where nothing is read, as no one measured anything there.
    """

    def scatter(rows: Tensor) -> Tensor:
        rows = rows.detach().cpu().float()
        if autoencoder.basis is not None:
            rows = rows @ autoencoder.basis.cpu()
        return rows.new_zeros(*rows.shape[:-1], autoencoder.d_in).index_copy_(-1, autoencoder.coordinates.cpu(), rows)

    return WideWeights(
        scatter(autoencoder.encoder_weight),
        autoencoder.encoder_bias.detach().cpu(),
        scatter(autoencoder.decoder_weight),
        scatter(autoencoder.decoder_bias),
        autoencoder.threshold.detach().cpu(),
    )


def narrow(kept: Any, wide: WideWeights, where: str) -> Dictionary:
    """The dictionary that `widen` and `kept_of` were made from; `where` names the file and the key that `kept` stands in.

    Raises:
        DictionaryError: `kept` is not such a record, or the weights are no longer zero outside its coordinates.
    """
    found = parse(Kept, json.dumps(kept).encode(), where)
    record = found.record
    coordinates = torch.tensor(record.coordinates, dtype=torch.int64)
    basis = None if found.basis is None else torch.tensor(found.basis)
    if wide.encoder.shape != (record.num_latents, record.d_in):
        raise DictionaryError(
            f"{where}: {record.num_latents} latents of width {record.d_in}; "
            f"the weights have {wide.encoder.shape[0]} of width {wide.encoder.shape[1]}"
        )

    def gather(rows: Tensor) -> Tensor:
        chosen = rows.index_select(-1, coordinates)
        back = chosen if basis is None else chosen @ basis.T
        again = back if basis is None else back @ basis
        apart = (rows - torch.zeros_like(rows).index_copy_(-1, coordinates, again)).abs().max()
        # Exactly zero without a basis; with one, what rounding leaves.
        if apart > 1e-4 * rows.abs().max():
            raise DictionaryError(
                f"{where}: the weights read more coordinates than it says, they were changed since; "
                "without it the dictionary is read as any other, at full width"
            )
        return back

    weights = {
        "encoder_weight": gather(wide.encoder),
        "encoder_bias": wide.encoder_bias,
        "decoder_weight": gather(wide.decoder),
        "decoder_bias": gather(wide.decoder_bias),
        "threshold": wide.threshold,
        "coordinates": coordinates,
        "mean": torch.tensor(found.mean),
        "scale": torch.tensor(found.scale),
    }
    return dictionary_of(record, weights if basis is None else {**weights, "basis": basis}, where)


def full_width(
    wide: WideWeights,
    architecture: Architecture,
    k: int,
    *,
    hook: HookPoint,
    module: str,
    model: str,
    revision: str | None,
    where: str,
) -> Dictionary:
    """A dictionary that another tool trained: it reads all coordinates; mean, scale and FVU are not known.

    Raises:
        DictionaryError: k is not between 1 and the number of latents.
    """
    num_latents, d_in = wide.encoder.shape
    record = Record(
        format_version=2,
        layer=hook.layer,
        site=hook.site,
        module=module,
        architecture=architecture,
        k=k,
        num_latents=num_latents,
        d_in=d_in,
        coordinates_method="all",
        coordinates=list(range(d_in)),
        num_coordinates=d_in,
        model_path=model,
        model_revision=revision,
        model_fingerprint=None,
        fvu=None,
        moments_known=False,
    )
    weights = {
        "encoder_weight": wide.encoder,
        "encoder_bias": wide.encoder_bias,
        "decoder_weight": wide.decoder,
        "decoder_bias": wide.decoder_bias,
        "threshold": wide.threshold,
        "coordinates": torch.arange(d_in),
        "mean": torch.zeros(d_in),
        "scale": torch.ones(d_in),
    }
    return dictionary_of(record, weights, where)


def parse(model: type[_Model], text: bytes, where: str) -> _Model:
    """A JSON record.

    Raises:
        DictionaryError: it is not such a record; the message names `where` and the field.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first: Any = error.errors()[0]
        raise DictionaryError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def read_config(uri: str, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of a dictionary's directory.

    Raises:
        DictionaryError: it is not there, or is no JSON object.
    """
    path = storage.join(uri, name)
    if not storage.exists(path):
        raise DictionaryError(f"dictionary '{uri}': {name} is missing beside the weights")
    try:
        value = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise DictionaryError(f"dictionary '{uri}': {name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DictionaryError(f"dictionary '{uri}': {name}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tensors(uri: str, name: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file in a dictionary's directory.

    Raises:
        DictionaryError: it is missing or damaged.
    """
    with directories.local_directory(uri) as folder:
        try:
            return load_file(Path(folder) / name)
        except (OSError, SafetensorError) as error:
            raise DictionaryError(f"dictionary '{uri}': {name} cannot be read: {error}") from error


def checked(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], where: str) -> dict[str, Tensor]:
    """The tensors in float32, if they are exactly those of `shapes`.

    Raises:
        DictionaryError: one is missing, not known, or of another shape; the message names `where` and the tensor.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise DictionaryError(f"{where}: tensor '{name}' is missing; found {', '.join(sorted(tensors)) or 'none'}")
        if tuple(tensors[name].shape) != shape:
            raise DictionaryError(f"{where}: tensor '{name}' is of shape {tuple(tensors[name].shape)}, expected {shape}")
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise DictionaryError(f"{where}: tensor '{unknown[0]}' is not known; expected {', '.join(shapes)}")
    return {name: tensors[name].float() for name in shapes}
