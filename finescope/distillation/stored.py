"""The teacher's stored distributions, read by example in any order without being held in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from finescope import schemas, storage
from finescope.distillation.batches import Pass, Step
from finescope.distillation.examples import Example
from finescope.errors import StepFailed


class StoredTeacher:
    """Rows of `schemas.TEACHER_LOGPROBS` in a file of this machine, mapped into memory."""

    def __init__(self, shards: Sequence[str], examples: Sequence[Example], directory: Path) -> None:
        """Copy the rows that have targets from `shards` (URIs of Parquet files, in order) to `directory`, shard by shard.

        Raises:
            StepFailed: they are of other examples.
        """
        path, firsts, self._batches = str(directory / "teacher_logprobs.arrow"), [0], []
        schema = schemas.TEACHER_LOGPROBS
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for uri in shards:
                table = schemas.conform(storage.read_parquet(uri), schema)
                writer.write_table(table.filter(pa.array(table.column("targets").to_numpy() > 0)))
        reader = pa.ipc.open_file(pa.memory_map(path))
        for number in range(reader.num_record_batches):
            self._batches.append(reader.get_batch(number))
            firsts.append(firsts[-1] + self._batches[-1].num_rows)
        self._firsts = np.array(firsts)
        targets = [count for batch in self._batches for count in batch.column("targets").to_pylist()]
        if targets != [len(example.tokens) - example.loss_start for example in examples]:
            raise StepFailed("teacher_logprobs are not of the examples that are trained on")

    def of(self, example: int, targets: int) -> tuple[np.ndarray, np.ndarray]:
        """At the first so many targets of an example: ids int32 [targets, k] and log-probabilities float16 [targets, k + 1]."""
        number = int(np.searchsorted(self._firsts, example, "right")) - 1
        batch, row = self._batches[number], example - int(self._firsts[number])
        ids, logprobs = (np.asarray(batch.column(name)[row].values) for name in ("ids", "logprobs"))
        total = batch.column("targets")[row].as_py()
        return ids.reshape(total, -1)[:targets], logprobs.reshape(total, -1)[:targets]

    def of_pass(self, examples: Sequence[Example], step: Step, rows: Pass) -> tuple[np.ndarray, np.ndarray]:
        """At every target of a pass, in the order of `collate`'s targets: int64 [positions, k] and fp32 [positions, k + 1]."""
        parts = []
        for place in (place for row in rows for place in row):
            index = int(step.indices[place])
            parts.append(self.of(index, int(step.lengths[place]) - examples[index].loss_start))
        if not parts:
            one, other = self.of(0, 0)
            parts = [(one, other)]
        ids, logprobs = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ids.astype(np.int64), logprobs.astype(np.float32)
