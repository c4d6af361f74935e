"""A model one decoder block at a time: the blocks stay on disk until each is asked for, however large the model."""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from finescope.models.anatomy import Anatomy, anatomy_of, blocks_of
from finescope.models.depth import with_blocks
from finescope.models.load import ModelReference, load_meta_model, load_model, nested_names, quiet, refuse_defects
from finescope.models.local_files import local_files


class Blocks(Protocol):
    """A model in evaluation mode whose decoder blocks are asked for one by one."""

    @property
    def model(self) -> PreTrainedModel:
        """All of it but the weights of the blocks, which may be on the meta device."""
        ...

    @property
    def anatomy(self) -> Anatomy:
        """Where it keeps what."""
        ...

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """Decoder block `layer`, 0-based, with its weights, on the model's device: only while the context lasts."""
        ...


@dataclass(frozen=True)
class BlocksInMemory:
    """The blocks of a model that is whole in memory."""

    model: PreTrainedModel
    anatomy: Anatomy

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """See `Blocks.block`."""
        return nullcontext(blocks_of(self.model, self.anatomy)[layer])


@dataclass(frozen=True)
class BlocksOnDisk:
    """The blocks of a model in safetensors files, read each time they are asked for."""

    model: PreTrainedModel
    anatomy: Anatomy
    reference: ModelReference
    names: tuple[dict[str, list[str]], ...]  # a layer: by file the names of its tensors there
    loading: LoadStateDictConfig

    @contextmanager
    def block(self, layer: int) -> Iterator[nn.Module]:
        """See `Blocks.block`.

        Raises:
            ModelError: a weight of the block is missing, unknown or of another shape.
        """
        block = blocks_of(self.model, self.anatomy)[layer]
        self._read(f"{self.anatomy.blocks}.{layer}.", self.names[layer])
        try:
            yield block.requires_grad_(False)
        finally:
            block.to("meta")

    def _read(self, prefix: str, names: dict[str, list[str]]) -> None:
        # What transformers itself does to what it finds in files: old names, and experts that are stored one by one.
        with ExitStack() as files, quiet():
            found: dict[str, Any] = {}
            for path, inside in names.items():
                file = files.enter_context(safe_open(path, framework="pt"))
                found |= {name: file.get_slice(name) for name in inside}
            loaded, _ = convert_and_load_state_dict_in_model(self.model, found, self.loading)
        refuse_defects(
            self.reference,
            missing=[name for name in loaded.missing_keys if name.startswith(prefix)],
            unexpected=[name for name in loaded.unexpected_keys if not name.endswith(self.anatomy.stored_masks)],
            of_another_shape=[name for name, *_ in loaded.mismatched_keys] + list(loaded.conversion_errors),
        )


@contextmanager
def open_blocks(reference: ModelReference, device: torch.device | str) -> Iterator[Blocks]:
    """The blocks of a model for as long as the context lasts; embeddings, norms and head are in memory, on `device`.

    A model that has pickled weights alone is read whole.

    Raises:
        ModelError: as `load_model`.
    """
    with local_files(reference.path, weights=True) as path:
        reference = reference.model_copy(update={"path": path})
        files = _weight_files(reference)
        if not files:
            model = load_model(reference, device=device)
            yield BlocksInMemory(model, anatomy_of(model))
            return
        model = load_meta_model(reference).eval().requires_grad_(False)
        anatomy = anatomy_of(model)
        first = load_model(reference, num_layers=1, device=device)
        adopt_rest(model, first, anatomy)
        # Rotary frequencies have no weights: they follow from the configuration, and from kinds of blocks that `first` may lack.
        decoder = model.get_submodule(anatomy.decoder)
        for name, module in decoder.named_children():
            if list(module.buffers()) and not list(module.parameters()):
                setattr(decoder, name, type(module)(model.config).to(device))
        model.generation_config = first.generation_config
        mapping, left_out = nested_names(reference)
        conversions: Any = get_model_conversion_mapping(model, mapping)
        loading = LoadStateDictConfig(device_map={"": device}, dtype=model.dtype, weight_mapping=conversions)
        yield BlocksOnDisk(model, anatomy, reference, _names_by_layer(files, reference, anatomy, left_out), loading)


@dataclass(frozen=True)
class SomeBlocks:
    """Some blocks of another source, as a shallower model of the same class; both share what is beside the blocks."""

    model: PreTrainedModel
    anatomy: Anatomy
    whole: Blocks
    origins: tuple[int, ...]  # a layer: which block of `whole` it is

    def block(self, layer: int) -> AbstractContextManager[nn.Module]:
        """See `Blocks.block`."""
        return self.whole.block(self.origins[layer])


def without_blocks(whole: Blocks, kept: Sequence[int]) -> SomeBlocks:
    """The model of the blocks `kept` alone: 0-based, ascending."""
    dense = whole.model
    attention = getattr(dense.config, "_attn_implementation", None)
    with torch.device("meta"):
        model: Any = type(dense)._from_config(with_blocks(dense.config, kept), dtype=dense.dtype, attn_implementation=attention)
    adopt_rest(model, dense, whole.anatomy)
    model.generation_config = dense.generation_config
    return SomeBlocks(model.eval().requires_grad_(False), whole.anatomy, whole, tuple(kept))


def adopt_rest(model: PreTrainedModel, other: PreTrainedModel, anatomy: Anatomy) -> None:
    """Give `model` the modules of `other` that are not decoder blocks: embeddings, norms, head. They are shared."""
    blocks = anatomy.blocks.rpartition(".")[2]
    for owner in (anatomy.decoder, ""):
        for name, module in other.get_submodule(owner).named_children():
            if name not in (blocks, anatomy.decoder):
                setattr(model.get_submodule(owner), name, module)
    left = [name for name, value in model.named_parameters() if value.is_meta and not name.startswith(f"{anatomy.blocks}.")]
    assert not left, f"{left} are neither of a block nor of a module beside the blocks"


def _weight_files(reference: ModelReference) -> list[str]:
    """The safetensors files of a model, as `from_pretrained` chooses them."""

    def find(name: str) -> str | None:
        return cached_file(reference.path, name, revision=reference.revision, _raise_exceptions_for_missing_entries=False)

    if (whole := find(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    shards, _ = get_checkpoint_shard_files(reference.path, index, revision=reference.revision)
    return list(shards or ())


def _names_by_layer(
    files: list[str], reference: ModelReference, anatomy: Anatomy, left_out: tuple[str, ...]
) -> tuple[dict[str, list[str]], ...]:
    # Files may name the decoder otherwise than the class does, or not at all; the list of blocks they all name alike.
    of_block = re.compile(rf"(?:^|\.){re.escape(anatomy.blocks.rpartition('.')[2])}\.(\d+)\.")
    names: tuple[dict[str, list[str]], ...] = tuple({} for _ in range(reference.num_layers))
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                match = of_block.search(name)
                if match is not None and not name.startswith(left_out):
                    names[int(match.group(1))].setdefault(path, []).append(name)
    return names
