"""SAELens's layout, version 6: `cfg.json` and `sae_weights.safetensors` (read of older versions too).

Their standard is relu_l1 here. Batch top-k dictionaries are jumprelu ones with one threshold for all latents, which is how
SAELens itself saves them for inference.
"""

import json
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from finescope import directories
from finescope.errors import DictionaryError
from finescope.sae.autoencoder import Architecture
from finescope.sae.foreign import WideWeights, checked, full_width, kept_of, narrow, read_config, read_tensors, widen
from finescope.sae.hook_names import lens_name, require_hook
from finescope.sae.record import Dictionary

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# The first version of this layout; without one SAELens takes the file for an older one.
_LAYOUT_VERSION = "6.0.0"
_WRITTEN: dict[Architecture, str] = {"topk": "topk", "relu_l1": "standard", "jumprelu": "jumprelu", "batch_topk": "jumprelu"}
_READ: dict[str, Architecture] = {
    "topk": "topk",
    "standard": "relu_l1",
    "jumprelu": "jumprelu",
    # What a training checkpoint says; nested prefixes have no part in encoding.
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
}
# Names before version 6.
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


def save_saelens(uri: str, dictionary: Dictionary) -> str:
    """Write the dictionary to directory `uri`, replacing what is there; returns `uri`."""
    autoencoder, wide = dictionary.autoencoder, widen(dictionary.autoencoder)
    architecture = _WRITTEN[autoencoder.architecture]
    tensors = {"W_enc": wide.encoder.T, "b_enc": wide.encoder_bias, "W_dec": wide.decoder, "b_dec": wide.decoder_bias}
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": autoencoder.d_in,
        "d_sae": autoencoder.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if architecture == "topk":
        config |= {"k": autoencoder.k, "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":
        tensors["threshold"] = wide.threshold
    # Here and not in a file of its own, ours is still there after SAELens has loaded and saved the dictionary again.
    config["metadata"] = {
        "sae_lens_version": _LAYOUT_VERSION,
        "sae_lens_training_version": None,
        "model_name": dictionary.model_path,
        "hook_name": lens_name(dictionary.hook),
        "finescope": kept_of(dictionary),
    }
    with directories.scratch_directory(uri) as folder:
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config) + "\n")
        directories.put_tree(folder, uri)
    return uri


def load_saelens(uri: str) -> Dictionary:
    """Read a dictionary; what SAELens has a flag for is folded into the weights.

    Raises:
        DictionaryError: a file is missing or damaged, or a setting is not known or cannot be folded; names file and field.
    """
    where = f"dictionary '{uri}': {CONFIG}"
    raw = read_config(uri, CONFIG)
    # Before version 6 what is now metadata stood beside the rest.
    config: dict[str, Any] = {**(raw.get("metadata") or {}), **{_RENAMED.get(name, name): raw[name] for name in raw}}
    architecture = _architecture(config, where)
    _refuse_unfoldable(config, where)
    wide = _weights(uri, config, architecture)
    k = _active(config, architecture, len(wide.encoder), where)
    if config.get("finescope") is not None:
        dictionary = narrow(config["finescope"], wide, f"{where}: metadata.finescope")
        ours = dictionary.autoencoder
        if _READ[_WRITTEN[ours.architecture]] != architecture or (architecture == "topk" and ours.k != k):
            raise DictionaryError(
                f"{where}: architecture {architecture}, k {k}; metadata.finescope says {ours.architecture}, k {ours.k}"
            )
        return dictionary
    if architecture == "jumprelu" and "batchtopk" in str(config.get("training_architecture")):
        details = config.get("training_architecture_details") or {}
        if "k" in details:
            architecture, k = "batch_topk", _whole(details["k"], f"{where}: metadata.training_architecture_details.k")
    name = config.get("hook_name")
    if not isinstance(name, str):
        raise DictionaryError(f"{where}: hook_name: expected the name of a hook point, found {name!r}")
    return full_width(
        wide,
        architecture,
        k,
        hook=require_hook(name, f"{where}: hook_name"),
        module=name,
        model=str(config.get("model_name") or "unknown"),
        revision=(config.get("model_from_pretrained_kwargs") or {}).get("revision"),
        where=where,
    )


def _architecture(config: dict[str, Any], where: str) -> Architecture:
    activation = config.get("activation_fn", "relu")
    name = config.get("architecture", "standard")
    if activation == "topk" and name == "standard":
        name = "topk"  # how version 5 and older said it
    elif activation not in ("relu", "topk"):
        raise DictionaryError(f"{where}: activation_fn: '{activation}' is not known; expected relu or topk")
    if name not in _READ:
        raise DictionaryError(f"{where}: architecture: '{name}' is not known; expected one of {', '.join(_READ)}")
    return _READ[name]


def _refuse_unfoldable(config: dict[str, Any], where: str) -> None:
    """Modes that divide by something of each activation cannot be folded, those of a data set only if that is beside them."""
    mode = config.get("normalize_activations")
    if mode is True:
        mode = "expected_average_only_in"
    if mode not in (None, False, "none"):
        reason = {
            "expected_average_only_in": "its factor is not in these files; save it with SAELens once it is folded",
            "covariance_whitening": "its matrix is not in these files; save it with SAELens once it is folded",
        }.get(mode, "it divides by the norm of each activation, which no weights can")
        raise DictionaryError(f"{where}: normalize_activations: '{mode}' cannot be read, expected none: {reason}")
    reshape = config.get("reshape_activations", "none")
    if reshape != "none":
        raise DictionaryError(f"{where}: reshape_activations: '{reshape}' cannot be read, expected none")
    if config.get("hook_head_index") is not None:
        raise DictionaryError(f"{where}: hook_head_index: one head's activations cannot be read, expected null")


def _weights(uri: str, config: dict[str, Any], architecture: Architecture) -> WideWeights:
    where = f"dictionary '{uri}': {CONFIG}"
    d_in, num_latents = (_whole(config.get(name), f"{where}: {name}") for name in ("d_in", "d_sae"))
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, num_latents),
        "b_enc": (num_latents,),
        "W_dec": (num_latents, d_in),
        "b_dec": (d_in,),
    }
    if architecture == "jumprelu":
        shapes["threshold"] = (num_latents,)
    if architecture == "batch_topk":
        shapes["topk_threshold"] = ()
    tensors = read_tensors(uri, WEIGHTS)
    scaling = tensors.get("scaling_factor")
    if scaling is not None and bool((scaling == 1).all()):
        del tensors["scaling_factor"]  # SAELens 2 to 5 wrote it whether it meant anything or not
    found = checked(tensors, shapes, f"dictionary '{uri}': {WEIGHTS}")
    encoder, bias, decoder, centre = found["W_enc"].T.contiguous(), found["b_enc"], found["W_dec"], found["b_dec"]
    if not config.get("apply_b_dec_to_input", True):
        bias = bias + encoder @ centre
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = decoder.norm(dim=1)
        # A latent whose decoder row is zero has pre-activation zero.
        encoder, bias = encoder * norms[:, None], bias * norms
        decoder = decoder / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return WideWeights(encoder, bias, decoder, centre, _threshold(found, num_latents))


def _threshold(tensors: dict[str, Tensor], num_latents: int) -> Tensor:
    """[L]; a batch top-k checkpoint has one number, in units of what is compared with it, so that no folding moves it."""
    if "topk_threshold" in tensors:
        return tensors["topk_threshold"].expand(num_latents).contiguous()
    return tensors.get("threshold", torch.zeros(num_latents))


def _active(config: dict[str, Any], architecture: Architecture, num_latents: int, where: str) -> int:
    """k; of an architecture that has none every latent may be active."""
    if architecture not in ("topk", "batch_topk"):
        return num_latents
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    return _whole(k, f"{where}: k")


def _whole(value: Any, where: str) -> int:
    """A whole number above 0; batch top-k's k may be a fraction and is rounded."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0.5:
        raise DictionaryError(f"{where}: expected a number above 0, found {value!r}")
    return round(value)
