"""What a student computes, block by block as it is made: the logits that the saved one must give."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from finescope.models.anatomy import Anatomy
from finescope.models.likelihood import logits_of
from finescope.pruning.stream import Batch, advance, open_stream

_LONG = 512  # tokens of the long document, where the model takes as many
_PADDED = (32, 20)  # tokens of the two documents of a batch
_LAST = 32  # tokens of a document whose logits are compared: 512 rows of a large vocabulary would be a quarter of a gigabyte


class Case(NamedTuple):
    """Documents, and the logits of their last tokens."""

    input_ids: np.ndarray  # int64 [documents, tokens]
    attention_mask: np.ndarray  # the same, padded on the right
    logits: np.ndarray  # float32 [documents, last tokens, vocabulary]; at padding they mean nothing


class Probe:
    """Documents of one token, of many, and two in one batch, that go through each block of a student."""

    def __init__(self, student: PreTrainedModel, anatomy: Anatomy) -> None:
        self._student, self._anatomy = student, anatomy
        longest: int | None = getattr(student.config, "max_position_embeddings", None)
        self._documents = _documents(int(student.config.vocab_size), longest)
        self._stream = open_stream(student, anatomy, self._documents)

    def advance(self, layer: int, block: nn.Module) -> None:
        """Go through a finished block."""
        advance(block, self._stream, layer)

    @torch.no_grad()
    def cases(self) -> list[Case]:
        """What was found, after the last block."""
        norm = self._student.get_submodule(self._anatomy.final_norm)
        found = []
        for (ids, mask), hidden in zip(self._documents, self._stream.hidden, strict=True):
            logits = logits_of(self._student, norm(hidden[:, -_LAST:].to(self._stream.device)))
            found.append(Case(ids.cpu().numpy(), mask.cpu().numpy(), logits.float().cpu().numpy()))
        return found


def _documents(vocabulary: int, longest: int | None) -> list[Batch]:
    """Random tokens: as a document of one, one as long as the model takes, and two of different lengths in a batch.

    `longest`: the tokens that the model can take, None where it has no limit.
    """
    long = min(_LONG, longest or _LONG)
    tokens = torch.randint(vocabulary, (1, long), generator=torch.Generator().manual_seed(0))
    pair = torch.cat([tokens[:, : _PADDED[0]], tokens[:, -_PADDED[0] :]])
    mask = torch.ones_like(pair)
    mask[1, _PADDED[1] :] = 0
    return [(tokens[:, :1], mask[:1, :1]), (tokens, torch.ones_like(tokens)), (pair, mask)]
