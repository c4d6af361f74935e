"""The student, block by block: cut from the dense block, re-fitted, run on what proves it, written."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from finescope.models.blocks import Blocks
from finescope.pruning.compensation import Compensation
from finescope.pruning.files import SHARD_BYTES, StudentFiles
from finescope.pruning.measured import Clock
from finescope.pruning.probe import Case, Probe
from finescope.pruning.ridge import Refit
from finescope.pruning.stream import Batch, Portions, Progress
from finescope.pruning.surgery import Surgery

# What takes a finished block of the student, by the part of the work that it is; the number is the block's.
_Taker = tuple[str, Callable[[int, nn.Module], None]]


def build_student(
    source: Blocks,
    origins: Sequence[int],
    surgery: Surgery,
    batches: Sequence[Batch],
    directory: Path | None,
    clock: Clock,
    progress: Progress,
) -> tuple[list[Refit], list[Case]]:
    """Make all blocks of `surgery.student`, re-fitted on `batches` where there are any.

    origins: the blocks of `source` that the student's are made of, 0-based, ascending.
    directory: where the student goes, not there yet; its blocks are then gone from memory. None: they stay in memory.

    Returns what the re-fits gained, and what the student computes. `progress` sums to the tokens once.

    Raises:
        StepFailed: no document has two tokens, or activations or weights are not finite.
    """
    student, anatomy, layout = surgery.student, source.anatomy, surgery.layout
    compensation = Compensation(source, origins, student, batches) if batches else None
    portions = Portions(sum(int(mask.sum()) for _, mask in batches), layout.num_layers, progress)
    probe = Probe(student, anatomy)
    files = StudentFiles(student, anatomy, directory, SHARD_BYTES) if directory is not None else None
    takers: list[_Taker] = [("verify", probe.advance)] + ([("save", files.put)] if files is not None else [])
    refits: list[Refit] = []
    for layer, origin in enumerate(origins):
        with source.block(origin) as dense:
            block = surgery.cut(layer, dense)
            if compensation is not None:
                compensation.follow(layer, dense)
        if compensation is not None:
            refits += compensation.refit(layer, block)
        for part, take in takers:
            with clock.part(part):
                take(layer, block)
        portions.done(1)
    if files is not None:
        with clock.part("save"):
            files.finish()
    with clock.part("verify"):
        return refits, probe.cases()
