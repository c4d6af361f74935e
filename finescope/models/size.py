"""The sizes of a model, from its architecture alone."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from finescope.models.anatomy import anatomy_of, block_parameters, blocks_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}


@dataclass(frozen=True)
class Size:
    """Counts that costs follow from; tied weights are counted once."""

    num_parameters: int
    block_parameters: int
    num_layers: int
    d_model: int
    vocab_size: int
    bytes_per_parameter: int

    @property
    def embedding_parameters(self) -> int:
        """Embeddings, head and final norm."""
        return self.num_parameters - self.block_parameters

    @property
    def weight_bytes(self) -> int:
        """All weights in memory."""
        return self.num_parameters * self.bytes_per_parameter


def size_of(model: PreTrainedModel, dtype: str) -> Size:
    """The sizes of `model`, which may be on the meta device, held as `dtype` (auto: four bytes, the most it can be)."""
    anatomy = anatomy_of(model)
    return Size(
        model.num_parameters(),
        block_parameters(model, anatomy),
        len(blocks_of(model, anatomy)),
        model.config.hidden_size,
        model.config.vocab_size,
        _BYTES[dtype],
    )
