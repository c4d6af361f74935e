"""Training of dictionaries on a stream of activations (METHOD 2): several at once, by one process or several, resumable."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finescope import checkpoints
from finescope.config import SaeSection
from finescope.errors import StepFailed
from finescope.runners.base import Progress
from finescope.sae.autoencoder import SparseAutoencoder
from finescope.sae.group import Group
from finescope.sae.metrics import DictionaryMeter
from finescope.sae.stream import ActivationStream, ShuffleBuffer
from finescope.sae.trainer import Trainer, flat, starting_directions

# Activations that are held out at most.
HELD_OUT = 16_384
_STATE = "state.safetensors"
_TOO_FEW = "the corpus has too few tokens to train the autoencoder: at least 4 activations are needed"


@dataclass(frozen=True)
class FitPlan:
    """What is trained on what."""

    sections: tuple[SaeSection, ...]  # of each dictionary; the first one's says what all share
    columns: tuple[tuple[int, int], ...]  # of each dictionary: the columns of the stream that it sees, from and to
    chunks: int  # of the stream
    held_out: int  # of these the first, which are measured on and never trained on
    checkpoints: str | None  # URI of a directory of this training's own; None: none are kept
    identity: str = ""  # of the stream: what a checkpoint must share with the training that goes on from it

    @property
    def width(self) -> int:
        """Columns of the stream."""
        return max(stop for _, stop in self.columns)

    @property
    def buffer_rows(self) -> int:
        """Activations of all shuffle buffers together."""
        return max(2, int(self.sections[0].buffer_mib * 2**20) // (4 * self.width))


@dataclass(frozen=True)
class FitResult:
    """A trained dictionary and what was measured."""

    autoencoder: SparseAutoencoder  # on the columns of the stream that it sees
    held_out: DictionaryMeter = field(repr=False)  # of the activations that were held out, all of them
    held_out_tokens: int
    dead_share: float  # of the latents, silent for the last `dead_after_tokens` of training
    trained_tokens: int  # different activations
    history: list[tuple[int, str, float]] = field(repr=False)  # training step; fvu, l0 or dead_share; value


class _Scaling(NamedTuple):
    mean: Tensor  # [width] of the first fill
    scale: Tensor  # [width], its standard deviation; 1 where that is 0


def work_units(section: SaeSection) -> int:
    """What `fit` reports as progress in all: each activation when it is read and each time that it is trained on."""
    return section.num_tokens * (1 + section.epochs)


def fit(plan: FitPlan, stream: ActivationStream, device: torch.device, progress: Progress) -> list[FitResult]:
    """Train each dictionary of the plan on the same activations; deterministic by the seed.

    The stream is cut into `workers` shares of every n-th chunk, each with a buffer of its own. A step takes its part of
    the batch from every share and averages the gradients. In a process group of `workers` each process has a share; a
    process alone takes them in turn, with the same result. All processes call.

    Returns:
        On rank 0 a result a dictionary, on the others nothing.

    Raises:
        StepFailed: the stream has too few activations or no variance, or a loss is not finite.
    """
    return _Fit(plan, stream, device, progress).run()


class _Fit:
    def __init__(self, plan: FitPlan, stream: ActivationStream, device: torch.device, progress: Progress) -> None:
        self.plan, self.stream, self.device, self.progress = plan, stream, device, progress
        self.group = Group()
        main = plan.sections[0]
        self.workers = main.workers
        assert self.group.size in (1, self.workers), (self.group.size, self.workers)
        self.mine = range(self.group.rank, self.workers, self.group.size)  # the shares of this process
        chunks = range(plan.held_out, plan.chunks)
        rows = max(2, min(plan.buffer_rows, main.num_tokens) // self.workers)
        self.buffers = [ShuffleBuffer(stream, chunks[share :: self.workers], rows, plan.width, device) for share in self.mine]
        self.held_out = torch.empty(0, plan.width, device=device)  # raw; on rank 0 alone
        self.trainers: list[Trainer] = []
        self.scaling: _Scaling | None = None
        self.fills = self.trained = 0  # activations trained on, of all shares

    def run(self) -> list[FitResult]:
        """See `fit`."""
        if len(range(self.plan.held_out, self.plan.chunks)) < self.workers:
            raise StepFailed(f"sae.workers: {self.workers} processes need as many chunks of documents to train on")
        if self.group.rank == 0:
            self.held_out = self._read_held_out()
        ended = self._resume()
        while not ended:
            ended = self._train_fill()
            self._checkpoint()
        for buffer in self.buffers:
            buffer.close()
        return self._results() if self.group.rank == 0 else []

    def _train_fill(self) -> bool:
        """Fill the buffers and use them up; whether that was the last time."""
        main = self.plan.sections[0]
        left = -(-(main.num_tokens - self.trained) // self.workers)
        filled = [buffer.fill(left) for buffer in self.buffers]
        rows = self._least([len(data) for data in filled])
        self.progress(rows * self.workers)
        if self.scaling is None:
            if rows < 2:
                raise StepFailed(_TOO_FEW)
            self._start(filled)
        assert self.scaling is not None
        filled = [data[:rows].sub_(self.scaling.mean).div_(self.scaling.scale) for data in filled]
        self.trained += rows * self.workers
        more = 0 if self.trained >= main.num_tokens else self._least([int(not buffer.ended()) for buffer in self.buffers])
        self._train_on(filled, rows, self._left() if more else 0)
        self.fills += 1
        return not more

    def _left(self) -> int:
        """Activations that are yet to be trained on: a corpus too small for `num_tokens` ends, at the rate so far, before."""
        read = sum(sum(numbers) for numbers in self.group.all_rows([buffer.chunk for buffer in self.buffers], self.device))
        expected = (self.plan.chunks - self.plan.held_out - read) * self.trained // max(1, read)
        return max(0, min(self.plan.sections[0].num_tokens - self.trained, expected))

    def _train_on(self, filled: Sequence[Tensor], rows: int, left: int) -> None:
        """`epochs` passes over the buffers, shuffled anew for each."""
        main = self.plan.sections[0]
        share_of_batch = max(1, main.batch_tokens // self.workers)
        steps = max(1, round(rows / share_of_batch)) if rows else 0
        total = self.trainers[0].steps + main.epochs * (steps - (-left // main.batch_tokens))
        for epoch in range(main.epochs):
            orders = [self._order(rows, share, epoch).to(self.device) for share in self.mine]
            parts = [order.tensor_split(steps) if steps else () for order in orders]
            for places in zip(*parts, strict=True):
                batches = [data[chosen] for data, chosen in zip(filled, places, strict=True)]
                for trainer, (start, stop) in zip(self.trainers, self.plan.columns, strict=True):
                    for batch in batches:
                        trainer.accumulate(batch[:, start:stop], self.workers)
                    trainer.step(self.group, total)
                self.progress(sum(len(batch) for batch in batches) * self.group.size)
        for trainer in self.trainers:
            trainer.record(self.group)

    def _order(self, rows: int, share: int, epoch: int) -> Tensor:
        """A permutation drawn from what names it: nothing random goes from one fill to the next."""
        words = (self.plan.sections[0].seed, share, self.fills, epoch)
        seed = int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:7], "big")
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))

    def _least(self, numbers: Sequence[int]) -> int:
        return self.group.least(min(numbers), self.device)

    def _start(self, filled: Sequence[Tensor]) -> None:
        """Take the standardisation from the first fill of all shares, the starting directions from the first share's."""
        count = torch.tensor(float(sum(len(data) for data in filled)), dtype=torch.float64, device=self.device)
        sums = torch.stack([_sums(data) for data in filled]).sum(0)
        self.group.add([count, sums])
        if not bool(torch.isfinite(sums).all()):
            raise StepFailed("the model's activations are not finite; model.dtype: float32 or bfloat16 may help")
        mean = sums / count
        squares = torch.stack([_squares(data, mean) for data in filled]).sum(0)
        self.group.add([squares])
        deviation = (squares / count).sqrt().float()
        self.scaling = _Scaling(mean.float(), torch.where(deviation > 0, deviation, torch.ones_like(deviation)))
        self._make_trainers(filled[0])
        for trainer in self.trainers:
            self.group.from_first([weight.detach() for weight in trainer.weights.named().values()])

    def _make_trainers(self, data: Tensor | None) -> None:
        assert self.scaling is not None
        for section, (start, stop) in zip(self.plan.sections, self.plan.columns, strict=True):
            shape = (section.num_latents, stop - start)
            known = torch.zeros(shape, device=self.device)  # the weights come from a checkpoint
            if data is None:
                started = known
            else:
                mean, scale = self.scaling.mean[start:stop], self.scaling.scale[start:stop]
                started = starting_directions(data[:, start:stop], shape[0], section.seed, mean, scale)
            self.trainers.append(Trainer(section, started))

    def _checkpoint(self) -> None:
        if self.plan.checkpoints is None:
            return
        assert self.scaling is not None
        places = [number for buffer in self.buffers for number in (buffer.chunk, buffer.offset)]
        cursors = self.group.all_rows(places, self.device)
        states = [trainer.state() for trainer in self.trainers]
        tensors = {**flat([tensors for tensors, _ in states]), **self.scaling._asdict()}
        record = {
            "identity": self._identity(),
            "trained": self.trained,
            # By share: of each the chunk that is read next and how much of it is used.
            "cursors": [cursors[share % self.group.size][2 * (share // self.group.size) :][:2] for share in range(self.workers)],
            "trainers": [record for _, record in states],
        }

        def write(directory: Path) -> None:
            if self.group.rank == 0:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / _STATE)

        checkpoints.save(self.plan.checkpoints, self.fills, record, write, first=self.group.rank == 0)
        self.group.wait()

    def _resume(self) -> bool:
        """Go on from the newest checkpoint, if there is one; whether the training it is of had ended."""
        found = checkpoints.complete_steps(self.plan.checkpoints) if self.plan.checkpoints else []
        self.group.wait()  # all have looked before anyone writes
        if not found or self.plan.checkpoints is None:
            return False
        record: dict[str, Any] = checkpoints.read_record(self.plan.checkpoints, found[0])
        if record["identity"] != self._identity():
            raise StepFailed(
                f"the newest checkpoint in '{self.plan.checkpoints}' belongs to another training; remove it to start afresh"
            )
        with checkpoints.files_of(self.plan.checkpoints, found[0]) as directory:
            tensors = load_file(directory / _STATE, device=str(self.device))
        self.scaling = _Scaling(tensors["mean"], tensors["scale"])
        self._make_trainers(None)
        for number, (trainer, state) in enumerate(zip(self.trainers, record["trainers"], strict=True)):
            prefix = f"{number}/"
            mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            trainer.load_state(mine, state)
        self.fills, self.trained = found[0], record["trained"]
        for buffer, share in zip(self.buffers, self.mine, strict=True):
            buffer.resume(*record["cursors"][share])
        main = self.plan.sections[0]
        self.progress(self.trained * (1 + main.epochs))
        return self.trained >= main.num_tokens or not self._least([int(not buffer.ended()) for buffer in self.buffers])

    def _read_held_out(self) -> Tensor:
        """[n, width], before anything is trained, so that what cannot be measured on costs no training."""
        parts: list[np.ndarray] = []
        for chunk in self.stream(0, self.plan.held_out, 1):
            parts.append(chunk[: HELD_OUT - sum(map(len, parts))].copy())
            if sum(map(len, parts)) == HELD_OUT:
                break
        found = np.concatenate([np.empty((0, self.plan.width), np.float32), *parts])
        if len(found) < 2:
            raise StepFailed(_TOO_FEW)
        if any((found[:, start:stop] == found[0, start:stop]).all() for start, stop in self.plan.columns):
            raise StepFailed("the activations that are held out are all equal: the corpus is too small or all the same")
        return torch.from_numpy(found).to(self.device)

    @torch.no_grad()
    def _results(self) -> list[FitResult]:
        """Fold the standardisation into the weights and measure them on the activations that are held out."""
        assert self.scaling is not None
        autoencoders = []
        for trainer, (start, stop) in zip(self.trainers, self.plan.columns, strict=True):
            weights = trainer.folded(self.scaling.mean[start:stop], self.scaling.scale[start:stop])
            weights["coordinates"] = torch.arange(stop - start, device=self.device)
            section = trainer.section
            autoencoders.append(SparseAutoencoder(weights, architecture=section.architecture, k=section.k, d_in=stop - start))
        meters = [DictionaryMeter(autoencoder) for autoencoder in autoencoders]
        for meter, (start, stop) in zip(meters, self.plan.columns, strict=True):
            meter.update(self.held_out[:, start:stop])
        return [
            FitResult(autoencoder, meter, len(self.held_out), trainer.dead().float().mean().item(), self.trained, trainer.history)
            for autoencoder, meter, trainer in zip(autoencoders, meters, self.trainers, strict=True)
        ]

    def _identity(self) -> str:
        described = [section.model_dump_json(exclude={"cache"}) for section in self.plan.sections]
        words = [self.plan.identity, *described, str(self.plan.columns), str(self.plan.chunks), str(self.plan.held_out)]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _sums(data: Tensor) -> Tensor:
    """Sum over the rows of [n, C], float64."""
    return torch.stack([part.double().sum(0) for part in data.split(16_384)]).sum(0)


def _squares(data: Tensor, mean: Tensor) -> Tensor:
    """Sum over the rows of [n, C] of the squared distance to `mean` [C], float64; in parts, as float64 takes twice the memory."""
    parts = [(part.double() - mean).square().sum(0) for part in data.split(16_384)]
    return torch.stack(parts).sum(0)
