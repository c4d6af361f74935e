"""What the teacher says of the text that the student is trained on: of each next-token distribution the likeliest tokens, and
the mass of all others."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finescope import schemas
from finescope.corpus.tokenise import length_batches, pad_batch
from finescope.distillation.examples import Example, build_examples
from finescope.distillation.losses import CHUNK_LOGITS
from finescope.models.likelihood import check_logits, logits_of

_LEAST = torch.finfo(torch.float16).min


class TeacherScorer:
    """Maps rewrites to the teacher's log-probabilities at every position that is trained on, each text read once.

    They are stored as float16, whose least value, -65504, stands for what is less, log 0 included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        max_tokens: int,
        top_k: int,
        temperature: float,
        batch_tokens: int,
    ) -> None:
        """
        Args:
            tokenizer: the student's, so that positions are those of its examples; the teacher's has the same vocabulary.
            vocab_size: of the student's logits, padding included. What the teacher's have beyond it is no token.
            max_tokens: of an example.
            top_k: tokens that are kept of a distribution, at most `vocab_size`.
            temperature: what logits are divided by.
            batch_tokens: of a forward pass, padding included.

        Raises:
            ModelError: the family changes its logits in a way that is not known.
        """
        check_logits(model)
        self._model, self._tokenizer = model.eval(), tokenizer
        self._vocab_size, self._top_k, self._temperature = vocab_size, top_k, temperature
        self._max_tokens, self._batch_tokens = max_tokens, batch_tokens
        self._chunk = max(1, CHUNK_LOGITS // int(model.config.get_text_config().vocab_size))

    def __call__(self, rewrites: pa.Table) -> pa.Table:
        """`rewrites`: `schemas.REWRITES`. Returns `schemas.TEACHER_LOGPROBS`, a row a row, in the same order.

        A document that `build_examples` drops has no target.
        """
        pairs = zip(rewrites.column("prompt").to_pylist(), rewrites.column("response").to_pylist(), strict=True)
        built = build_examples(self._tokenizer, pairs, self._max_tokens)
        dropped = {row for row, _ in built.dropped}
        rows = [row for row in range(rewrites.num_rows) if row not in dropped]
        targets = np.zeros(rewrites.num_rows, np.int32)
        ids = [np.empty(0, np.int32)] * rewrites.num_rows
        logprobs = [np.empty(0, np.float16)] * rewrites.num_rows
        for batch in length_batches([len(example.tokens) for example in built.examples], self._batch_tokens):
            for place, (best, values) in zip(batch, self._score([built.examples[at] for at in batch]), strict=True):
                row = rows[place]
                targets[row], ids[row], logprobs[row] = len(best), best.ravel(), values.ravel()
        columns = {
            "doc_id": rewrites.column("doc_id"),
            "targets": targets,
            "ids": _lists(ids, pa.int32()),
            "logprobs": _lists(logprobs, pa.float16()),
        }
        return schemas.conform(pa.table(columns), schemas.TEACHER_LOGPROBS)

    @torch.inference_mode()
    def _score(self, examples: Sequence[Example]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each example of n targets the best tokens, int32 [n, k], and log-probabilities, float16 [n, k + 1]."""
        tokens, _ = pad_batch([example.tokens for example in examples], 0)
        # No attention mask: with causal attention and padding on the right no token sees any.
        ids = torch.from_numpy(tokens).to(self._model.device)
        hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, d_model]
        # The token at a position is foretold from the one before.
        spans = [(example.loss_start - 1, len(example.tokens) - 1) for example in examples]
        read = torch.cat([states[start:end] for states, (start, end) in zip(hidden, spans, strict=True)])
        parts = [self._distributions(part) for part in read.split(self._chunk)]
        best, values = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        ends = np.cumsum([end - start for start, end in spans])[:-1]
        return zip(np.split(best, ends), np.split(values, ends), strict=True)

    def _distributions(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Best tokens, int32 [N, k], and log-probabilities, float16 [N, k + 1], from last hidden states [N, d_model]."""
        logits = logits_of(self._model, hidden)[:, : self._vocab_size].float() / self._temperature
        best, total = logits.topk(self._top_k), logits.logsumexp(-1, keepdim=True)
        # Summed, and not 1 less the mass of the best: of a sure teacher rounding would leave none of it.
        others = logits.scatter_(-1, best.indices, -math.inf).logsumexp(-1, keepdim=True)
        logprobs = torch.cat([best.values, others], dim=-1) - total
        return best.indices.int(), logprobs.clamp(min=_LEAST).half()


def _lists(parts: Sequence[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts), kind))
