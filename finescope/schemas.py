"""The Arrow schema of each table, and the one function that holds a table to it."""

import pyarrow as pa

# A row a unit of work. Of a JSONL file `row_group` is the number of a range of it, whose `bytes` bytes begin at byte `start`,
# both after decompression. Of all else `start` is null, and `bytes` are the needed columns', uncompressed, or the file's.
DOCUMENTS = pa.schema(
    [
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("num_rows", pa.int64()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("start", pa.int64()),
    ]
)
# What the screen makes of a document: by how much its score exceeds the cut, of the domain for which that is most. It passes
# where `margin` is not negative. A row a document and no text of it: of 10^9 rows a few GB.
SCREENED = pa.schema([("file", pa.int32()), ("row_group", pa.int32()), ("row", pa.int32()), ("margin", pa.float32())])
EMBEDDINGS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("file", pa.int32()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("num_tokens", pa.int32()),
        ("fvu", pa.float32()),
        ("latent_ids", pa.list_(pa.int32())),
        ("latent_values", pa.list_(pa.float16())),
    ]
)
SCORES = pa.schema(
    [
        ("doc_id", pa.string()),
        ("file", pa.int32()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("num_tokens", pa.int32()),
        ("score", pa.float32()),
        ("seed", pa.int32()),
        ("top_latents", pa.list_(pa.int32())),
    ]
)
# `curated` carries all the columns of the source row between `seed` and `text`; these four stand around them.
CURATED_HEAD = pa.schema([("rank", pa.int64()), ("doc_id", pa.string()), ("score", pa.float32()), ("seed", pa.int32())])
CURATED_TAIL = pa.schema([("text", pa.string())])
REJECTS = pa.schema(
    [
        ("doc_id", pa.string()),
        ("step", pa.string()),
        ("file", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
# `general` is the importance of the same group on random documents of the corpus; null where it was not computed.
IMPORTANCE = pa.schema(
    [
        ("layer", pa.int32()),
        ("kind", pa.string()),
        ("group_index", pa.int32()),
        ("importance", pa.float32()),
        ("num_params", pa.int64()),
        ("kept", pa.bool_()),
        ("general", pa.float32()),
    ]
)
# A row a head group that the domain asks more of than general text does, and a latent: over the calibration and the general
# documents the correlation of the group's activation with the latent, how many of them have the latent, and its mean in each set.
HEAD_LATENTS = pa.schema(
    [
        ("layer", pa.int32()),
        ("group_index", pa.int32()),
        ("latent", pa.int32()),
        ("correlation", pa.float32()),
        ("documents", pa.int32()),
        ("domain_mean", pa.float32()),
        ("general_mean", pa.float32()),
    ]
)
REWRITES = pa.schema(
    [
        ("doc_id", pa.string()),
        ("prompt", pa.string()),
        ("response_original", pa.string()),
        ("response", pa.string()),
        ("used", pa.string()),
        ("reason", pa.string()),
    ]
)
# A row a row of `rewrites`, in the same order: the teacher's next-token distribution at each of the n positions that the student
# is trained on, at `kl_temperature`. ids: [n * k], the k most likely tokens of each; logprobs: [n * (k + 1)], theirs, descending,
# then that of all other tokens together.
TEACHER_LOGPROBS = pa.schema(
    [("doc_id", pa.string()), ("targets", pa.int32()), ("ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float16()))]
)
# A row a latent of each dictionary: `dictionary` is "main" or a variant's name, `active` counts the activations of the set
# that was measured on which the latent is active; mean and largest activation, where it is, are null where it never is.
LATENTS = pa.schema(
    [
        ("dictionary", pa.string()),
        ("latent", pa.int32()),
        ("active", pa.int64()),
        ("frequency", pa.float64()),
        ("mean_activation", pa.float32()),
        ("max_activation", pa.float32()),
    ]
)
METRICS = pa.schema(
    [("step", pa.string()), ("name", pa.string()), ("value", pa.float64()), ("time", pa.timestamp("us", tz="UTC"))]
)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Select the schema's columns in its order and cast them safely. Once where a table is written, once where it is read.

    Raises:
        KeyError: a column is missing.
        pa.ArrowInvalid: a value does not fit its column's type.
    """
    return pa.table([table.column(field.name).cast(field.type) for field in schema], schema=schema)
