"""The layout of EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder that is named by its hook point.

What the layout has no place for is in a file of our own beside them: keys of `cfg.json` that sparsify does not know it
drops, with a warning that shows all they hold.
"""

import json
from typing import Any

import torch
from safetensors.torch import save_file

from finescope import directories, storage
from finescope.errors import DictionaryError
from finescope.sae.foreign import WideWeights, checked, full_width, kept_of, narrow, read_config, read_tensors, widen
from finescope.sae.hook_names import hook_of, module_name, require_hook
from finescope.sae.record import Dictionary

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_KEPT = "finescope.json"
# Of the training run, beside the folders of its hook points; what is read of it here is the model's name.
_RUN = "config.json"


def save_sparsify(uri: str, dictionary: Dictionary) -> str:
    """Write the dictionary into a folder named by its hook point under directory `uri`, replacing what is there.

    Returns:
        The folder, `uri`/layers.9 for the stream after block 10.

    Raises:
        DictionaryError: it is not a topk dictionary, or reads the input of a module.
    """
    autoencoder = dictionary.autoencoder
    if autoencoder.architecture != "topk":
        raise DictionaryError(
            f"sparsify holds topk dictionaries only, this one is {autoencoder.architecture}; SAELens's layout holds it (sae-lens)"
        )
    name, wide = module_name(dictionary.hook, dictionary.module), widen(autoencoder)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, autoencoder.num_latents // autoencoder.d_in),
        "normalize_decoder": False,  # the folded scale is in its rows
        "num_latents": autoencoder.num_latents,
        "k": autoencoder.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": autoencoder.d_in,
    }
    tensors = {
        "encoder.weight": wide.encoder,
        "encoder.bias": wide.encoder_bias,
        "W_dec": wide.decoder,
        "b_dec": wide.decoder_bias,
    }
    with directories.scratch_directory(uri) as root:
        folder = root / name
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config) + "\n")
        (folder / _KEPT).write_text(json.dumps(kept_of(dictionary)) + "\n")
        run = {"model": dictionary.model_path, "revision": dictionary.model_revision, "hookpoints": [name]}
        (root / _RUN).write_text(json.dumps(run, indent=2) + "\n")
        directories.put_tree(root, uri)
    return storage.join(uri, name)


def load_sparsify(uri: str) -> Dictionary:
    """Read a dictionary from the folder of its hook point.

    Raises:
        DictionaryError: a file is missing or damaged, a setting is not known, or the folder's name is no hook point.
    """
    where = f"dictionary '{uri}': {CONFIG}"
    config = read_config(uri, CONFIG)
    k = _setting(config, "k", where)
    wide = _weights(uri, config, where)
    if storage.exists(storage.join(uri, _KEPT)):
        dictionary = narrow(read_config(uri, _KEPT), wide, f"dictionary '{uri}': {_KEPT}")
        ours = dictionary.autoencoder
        if ours.architecture != "topk" or ours.k != k:
            raise DictionaryError(f"{where}: topk, k {k}; {_KEPT} says {ours.architecture}, k {ours.k}")
        return dictionary
    name = _hook_name(uri)
    run = _run(uri, name)
    return full_width(
        wide,
        "topk",
        k,
        hook=require_hook(name, f"dictionary '{uri}': its folder"),
        module=name,
        model=str(run.get("model") or "unknown"),
        revision=run.get("revision"),
        where=where,
    )


def _weights(uri: str, config: dict[str, Any], where: str) -> WideWeights:
    for name, expected in (("activation", "topk"), ("transcode", False), ("skip_connection", False), ("signed", False)):
        found = config.get(name, expected)
        if found != expected:
            raise DictionaryError(f"{where}: {name}: {found!r} cannot be read, expected {expected!r}")
    d_in = _setting(config, "d_in", where)
    num_latents = config.get("num_latents") or d_in * _setting(config, "expansion_factor", where)
    shapes = {
        "encoder.weight": (num_latents, d_in),
        "encoder.bias": (num_latents,),
        "W_dec": (num_latents, d_in),
        "b_dec": (d_in,),
    }
    tensors = checked(read_tensors(uri, WEIGHTS), shapes, f"dictionary '{uri}': {WEIGHTS}")
    encoder, bias, decoder, centre = (tensors[name] for name in shapes)
    return WideWeights(encoder, bias, decoder, centre, torch.zeros(num_latents))


def _setting(config: dict[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DictionaryError(f"{where}: {name}: expected a whole number above 0, found {value!r}")
    return value


def _parts(uri: str) -> list[str]:
    return storage.absolute(uri).rstrip("/").split("/")


def _hook_name(uri: str) -> str:
    """The folder's name, or its parent's where the folder is one of several seeds."""
    *_, parent, name = ("", *_parts(uri))
    return parent if hook_of(name) is None and name.startswith("seed") else name


def _run(uri: str, hook_name: str) -> dict[str, Any]:
    """The record of the training run above the folder `hook_name`; empty where there is none."""
    parts = _parts(uri)
    above = "/".join(parts[: len(parts) - 1 - parts[::-1].index(hook_name)])
    return read_config(above, _RUN) if above and storage.exists(storage.join(above, _RUN)) else {}
