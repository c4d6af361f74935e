"""Texts to pooled SAE codes: tokenise, run the first blocks, encode, pool; only sparse codes leave the device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from finescope.config import EmbedSection
from finescope.corpus.tokenise import CPU_BATCH_TOKENS, length_batches, pad_batch, tokenise
from finescope.errors import ResourceError
from finescope.models.hooks import capture
from finescope.models.load import ModelReference, load_model, load_tokenizer
from finescope.sae.autoencoder import ReconstructionError, SparseAutoencoder
from finescope.sae.dictionary import load_dictionary

EMBEDDED = pa.schema(
    [
        ("num_tokens", pa.int32()),
        ("fvu", pa.float32()),
        ("latent_ids", pa.list_(pa.int32())),
        ("latent_values", pa.list_(pa.float16())),
    ]
)
_LARGEST_HALF = float(np.finfo(np.float16).max)


class _Pooled(NamedTuple):
    """The largest latents of B documents, by falling value, on the device."""

    ids: Tensor  # [B, keep] int32
    values: Tensor  # [B, keep] float16, zero where a latent is not active
    fvu: Tensor  # [B] float32


class Embedder:
    """The first blocks of a model and a dictionary. Hook point and coordinates are the dictionary's own.

    `tokens` and `codes` may run at the same time in two threads, each of them in one thread at a time.
    """

    def __init__(self, model: ModelReference, dictionary_uri: str, section: EmbedSection) -> None:
        dictionary = load_dictionary(dictionary_uri)
        self._hook = dictionary.hook
        self._model = load_model(model, num_layers=dictionary.layer)
        self._autoencoder = dictionary.autoencoder.to(self._model.device)
        self._section = section
        on_cpu = self._model.device.type == "cpu"
        self._batch_tokens = min(section.batch_tokens, CPU_BATCH_TOKENS) if on_cpu else section.batch_tokens
        self._most_tokens = self._batch_tokens  # that fit into memory, as far as is known
        self.tokenizer = load_tokenizer(model)

    def __call__(self, texts: Sequence[str]) -> pa.Table:
        """A table of `EMBEDDED`, a row a text. Of equal texts in an equal list the result is the same to the bit."""
        return self.codes(self.tokens(texts))

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [T]. Needs the tokenizer alone."""
        return tokenise(self.tokenizer, texts, self._section.max_tokens)

    def codes(self, tokens: Sequence[np.ndarray]) -> pa.Table:
        """A table of `EMBEDDED`, a row a document. Needs the device alone.

        Batches depend on the list and the kind of device alone. Where a batch does not fit into the device's memory it is run
        in halves, and from then on in parts that fit: matrix products over fewer rows may add up in another order, so that
        the last bits of the model's dtype differ (about six digits of a code agree in float32, two in bfloat16).

        Raises:
            ResourceError: a document alone does not fit into the device's memory.
        """
        lengths = np.array([len(item) for item in tokens], np.int32)
        places: list[np.ndarray] = []
        parts: list[_Pooled] = []
        for batch in length_batches(lengths, self._batch_tokens):
            if lengths[batch[0]] < 2:
                break  # longest first, and one token is position 0 alone: no code
            ids, mask = pad_batch([tokens[index] for index in batch], self.tokenizer.pad_token_id)
            places.append(batch)
            parts += self._in_parts(ids, mask)
        keep = min(self._section.keep_latents, self._autoencoder.num_latents)
        ids, values = np.zeros((len(tokens), keep), np.int32), np.zeros((len(tokens), keep), np.float16)
        fvu = np.ones(len(tokens), np.float32)  # of no activation nothing is explained
        if parts:
            # The device is waited for once, here.
            order = np.concatenate(places)
            ids[order], values[order], fvu[order] = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return _table(lengths, fvu, ids, values)

    def _in_parts(self, ids: np.ndarray, mask: np.ndarray) -> list[_Pooled]:
        """The codes of a batch [B, T], of some rows after the other where memory is too small for all."""
        parts: list[_Pooled] = []
        start, width = 0, ids.shape[1]
        while start < len(ids):
            rows = max(1, min(len(ids) - start, self._most_tokens // width))
            part = self._if_it_fits(ids[start : start + rows], mask[start : start + rows])
            if part is not None:
                parts.append(part)
                start += rows
            elif rows == 1:
                raise ResourceError(
                    f"a document of {width:,} tokens does not fit into the memory of {self._model.device}: lower embed.max_tokens"
                )
            else:
                self._most_tokens = rows // 2 * width
        return parts

    def _if_it_fits(self, ids: np.ndarray, mask: np.ndarray) -> _Pooled | None:
        """The codes of rows [B, T]; None where the device's memory is too small."""
        try:
            return self._pooled(ids, mask)
        except torch.OutOfMemoryError:
            pass
        # Not before the exception is gone: its frames hold the tensors of the attempt.
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.no_grad()
    def _pooled(self, ids: np.ndarray, mask: np.ndarray) -> _Pooled:
        """The codes of rows [B, T] int64, padded on the right.

        Everything that has the shape of the documents is worked out here, from numpy's mask: to ask the device would be
        to wait for it.
        """
        used = mask.astype(bool)
        used[:, 0] = False  # an attention sink (METHOD 1)
        flat = np.flatnonzero(used)  # [N], the used positions
        counts = self._on_device(np.maximum(used.sum(axis=1), 1))  # [B]
        document = self._on_device(flat // mask.shape[1])  # [N], the row of each activation
        (values,) = capture(self._model, self._on_device(ids), self._on_device(mask), [self._hook])  # [B, T, d_in]
        activations = values.flatten(0, 1).index_select(0, self._on_device(flat))  # [N, d_in]
        pooled, error = _encode(self._autoencoder, activations, document, len(ids), self._section.pooling)
        if self._section.pooling == "mean":
            pooled /= counts[:, None]
        largest = pooled.topk(min(self._section.keep_latents, pooled.shape[1]), dim=1)
        fvu = _sums(document, error.error, len(ids)) / _sums(document, error.total, len(ids)).clamp(min=1e-12)
        return _Pooled(largest.indices.int(), largest.values.clamp(max=_LARGEST_HALF).half(), fvu)

    def _on_device(self, array: np.ndarray) -> Tensor:
        """The array on the model's device; on a GPU the copy runs beside its work."""
        tensor = torch.from_numpy(array)
        if self._model.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._model.device, non_blocking=True)


def _encode(
    autoencoder: SparseAutoencoder, activations: Tensor, document: Tensor, documents: int, pooling: str
) -> tuple[Tensor, ReconstructionError]:
    """Sum (pooling mean) or maximum of the latents of each document, [B, L], and the reconstruction's error.

    Args:
        activations: [N, d_in]; document: int64 [N], the row of each in what is returned.
    """
    latents = autoencoder.num_latents
    if autoencoder.architecture == "topk":
        code = autoencoder.encode_sparse(activations)
        place = (document[:, None] * latents + code.ids).flatten()
        if pooling == "mean":
            pooled = _sums(place, code.values.flatten(), documents * latents)
        else:
            pooled = activations.new_zeros(documents * latents, dtype=torch.float32)
            pooled.scatter_reduce_(0, place, code.values.flatten(), reduce="amax")
        reconstruction = autoencoder.decode_sparse(code)
        return pooled.view(documents, latents), autoencoder.reconstruction_error(activations, reconstruction)
    dense = autoencoder.encode(activations)
    pooled = dense.new_zeros(documents, latents)
    if pooling == "mean":
        # As a product: what sums the rows of a document in parallel on a GPU adds in an order that chance decides.
        membership = dense.new_zeros(documents, len(dense)).scatter_(0, document[None], 1.0)
        pooled = membership @ dense
    else:
        pooled.scatter_reduce_(0, document[:, None].expand_as(dense), dense, reduce="amax")
    return pooled, autoencoder.reconstruction_error(activations, autoencoder.decode(dense))


def _sums(places: Tensor, values: Tensor, size: int) -> Tensor:
    """[size]: the sum of the `values` [M] at each of `places` int64 [M]; the same bits each time."""
    sums = values.new_zeros(size)
    if values.is_cuda:
        # Sorted by place and summed; the other kernels add atomically, in an order that chance decides.
        return sums.index_put_((places,), values, accumulate=True)
    return sums.index_add_(0, places, values)


def _table(num_tokens: np.ndarray, fvu: np.ndarray, ids: np.ndarray, values: np.ndarray) -> pa.Table:
    """Codes [N, keep] as a table of `EMBEDDED`. Values that float16 cannot tell from zero are left out."""
    active = values > 0
    # By id, as readers of sparse rows expect; a tie of values has then no say in what is stored.
    order = np.argsort(np.where(active, ids, np.iinfo(np.int32).max), axis=1, kind="stable")
    ids, values = np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)
    counts = active.sum(axis=1)
    kept = np.arange(ids.shape[1]) < counts[:, None]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    columns = [
        pa.array(num_tokens),
        pa.array(fvu),
        pa.ListArray.from_arrays(offsets, pa.array(ids[kept])),
        pa.ListArray.from_arrays(offsets, pa.array(values[kept])),
    ]
    return pa.table(columns, schema=EMBEDDED)


def embed_texts(texts: Sequence[str], model: ModelReference, dictionary_uri: str, section: EmbedSection) -> pa.Table:
    """The codes of a few texts, such as the seeds."""
    return Embedder(model, dictionary_uri, section)(texts)
