"""The only `from_pretrained` of the project: configurations, tokenizers and models, checked after they are read."""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from finescope import directories, storage
from finescope.config import ModelSection
from finescope.errors import ModelError
from finescope.models.anatomy import anatomy_of, block_parameters, blocks_of
from finescope.models.depth import with_blocks
from finescope.models.local_files import local_files, local_gguf
from finescope.models.nested import NESTED, text_config
from finescope.models.source import ModelSource


class ModelReference(BaseModel):
    """A model that is ready to be loaded, from any process: what every later step takes. Goes to JSON and back."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    path: str  # hub id, absolute local directory, or fsspec URI of a directory
    revision: str | None  # the commit, for a hub model
    dtype: str  # resolved: float32, bfloat16 or float16
    trust_remote_code: bool
    allow_pickle: bool
    fingerprint: str
    model_type: str
    num_layers: int
    d_model: int
    vocab_size: int
    num_parameters: int  # tied weights counted once
    block_parameters: int  # of the decoder blocks: no embeddings, no final norm


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def materialise(source: ModelSource, section: ModelSection, uri: str) -> ModelReference:
    """Make the model loadable quickly and in part. A GGUF file is dequantised once into a stock safetensors directory
    at `uri`; of anything else nothing is copied.

    Raises:
        ModelError: the architecture is unknown (the message names the module).
    """
    meta = load_meta_model(source, trust_remote_code=section.trust_remote_code)
    anatomy = anatomy_of(meta)
    path = source.path
    if source.kind == "gguf":
        path = storage.absolute(uri)
        _dequantise(source.path, path, meta.config, "float32" if section.dtype == "auto" else section.dtype)
    return ModelReference(
        path=path,
        revision=source.revision,
        dtype=_resolved_dtype(section, meta.config, source),
        trust_remote_code=section.trust_remote_code,
        allow_pickle=section.allow_pickle,
        fingerprint=source.fingerprint,
        model_type=str(meta.config.model_type),
        num_layers=len(blocks_of(meta, anatomy)),
        d_model=meta.config.hidden_size,
        vocab_size=meta.config.vocab_size,
        num_parameters=meta.num_parameters(),
        block_parameters=block_parameters(meta, anatomy),
    )


def reference_of(path: str, like: ModelReference, fingerprint: str) -> ModelReference:
    """A reference to a stock directory that this run wrote (a pruned or trained student), loaded in the dtype of `like`."""
    source = ModelSource("directory", storage.absolute(path), None, fingerprint, like.model_type)
    return materialise(source, ModelSection.model_validate({"path": path, "dtype": like.dtype}), path)


def load_config(reference: ModelReference) -> PreTrainedConfig:
    """The model's configuration, of a multimodal one that of its text model; reads no weights."""
    with local_files(reference.path, weights=False) as path:
        return text_config(
            AutoConfig.from_pretrained(path, revision=reference.revision, trust_remote_code=reference.trust_remote_code)
        )


def load_tokenizer(reference: ModelReference) -> Any:
    """The model's tokenizer, padding on the right with a pad token that is there (the end-of-text token if none is named).

    Raises:
        ModelError: there is no tokenizer, or it has neither a pad nor an end-of-text token.
    """
    with local_files(reference.path, weights=False) as path:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=reference.revision, trust_remote_code=reference.trust_remote_code, padding_side="right"
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"model '{reference.path}': its tokenizer cannot be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"model '{reference.path}': its tokenizer has neither a pad token nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def source_tokenizer(source: ModelSource, section: ModelSection) -> Any:
    """The tokenizer of a model that has not been materialised."""
    if source.kind != "gguf":
        return load_tokenizer(materialise(source, section, source.path))
    with local_gguf(source.path) as file:
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def load_model(
    reference: ModelReference,
    *,
    num_layers: int | None = None,
    device: torch.device | str | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model in evaluation mode, without gradients, on `device` (default: the GPU where there is one).

    Args:
        num_layers: read blocks 1..num_layers only. The final norm and the head are still there but mean nothing then.
        attention: "sdpa" or "eager"; None lets transformers choose.

    Raises:
        ModelError: a weight is missing, unknown or of another shape; the dtype is not the reference's.
    """
    with local_files(reference.path, weights=True) as path:
        whole = AutoConfig.from_pretrained(path, revision=reference.revision, trust_remote_code=reference.trust_remote_code)
        nested, config = NESTED.get(whole.model_type), text_config(whole)
        if num_layers is not None:
            config = _truncated(config, num_layers, reference)
        extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
        if nested is not None:
            extra["key_mapping"] = nested.key_mapping
        try:
            with quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    path,
                    config=config,
                    revision=reference.revision,
                    dtype=getattr(torch, reference.dtype),
                    trust_remote_code=reference.trust_remote_code,
                    # None lets transformers fall back on pickles; True never does.
                    use_safetensors=None if reference.allow_pickle else True,
                    # Mismatches are then listed like the other defects and refused below.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **extra,
                )
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model '{reference.path}': its weights cannot be read: {error}") from error
    model, loading = loaded
    _check_loaded(model, loading, reference, () if nested is None else nested.left_out)
    return model.eval().requires_grad_(False).to(device if device is not None else default_device())


def load_meta_model(origin: ModelSource | ModelReference, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights, on the meta device: enough for its anatomy and its sizes. Of a reference in its dtype.

    Raises:
        ModelError: transformers does not know the architecture, or it is not a causal language model.
    """
    dtype: dict[str, Any] = {}
    if isinstance(origin, ModelReference):
        config, trust_remote_code = load_config(origin), origin.trust_remote_code
        dtype["dtype"] = getattr(torch, origin.dtype)
    else:
        config = _source_config(origin, trust_remote_code)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise ModelError(f"model '{origin.path}': '{config.model_type}' is not a causal language model")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **dtype)


def _source_config(source: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    if source.model_type not in CONFIG_MAPPING and not trust_remote_code and source.kind != "gguf":
        raise ModelError(
            f"model '{source.path}': model_type '{source.model_type}' is unknown to transformers {transformers.__version__}"
        )
    if source.kind != "gguf":
        with local_files(source.path, weights=False) as path:
            config = AutoConfig.from_pretrained(path, revision=source.revision, trust_remote_code=trust_remote_code)
            return text_config(config)
    with local_gguf(source.path) as file:
        try:
            return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        except ValueError as error:
            raise ModelError(f"model '{source.path}': transformers cannot read this GGUF file: {error}") from error


def _dequantise(gguf: str, uri: str, config: PreTrainedConfig, dtype: str) -> None:
    """GGUF file to a stock directory: config.json, generation_config.json, tokenizer, one safetensors file."""
    # The progress bar of this one obeys no setting.
    with (
        local_gguf(gguf) as file,
        quiet(),
        contextlib.redirect_stderr(io.StringIO()),
        directories.scratch_directory(uri) as target,
    ):
        folder, name = str(file.parent), file.name
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            gguf_file=name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
        )
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        for leftover in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(leftover, None)
        tokenizer.save_pretrained(target)
        directories.put_tree(target, uri)


def _truncated(config: PreTrainedConfig, num_layers: int, reference: ModelReference) -> PreTrainedConfig:
    """The configuration of the first blocks alone."""
    total = config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ModelError(f"layer {num_layers}: model '{reference.path}' has blocks 1 to {total}")
    return with_blocks(config, range(num_layers))


def refuse_defects(reference: ModelReference, **defects: Iterable[str]) -> None:
    """Refuse weights that do not fit; what is wrong with them is the name of the argument that lists theirs.

    Raises:
        ModelError: a list has an entry.
    """
    for defect, keys in defects.items():
        if names := sorted(keys):
            raise ModelError(
                f"model '{reference.path}': {len(names)} weights are {defect.replace('_', ' ')}, among them '{names[0]}'"
            )


def nested_names(reference: ModelReference) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """Of a text model inside a multimodal checkpoint: how its names there become its own, and how those of the rest begin."""
    with local_files(reference.path, weights=False) as path:
        whole = AutoConfig.from_pretrained(path, revision=reference.revision, trust_remote_code=reference.trust_remote_code)
    nested = NESTED.get(whole.model_type)
    return (None, ()) if nested is None else (nested.key_mapping, nested.left_out)


def _check_loaded(model: PreTrainedModel, loading: dict[str, Any], reference: ModelReference, left_out: tuple[str, ...]) -> None:
    anatomy = anatomy_of(model)
    # Checkpoints that were saved without a head have no prefix.
    prefix, _, rest = anatomy.blocks.partition(".")
    dropped = re.compile(rf"(?:{re.escape(prefix)}\.)?{re.escape(rest)}\.(\d+)\.")
    loaded = len(blocks_of(model, anatomy))

    def not_asked_for(key: str) -> bool:
        match = dropped.match(key)
        spare = key.startswith(left_out) or key.endswith(anatomy.stored_masks)
        return spare or (match is not None and loaded <= int(match.group(1)) < reference.num_layers)

    refuse_defects(
        reference,
        missing=loading["missing_keys"],
        unexpected=[key for key in loading["unexpected_keys"] if not not_asked_for(key)],
        of_another_shape=[str(entry[0]) for entry in loading["mismatched_keys"]],
    )
    if str(model.dtype) != f"torch.{reference.dtype}":
        raise ModelError(f"model '{reference.path}' was loaded as {model.dtype}, not as {reference.dtype}")


def _resolved_dtype(section: ModelSection, config: PreTrainedConfig, source: ModelSource) -> str:
    if section.dtype != "auto":
        return section.dtype
    if source.kind == "gguf" or default_device().type == "cpu":
        return "float32"
    return str(config.dtype or torch.float32).removeprefix("torch.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load report: what they would say is checked here."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
