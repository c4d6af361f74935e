"""Texts to pooled SAE codes: tokenise, run the first blocks, encode, pool; only sparse codes leave the device."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from finescope.config import EmbedSection
from finescope.corpus.tokenise import length_batches, pad_batch, tokenise
from finescope.models.hooks import capture
from finescope.models.load import ModelReference, load_model, load_tokenizer
from finescope.sae.dictionary import load_dictionary
from finescope.sae.stream import used_positions

EMBEDDED = pa.schema(
    [
        ("num_tokens", pa.int32()),
        ("fvu", pa.float32()),
        ("latent_ids", pa.list_(pa.int32())),
        ("latent_values", pa.list_(pa.float16())),
    ]
)


class Embedder:
    """The first blocks of a model and a dictionary. Hook point and coordinates are the dictionary's own."""

    def __init__(self, model: ModelReference, dictionary_uri: str, section: EmbedSection) -> None:
        dictionary = load_dictionary(dictionary_uri)
        self._hook = dictionary.hook
        self._model = load_model(model, num_layers=dictionary.layer)
        self._autoencoder = dictionary.autoencoder.to(self._model.device)
        self._section = section
        self.tokenizer = load_tokenizer(model)

    def __call__(self, texts: Sequence[str]) -> pa.Table:
        """A table of `EMBEDDED`, a row a text. Of equal texts in an equal list the result is the same to the bit."""
        section = self._section
        tokens = tokenise(self.tokenizer, texts, section.max_tokens)
        codes = _Codes(len(texts))
        for batch in length_batches([len(item) for item in tokens], section.batch_tokens):
            ids, mask = pad_batch([tokens[index] for index in batch], self.tokenizer.pad_token_id)
            if mask.shape[1] < 2:
                continue  # one token is position 0 alone: no code
            codes.put(batch, *self._pooled(torch.from_numpy(ids), torch.from_numpy(mask)))
        return codes.table(np.array([len(item) for item in tokens], np.int32))

    @torch.no_grad()
    def _pooled(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Largest latents of each document: ids [B, keep], values [B, keep], and FVU [B].

        Args:
            ids, mask: [B, T] int64.
        """
        device = self._model.device
        ids, mask = ids.to(device), mask.to(device)
        (values,) = capture(self._model, ids, mask, [self._hook])  # [B, T, d_in]
        used = used_positions(mask)
        document = torch.nonzero(used)[:, 0]  # [N], the row of each activation
        activations = values[used]  # [N, d_in]
        autoencoder = self._autoencoder
        pooled = torch.zeros(len(ids), autoencoder.num_latents, device=device)
        reduce = "sum" if self._section.pooling == "mean" else "amax"
        if autoencoder.architecture == "topk":
            code = autoencoder.encode_sparse(activations)
            place = document[:, None] * autoencoder.num_latents + code.ids
            pooled.view(-1).scatter_reduce_(0, place.flatten(), code.values.flatten(), reduce=reduce)
            reconstruction = autoencoder.decode_sparse(code)
        else:
            latents = autoencoder.encode(activations)
            pooled.scatter_reduce_(0, document[:, None].expand_as(latents), latents, reduce=reduce)
            reconstruction = autoencoder.decode(latents)
        count = used.sum(dim=1).clamp(min=1)
        if self._section.pooling == "mean":
            pooled /= count[:, None]
        error = autoencoder.reconstruction_error(activations, reconstruction)
        sums = torch.zeros(2, len(ids), device=device)
        sums.index_add_(1, document, torch.stack([error.error, error.total]))
        largest = pooled.topk(min(self._section.keep_latents, pooled.shape[1]), dim=1)
        return largest.indices.cpu(), largest.values.cpu(), (sums[0] / sums[1].clamp(min=1e-12)).cpu()


class _Codes:
    """Collects the codes of documents that come in any order."""

    def __init__(self, documents: int) -> None:
        self._ids = [np.empty(0, np.int32)] * documents
        self._values = [np.empty(0, np.float16)] * documents
        self._fvu = np.ones(documents, np.float32)  # of no activation nothing is explained

    def put(self, batch: np.ndarray, ids: Tensor, values: Tensor, fvu: Tensor) -> None:
        """Take the codes of documents `batch`. Values that f16 cannot tell from zero are left out."""
        halves = np.minimum(values.numpy(), np.finfo(np.float16).max).astype(np.float16)
        for row, index in enumerate(batch):
            active = halves[row] > 0
            # By id, as readers of sparse rows expect; a tie of values has then no say in what is stored.
            order = np.argsort(ids[row].numpy()[active], kind="stable")
            self._ids[index] = ids[row].numpy()[active][order].astype(np.int32)
            self._values[index] = halves[row][active][order]
        self._fvu[batch] = fvu.numpy()

    def table(self, num_tokens: np.ndarray) -> pa.Table:
        """All documents as a table of `EMBEDDED`."""
        offsets = pa.array(np.concatenate([[0], np.cumsum([len(ids) for ids in self._ids])]).astype(np.int32))
        ids = pa.array(np.concatenate([*self._ids, np.empty(0, np.int32)]))
        values = pa.array(np.concatenate([*self._values, np.empty(0, np.float16)]))
        columns = [
            pa.array(num_tokens),
            pa.array(self._fvu),
            pa.ListArray.from_arrays(offsets, ids),
            pa.ListArray.from_arrays(offsets, values),
        ]
        return pa.table(columns, schema=EMBEDDED)


def embed_texts(texts: Sequence[str], model: ModelReference, dictionary_uri: str, section: EmbedSection) -> pa.Table:
    """The codes of a few texts, such as the seeds."""
    return Embedder(model, dictionary_uri, section)(texts)
