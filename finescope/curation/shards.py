"""What is done to a shard of `embeddings`, as table workers. No torch: an actor of theirs starts in no time."""

from collections.abc import Sequence

import pyarrow as pa

from finescope import schemas, storage
from finescope.curation.codes import CorpusStatistics, codes_of
from finescope.curation.contrast import drawn
from finescope.curation.score import Scorer

CODES = pa.schema([schemas.EMBEDDINGS.field(name) for name in ("doc_id", "latent_ids", "latent_values")])


class ShardStatistics:
    """Sums over one shard: the first pass of `score`. A row (unit, file) in, a row of `CorpusStatistics` out, and the shard's
    part of the background as columns `latent_ids` and `latent_values`, lists of lists.
    """

    def __init__(self, num_latents: int, documents: int, with_background: bool) -> None:
        """`documents`: of the whole corpus."""
        self._num_latents, self._documents, self._with_background = num_latents, documents, with_background

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        columns = ["latent_ids", "latent_values"]
        embeddings = storage.read_parquet(row["file"], [*columns, "doc_id"] if self._with_background else columns)
        statistics = CorpusStatistics.of(codes_of(embeddings, self._num_latents))
        sample = embeddings.slice(0, 0)
        if self._with_background:
            sample = embeddings.filter(pa.array(drawn(embeddings.column("doc_id").to_pylist(), self._documents)))
        found = pa.Table.from_pylist([{"unit": row["unit"], **statistics.row()}])
        for name in columns:
            found = found.append_column(name, _in_one_row(sample.column(name).combine_chunks()))
        return found


class ShardScorer:
    """Scores one shard: the second pass of `score`. A row (unit, file) in, the record of the shard that it wrote out.

    A shard that is scored twice has the same bytes under the same name.
    """

    def __init__(self, scorer: Scorer, num_latents: int, uri: str) -> None:
        self._scorer, self._num_latents, self._uri = scorer, num_latents, uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        embeddings = storage.read_parquet(row["file"])
        scored = self._scorer(codes_of(embeddings, self._num_latents))
        table = embeddings.select(["doc_id", "file", "row_group", "row", "num_tokens"])
        table = table.append_column("score", pa.array(scored.score)).append_column("seed", pa.array(scored.seed))
        table = schemas.conform(table.append_column("top_latents", scored.top_latents), schemas.SCORES)
        path = f"scores/part-{row['unit']:06d}.parquet"
        size = storage.put_parquet(storage.join(self._uri, path), table)
        return pa.Table.from_pylist([{"unit": row["unit"], "path": path, "rows": table.num_rows, "bytes": size}])


class ShardCodes:
    """The codes of some documents. A row (unit, file) in; doc_id, latent_ids and latent_values of those in the shard out.

    Of a shard that has none of them no more is read than its ids.
    """

    def __init__(self, doc_ids: Sequence[str]) -> None:
        self._doc_ids = frozenset(doc_ids)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (file,) = batch.column("file").to_pylist()
        doc_ids = storage.read_parquet(file, ["doc_id"]).column("doc_id").to_pylist()
        rows = [row for row, doc_id in enumerate(doc_ids) if doc_id in self._doc_ids]
        if not rows:
            return CODES.empty_table()
        return schemas.conform(storage.read_parquet(file, CODES.names).take(pa.array(rows)), CODES)


def _in_one_row(rows: pa.Array) -> pa.Array:
    """All values of a column as the one value of a list column."""
    return pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows)
