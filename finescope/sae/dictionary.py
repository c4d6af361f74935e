"""A trained dictionary on storage: `dictionary.safetensors` and `dictionary.json`, all that it needs to be used alone."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finescope import storage
from finescope.errors import ModelError
from finescope.models.hooks import HookPoint, Site
from finescope.models.load import ModelReference
from finescope.sae.autoencoder import Architecture, SparseAutoencoder, weight_shapes

FORMAT_VERSION = 2
_WEIGHTS, _RECORD = "dictionary.safetensors", "dictionary.json"


@dataclass(frozen=True)
class Dictionary:
    """An autoencoder and where its activations come from."""

    autoencoder: SparseAutoencoder
    hook: HookPoint
    coordinates_method: str
    model_path: str
    model_revision: str | None
    model_fingerprint: str | None  # None: not known, the dictionary comes from elsewhere
    module: str  # path of the module whose output (mlp_hidden: input) is read
    fvu: float | None  # held out, in standardised units: what a reader who measures again should find; None: not known

    @property
    def layer(self) -> int:
        """1-based: after this decoder block."""
        return self.hook.layer


class _Record(BaseModel):
    """dictionary.json."""

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


def save_dictionary(uri: str, dictionary: Dictionary) -> None:
    """Write the dictionary to directory `uri`, replacing what is there."""
    autoencoder = dictionary.autoencoder
    record = _Record(
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
    )
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in autoencoder.state_dict().items()}
    with storage.scratch_directory(uri) as folder:
        folder.mkdir(parents=True)
        save_file(weights, folder / _WEIGHTS)
        (folder / _RECORD).write_text(record.model_dump_json(indent=2) + "\n")
        storage.put_tree(folder, uri)


def load_dictionary(uri: str, device: torch.device | str = "cpu") -> Dictionary:
    """Read a dictionary.

    Raises:
        ModelError: there is none, its record is not understood, or its weights do not have the shapes that it says.
    """
    if not storage.exists(storage.join(uri, _RECORD)):
        raise ModelError(f"no dictionary in '{uri}': expected {_RECORD} and {_WEIGHTS} in it")
    with storage.local_directory(uri) as folder:
        try:
            record = _Record.model_validate_json((folder / _RECORD).read_text())
            weights = load_file(folder / _WEIGHTS, device=str(device))
        except ValidationError as error:
            first: Any = error.errors()[0]
            raise ModelError(f"dictionary '{uri}': {_RECORD}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (OSError, SafetensorError) as error:
            raise ModelError(f"dictionary '{uri}': {_WEIGHTS} cannot be read: {error}") from error
    expected = weight_shapes(record.num_latents, record.num_coordinates, len(record.coordinates) if "basis" in weights else None)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise ModelError(f"dictionary '{uri}': {_RECORD} says {expected}, {_WEIGHTS} holds {found}")
    if weights["coordinates"].tolist() != record.coordinates or not 0 < record.k <= record.num_latents:
        raise ModelError(f"dictionary '{uri}': {_RECORD} and {_WEIGHTS} do not belong together")
    autoencoder = SparseAutoencoder(weights, architecture=record.architecture, k=record.k, d_in=record.d_in)
    return Dictionary(
        autoencoder,
        HookPoint(record.layer, record.site),
        record.coordinates_method,
        record.model_path,
        record.model_revision,
        record.model_fingerprint,
        record.module,
        record.fvu,
    )


def check_belongs(dictionary: Dictionary, model: ModelReference) -> None:
    """Hold a dictionary that was trained elsewhere to the model that it is to be used with.

    Raises:
        ModelError: the width differs, or the model has no such block.
    """
    where = f"the dictionary of '{dictionary.model_path}'"
    if (
        (dictionary.hook.site != "mlp_hidden"
        and dictionary.autoencoder.d_in != model.d_model)
        or dictionary.layer > model.num_layers
    ):
        raise ModelError(
            f"sae.path: {where} reads block {dictionary.layer} of width {dictionary.autoencoder.d_in}; "
            f"'{model.path}' has {model.num_layers} blocks of width {model.d_model}"
        )
