"""What pruning takes, by arithmetic, before it begins: memory, scratch on disk, floating-point operations."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from finescope.config import PruneSection
from finescope.models.anatomy import anatomy_of, blocks_of, has_experts
from finescope.models.groups import Layout, layout_of
from finescope.pruning import depth
from finescope.pruning.files import SHARD_BYTES
from finescope.pruning.taylor import LOGIT_ROWS

# Hidden states at all block boundaries are held in memory up to this, and beyond it in a file.
HELD_BYTES = 2**30


@dataclass(frozen=True)
class PruneCost:
    """Upper estimates; memory is what comes on top of a process that has loaded its libraries."""

    load_bytes: int
    importance_bytes: int  # of blocks too, where whole ones leave
    student_bytes: int  # to cut, re-fit and save the student
    scratch_bytes: int  # hidden states on disk
    importance_flops: float
    student_flops: float
    pass_flops: float  # of a plain forward and backward pass over the same tokens

    @property
    def spills(self) -> bool:
        """Whether hidden states are put by on disk."""
        return self.scratch_bytes > 0

    @property
    def memory_bytes(self) -> int:
        """The peak."""
        return max(self.load_bytes, self.importance_bytes, self.student_bytes)

    @property
    def flops(self) -> float:
        """All of it."""
        return self.importance_flops + self.student_flops

    @property
    def passes(self) -> float:
        """All of it, in forward and backward passes."""
        return self.flops / self.pass_flops if self.pass_flops else 0.0


@dataclass(frozen=True)
class _Sizes:
    """Of the model, in parameters, and of the calibration set, in tokens with padding."""

    rest: int  # embeddings, norms, head
    block: int  # of the largest block
    weight: int  # the largest of a block
    channels: int  # inputs of the widest map that is re-fitted
    wide: int  # channels that a token uses
    d_model: int
    vocabulary: int
    heads: int
    mixture: bool
    tokens: int
    longest: int
    batch: int


def prune_cost(
    model: PreTrainedModel, section: PruneSection, bytes_per_parameter: int, tokens: int, longest: int, batch_tokens: int
) -> PruneCost:
    """The cost of pruning `model`, which may be on the meta device, calibrated on `tokens`, padding counted.

    `longest`: tokens of the longest document; `batch_tokens`: of a batch.
    """
    layout, size = layout_of(model, anatomy_of(model)), bytes_per_parameter
    sizes = _sizes(model, layout, section, tokens, longest, batch_tokens)
    kept, within = 1 - section.ratio, bool(section.within_blocks)
    taylor = within and section.method in ("taylor", "taylor_second")
    forward = within and section.method in ("activation", "wifv")
    hidden = tokens * sizes.d_model * size
    boundaries = layout.num_layers * hidden * taylor
    spilled = boundaries > HELD_BYTES
    # A block's pages of the file, and what they become in memory in another dtype.
    skeleton = (sizes.rest + 2 * sizes.block) * size
    student = skeleton + int(kept * sizes.block * size) + min(SHARD_BYTES, int(kept * layout.block_params * size))
    head, blocks = 2.0 * tokens * sizes.d_model * sizes.vocabulary, 2.0 * tokens * layout.block_params
    work, probed = depth.work(layout.num_layers, section.ratio), min(tokens, depth.DOCUMENTS * longest)
    return PruneCost(
        load_bytes=skeleton + sizes.rest * size // 2,
        importance_bytes=skeleton
        + max(
            (hidden + boundaries * (not spilled) + _backward_bytes(sizes, size)) * taylor,
            (hidden + _activation_bytes(sizes, size) + 24 * sizes.batch * sizes.wide) * forward,
            ((work.streams + 1) * probed * sizes.d_model * size + _activation_bytes(sizes, size)) * section.removes_blocks,
        ),
        student_bytes=max(student + _refit_bytes(sizes, hidden, size) * _refits(section), student + sizes.rest * size),
        scratch_bytes=boundaries * spilled,
        # Forward; forward again and backward; the head forward and, as its weight gets no gradient, half of backward.
        importance_flops=(4 * blocks + 2 * head) * taylor
        + blocks * forward
        + (work.passes * blocks + work.losses * head) * probed / max(tokens, 1) * section.removes_blocks,
        student_flops=(blocks * (1 + 2 * kept) + _refit_flops(sizes, layout.num_layers)) * _refits(section),
        pass_flops=3 * (blocks + head),
    )


def _refits(section: PruneSection) -> bool:
    return section.compensate and section.ratio > 0


def _sizes(model: PreTrainedModel, layout: Layout, section: PruneSection, tokens: int, longest: int, batch_tokens: int) -> _Sizes:
    anatomy = anatomy_of(model)
    blocks = blocks_of(model, anatomy)
    shapes = [[parameter.numel() for parameter in block.parameters()] for block in blocks]
    channels = max(parts["channel"][0] for parts in layout.parts)
    within = section.within_blocks
    named = tuple(groups.kind for groups in layout.groups) if isinstance(within, str) else within
    kinds = [kind for kind in named if kind not in layout.refused]
    # What other kinds do not lose the channels do: at least their share leaves, and half a rounding step less. Whole blocks may
    # leave them all.
    if "mlp" in kinds and not section.removes_blocks:
        channels = min(channels, int((1 - section.ratio) * channels) + section.round_to)
    experts = max((parts["expert"][0] for parts in layout.parts if "expert" in parts), default=1)
    return _Sizes(
        rest=layout.model_params - layout.block_params,
        block=max(map(sum, shapes)),
        weight=max(map(max, shapes)) // experts,
        channels=max(channels, layout.parts[0]["query"][0] if "heads" in kinds else 0),
        wide=max(parts["channel"][0] for parts in layout.parts) * int(getattr(model.config, "num_experts_per_tok", None) or 1),
        d_model=model.config.hidden_size,
        vocabulary=model.config.vocab_size,
        heads=layout.heads.num_query,
        mixture=any(has_experts(block, anatomy) for block in blocks),
        tokens=tokens,
        longest=longest,
        batch=min(tokens, max(batch_tokens, longest)),
    )


def _activation_bytes(sizes: _Sizes, size: int) -> int:
    """What a block keeps of a batch for its backward pass: norms are float32, attention may keep its scores."""
    streams = sizes.batch * (sizes.d_model * (12 * size + 32) + sizes.wide * 6 * size)
    return streams + 12 * sizes.batch * sizes.heads * sizes.longest


def _backward_bytes(sizes: _Sizes, size: int) -> int:
    """Beside the hidden states: a block's graph with the largest gradients, or a few rows of logits."""
    # |w * dL/dw| is float32; two maps of the same inputs may be complete at a time.
    gradients = 2 * sizes.weight * (2 * size + 4)
    logits = min(LOGIT_ROWS, sizes.tokens) * sizes.vocabulary * (2 * size + 16)
    return max(_activation_bytes(sizes, size) + gradients, logits + 3 * sizes.batch * sizes.d_model * (size + 4))


def _refit_bytes(sizes: _Sizes, hidden: int, size: int) -> int:
    """Two streams, three stations on the dense one's way; inputs of a map; second moments, damped and factorised, in float64."""
    inputs = sizes.tokens * sizes.channels * size
    if sizes.mixture:
        inputs = max(inputs, sizes.tokens * sizes.d_model * (size + 12))
    wide = max(sizes.channels, sizes.d_model)
    moments = 8 * 3 * wide * (wide + sizes.d_model)
    weights = max(wide * sizes.d_model, sizes.weight) * (size + 16)
    return 5 * hidden + inputs + moments + weights + _activation_bytes(sizes, size)


def _refit_flops(sizes: _Sizes, num_layers: int) -> float:
    """Second moments, their factor, the solution, and the error before and after: a map that writes, and two of what is read."""
    n, d = sizes.channels, sizes.d_model
    readers = 2 * (4.0 * sizes.tokens * d * d + 7.0 * d**3 / 3) + 2.0 * sizes.block * d
    return num_layers * (2.0 * sizes.tokens * n * (n + 3 * d) + n**3 / 3 + 2.0 * n * n * d + readers)
