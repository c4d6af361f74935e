"""Generation for many prompts at once, with a key/value cache.

What it does beyond `generate` of transformers, all of it measured on two cores: the beginning that all prompts share is
read once and not once a row, a row that has ended leaves the batch, and the cache grows in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from finescope.distillation.sampling import Sampler

# Positions by which a full cache grows: a copy of the cache every so many tokens instead of at each.
_SPARE_POSITIONS = 64


@dataclass(frozen=True)
class Prompt:
    """What the model is given."""

    tokens: list[int]
    budget: int  # tokens that may follow
    seed: int  # of what is drawn, where tokens are sampled


@dataclass(frozen=True)
class Generated:
    """What the model wrote after one prompt."""

    tokens: list[int]  # without the end token
    finished: bool  # it wrote an end token; else its budget ran out


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    temperature: float,
    batch_tokens: int,
    progress: Callable[[int], Any],
) -> list[Generated]:
    """Token after token behind each of `prompts`: the most likely one at temperature 0, else sampled (`Sampler`).

    Prompts of like length go together, at most `batch_tokens` cached positions a batch, padding counted. `progress` is
    told of prompts that are done.
    """
    results: dict[int, Generated] = {}
    shared = _shared_prefix([prompt.tokens for prompt in prompts])
    prefix = _read_prefix(model, prompts[0].tokens[:shared]) if shared else None
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].tokens), -prompts[index].budget, index))
    begin = 0
    while begin < len(order):
        batch = _take(order[begin:], prompts, batch_tokens)
        written = _Batch(model, [prompts[index] for index in batch], ends, temperature, shared, prefix).run()
        results.update(zip(batch, written, strict=True))
        progress(len(batch))
        begin += len(batch)
    return [results[index] for index in range(len(prompts))]


class _RoomyLayer(DynamicLayer):
    """A cache layer whose tensors are views of larger ones, so that a new token is written and nothing copied."""

    _storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [rows, key/value heads, new positions, head_dim]. Returns all that is cached."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        held = self._storage
        if held is None or held[0].shape[2] < new:
            held = _room(key_states, new + _SPARE_POSITIONS), _room(value_states, new + _SPARE_POSITIONS)
            if old:
                held[0][:, :, :old], held[1][:, :, :old] = self.states()
            self._storage = held
        held[0][:, :, old:new], held[1][:, :, old:new] = key_states, value_states
        self.keys, self.values = held[0][:, :, :new], held[1][:, :, :new]
        return self.keys, self.values

    def states(self) -> tuple[Tensor, Tensor]:
        """All that is cached: keys and values, [rows, key/value heads, positions, head_dim]."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        assert self._storage is not None
        length = self.get_seq_length()
        held = self._storage[0][rows], self._storage[1][rows]
        self._storage = held
        self.keys, self.values = held[0][:, :, :length], held[1][:, :, :length]


class _Batch:
    """Rows that are generated together: [shared prefix][padding][rest of the prompt][what is written]."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[Prompt],
        ends: frozenset[int],
        temperature: float,
        shared: int,
        prefix: Cache | None,
    ) -> None:
        """`prefix`: the cache of the first `shared` tokens, which all prompts begin with."""
        self._model, self._ends, self._shared = model, ends, shared
        self._rests = [prompt.tokens[shared:] for prompt in prompts]
        self._budgets = [prompt.budget for prompt in prompts]
        self._sampler = Sampler([prompt.seed for prompt in prompts], temperature, model.device)
        self._cache = Cache(layer_class_to_replicate=_RoomyLayer)
        if prefix is not None:
            for index, layer in enumerate(prefix.layers):
                assert isinstance(layer, _RoomyLayer)
                keys, values = (states.expand(len(prompts), -1, -1, -1) for states in layer.states())
                self._cache.update(keys, values, index)

    def run(self) -> list[Generated]:
        """Generate until every row has ended."""
        written: list[list[int]] = [[] for _ in self._rests]
        finished = [False] * len(self._rests)
        tokens, mask, positions = self._padded()
        rows = list(range(len(self._rests)))  # of the batch's rows, those that still write
        while True:
            logits = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            chosen = self._sampler.choose(logits[:, -1])
            going: list[int] = []
            for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                finished[row] = token in self._ends
                if not finished[row]:
                    written[row].append(token)
                if not finished[row] and len(written[row]) < self._budgets[row]:
                    going.append(place)
            if not going:
                return [Generated(*pair) for pair in zip(written, finished, strict=True)]
            keep = torch.tensor(going, device=tokens.device)
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                mask, positions, chosen = mask[keep], positions[keep], chosen[keep]
                self._sampler.keep_rows(going)
                for layer in self._cache.layers:
                    assert isinstance(layer, _RoomyLayer)
                    layer.keep_rows(keep)
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

    def _padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and positions, [rows, longest], and the mask over the cache too, [rows, shared + longest]."""
        longest = max(len(rest) for rest in self._rests)
        tokens = torch.zeros(len(self._rests), longest, dtype=torch.int64)
        mask = torch.ones(len(self._rests), self._shared + longest, dtype=torch.int64)
        positions = torch.zeros_like(tokens)
        for row, rest in enumerate(self._rests):
            padding = longest - len(rest)
            tokens[row, padding:] = torch.tensor(rest)
            mask[row, self._shared : self._shared + padding] = 0
            positions[row, padding:] = torch.arange(self._shared, self._shared + len(rest))
        device = self._model.device
        return tokens.to(device), mask.to(device), positions.to(device)


def _take(order: list[int], prompts: Sequence[Prompt], batch_tokens: int) -> list[int]:
    # The first prompt is the longest one; the largest budget may be any row's.
    longest, budget = len(prompts[order[0]].tokens), 0
    for count, index in enumerate(order):
        budget = max(budget, prompts[index].budget)
        if count and (count + 1) * (longest + budget) > batch_tokens:
            return order[:count]
    return order


def _room(states: Tensor, positions: int) -> Tensor:
    rows, heads, _, width = states.shape
    return states.new_empty(rows, heads, positions, width)


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with alike; each keeps one of its own at least."""
    first, last = min(prompts), max(prompts)
    length = min(len(prompt) for prompt in prompts) - 1
    return next((place for place in range(length) if first[place] != last[place]), length)


def _read_prefix(model: PreTrainedModel, tokens: list[int]) -> Cache:
    ids = torch.tensor([tokens], device=model.device)
    cache = Cache(layer_class_to_replicate=_RoomyLayer)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
