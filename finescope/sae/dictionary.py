"""A trained dictionary on storage: `dictionary.safetensors` and `dictionary.json`, all that it needs to be used alone."""

import torch
from safetensors.torch import save_file

from finescope import directories, storage
from finescope.errors import DictionaryError
from finescope.models.hooks import hook_width
from finescope.models.load import ModelReference, load_meta_model
from finescope.sae import saelens, sparsify
from finescope.sae.foreign import parse, read_tensors
from finescope.sae.record import Dictionary, Record, dictionary_of, record_of

_WEIGHTS, _RECORD = "dictionary.safetensors", "dictionary.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz")


def save_dictionary(uri: str, dictionary: Dictionary) -> None:
    """Write the dictionary to directory `uri`, replacing what is there."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in dictionary.autoencoder.state_dict().items()}
    with directories.scratch_directory(uri) as folder:
        folder.mkdir(parents=True)
        save_file(weights, folder / _WEIGHTS)
        (folder / _RECORD).write_text(record_of(dictionary).model_dump_json(indent=2) + "\n")
        directories.put_tree(folder, uri)


def load_dictionary(uri: str, device: torch.device | str = "cpu") -> Dictionary:
    """Read a dictionary in finescope's own layout, SAELens's or sparsify's; which one, its files say. No pickle is read.

    Raises:
        DictionaryError: there is none, or it is damaged, or of an architecture or a setting that is not known; the message
            names the file and the field.
    """
    names = set(storage.list_names(uri))
    if _RECORD in names:
        dictionary = _load_own(uri)
    elif saelens.WEIGHTS in names:
        dictionary = saelens.load_saelens(uri)
    elif sparsify.WEIGHTS in names:
        dictionary = sparsify.load_sparsify(uri)
    else:
        raise DictionaryError(_nothing(uri, names))
    dictionary.autoencoder.to(device)
    return dictionary


def _load_own(uri: str) -> Dictionary:
    record = parse(Record, storage.read_bytes(storage.join(uri, _RECORD)), f"dictionary '{uri}': {_RECORD}")
    return dictionary_of(record, read_tensors(uri, _WEIGHTS), f"dictionary '{uri}'")


def _nothing(uri: str, names: set[str]) -> str:
    expected = (
        f"no dictionary in '{uri}': expected {_RECORD} and {_WEIGHTS} (finescope), {saelens.CONFIG} and {saelens.WEIGHTS} "
        f"(SAELens), or {sparsify.CONFIG} and {sparsify.WEIGHTS} in a folder named by hook point (sparsify)"
    )
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    return expected + (f"; '{pickles[0]}' is not read, as pickles can run code" if pickles else "")


def check_belongs(dictionary: Dictionary, model: ModelReference) -> None:
    """Hold a dictionary that was trained elsewhere to the model that it is to be used with; reads no weights.

    Raises:
        DictionaryError: the model has no such block, or its activations there are of another width.
        ModelError: the block has no such site.
    """
    where = f"sae.path: the dictionary of '{dictionary.model_path}' reads block {dictionary.layer}"
    if dictionary.layer > model.num_layers:
        raise DictionaryError(f"{where}; '{model.path}' has {model.num_layers} blocks")
    width, d_in = hook_width(load_meta_model(model), dictionary.hook), dictionary.autoencoder.d_in
    if width != d_in:
        raise DictionaryError(f"{where}, {dictionary.hook.site}, of width {d_in}; there '{model.path}' is of width {width}")
