"""`distill`: the unpruned model rewrites the curated documents, the pruned one is trained on them, and a control beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection, DistillSection
from finescope.corpus.text import prompt_and_response
from finescope.corpus.tokenise import tokenise
from finescope.distillation import loop
from finescope.distillation.examples import build_examples, to_table
from finescope.distillation.loop import TrainJob
from finescope.distillation.rewrite import Rewriter, select_first
from finescope.distillation.teachers import rewriter_of
from finescope.errors import StepFailed
from finescope.manifest import Manifest, TableFile
from finescope.models.load import ModelReference, load_tokenizer, reference_of
from finescope.rounds import Round
from finescope.runners.base import Context, Resources
from finescope.stages.cards import model_card
from finescope.stages.references import memory_bytes, model_of, random_documents, read_located, read_shards
from finescope.steps import Outcome, StepInput

# Documents of a unit of rewriting: what is done again after a crash, and what one actor takes at a time.
_REWRITE_UNIT = 64


# Cached positions of the documents that are written together.
_REWRITE_BATCH_TOKENS = 8192
_DOCUMENT = {"doc_id": pa.string(), "prompt": pa.string(), "response": pa.string(), "selected": pa.bool_()}
_UNITS = pa.schema([("unit", pa.int64()), *((name, pa.list_(type_)) for name, type_ in _DOCUMENT.items())])


@dataclass(frozen=True)
class _Pair:
    """What one document gives to train on; without a prompt it is plain text."""

    doc_id: str
    prompt: str | None
    response: str


@dataclass(frozen=True)
class _RewriteJob:
    """What an actor that rewrites is sent."""

    model: ModelReference
    section: DistillSection
    table_uri: str


class _Rewrite:
    """Rewrites one unit of documents and writes its shard; the table worker of the first half of this step."""

    def __init__(self, job: _RewriteJob) -> None:
        self._job = job
        self._rewriter: Rewriter | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        documents = pa.table({name: pa.array(unit[name], type_) for name, type_ in _DOCUMENT.items()})
        if self._rewriter is None:
            self._rewriter = rewriter_of(self._job.model, self._job.model, self._job.section, _REWRITE_BATCH_TOKENS)
        table = self._rewriter(documents, _silent)
        name = f"part-{unit['unit']:06d}.parquet"
        size = storage.put_parquet(storage.join(self._job.table_uri, name), table)
        return pa.table({"unit": [unit["unit"]], "rows": [table.num_rows], "bytes": [size]})


def _silent(amount: int) -> None:
    """Units are told of when they are done."""


def distill(context: Context, corpus: CorpusSection, turn: Round, step: StepInput) -> Outcome:
    """Rewrite, train, merge; rows are those of `rewrites`. A later round trains on what the first has rewritten.

    Raises:
        StepFailed: there is nothing to train on, or the training diverges.
    """
    section, model, pruned = turn.training, model_of(step["model"]), step[turn.prune]
    curated = read_shards(step["curate"], "curated")
    if turn.before is None:
        documents = curated
        if section.data == "random":
            documents = _random(context, corpus, section, step, model, curated)
        pairs = _pairs(documents, corpus, section, model)
        rewrites, given = _rewrite(context, section, model, pairs, step.uri, "rewrites"), len(pairs)
    else:
        rewrites, given = _copied(step[turn.before], "rewrites", step.uri), step[turn.before].rows_out
    trained = _train(context, section, step, pruned, rewrites, "", None)
    tables = {"rewrites": rewrites, "metrics": _metrics(step.uri, "")}
    facts: dict[str, Any] = {**trained, "reference": _reference(step, model, "").model_dump(mode="json")}
    if section.control:
        chosen = _random(context, corpus, section, step, model, curated)
        control = _rewrite(context, section, model, _pairs(chosen, corpus, section, model), step.uri, "control/rewrites")
        outcome = _train(context, section, step, pruned, control, "control", trained["training_tokens"])
        tables |= {"control_rewrites": control, "control_metrics": _metrics(step.uri, "control")}
        facts["control"] = {**outcome, "reference": _reference(step, model, "control").model_dump(mode="json")}
    rows = sum(file.rows for file in rewrites)
    return Outcome(given, rows, 0, tables, facts)


def _random(
    context: Context, corpus: CorpusSection, section: DistillSection, step: StepInput, model: ModelReference, curated: pa.Table
) -> pa.Table:
    """As many documents as were curated, drawn from the whole corpus."""
    located = random_documents(step, curated.num_rows, section.seed, ())
    table = read_located(context, step["index"], model, corpus, located, "distill: random documents")
    return table.append_column("doc_id", pa.array(located["doc_id"].to_list(), pa.string()))


def _pairs(documents: pa.Table, corpus: CorpusSection, section: DistillSection, model: ModelReference) -> list[_Pair]:
    """Prompt and response of each document, as the recipe or the columns' names tell; else its text alone.

    Of a text alone only what is trained on counts: it is cut to `max_tokens` before it is rewritten.
    """
    ids = documents.column("doc_id").to_pylist()
    tokenizer = load_tokenizer(model)
    tokens = tokenise(tokenizer, documents.column("text").to_pylist(), section.max_tokens)
    texts = [tokenizer.decode(item, skip_special_tokens=True) for item in tokens]
    prompt, response = prompt_and_response(corpus, documents.column_names)
    if prompt is None or response is None:
        return [_Pair(doc_id, None, text) for doc_id, text in zip(ids, texts, strict=True)]
    rendered = zip(ids, texts, prompt.render(documents), response.render(documents), strict=True)
    return [_Pair(doc_id, ask, answer) if ask and answer else _Pair(doc_id, None, text) for doc_id, text, ask, answer in rendered]


def _rewrite(
    context: Context, section: DistillSection, model: ModelReference, pairs: Sequence[_Pair], uri: str, name: str
) -> tuple[TableFile, ...]:
    """The shards of `rewrites`. Units whose shard is there are not done again."""
    table_uri = storage.join(uri, name)
    there = set(storage.list_names(table_uri))
    columns = {name: pa.array([getattr(pair, name) for pair in pairs], pa.string()) for name in ("doc_id", "prompt", "response")}
    documents = select_first(pa.table(columns), section.rewrite_share if section.rewrite else 0.0)
    units = [
        {"unit": number, **documents.slice(start, _REWRITE_UNIT).to_pydict()}
        for number, start in enumerate(range(0, len(pairs), _REWRITE_UNIT))
    ]
    left = [unit for unit in units if f"part-{unit['unit']:06d}.parquet" not in there]
    with context.reporter.task("distill: rewriting", len(pairs), "documents") as progress:
        progress(len(pairs) - sum(len(unit["doc_id"]) for unit in left))
        work = pa.Table.from_pylist(left, schema=_UNITS)
        job = _RewriteJob(model, section, table_uri)
        for record in context.runner.map(_Rewrite, (job,), work, Resources(memory_bytes(model, 1.5))):
            progress(sum(record.column("rows").to_pylist()))
    shards = [storage.join(name, f"part-{unit['unit']:06d}.parquet") for unit in units]
    infos = [(path, storage.join(uri, path)) for path in shards]
    return tuple(
        TableFile(path=path, rows=storage.read_parquet(full, ["doc_id"]).num_rows, bytes=storage.info(full).size or 0)
        for path, full in infos
    )


def _copied(manifest: Manifest, name: str, uri: str) -> tuple[TableFile, ...]:
    """The shards of another step's table, as they are, below `uri`."""
    files = manifest.tables[name].files
    for file in files:
        storage.put_bytes(storage.join(uri, file.path), storage.read_bytes(storage.join(manifest.uri, file.path)))
    return files


def _train(
    context: Context,
    section: DistillSection,
    step: StepInput,
    pruned: Manifest,
    rewrites: Sequence[TableFile],
    folder: str,
    cap_tokens: int | None,
) -> dict[str, Any]:
    """Train one student on a table of rewrites; its files go to `folder` of the step. Returns facts about it."""
    student = model_of(pruned)
    home = storage.join(step.uri, folder) if folder else step.uri
    tables = [storage.read_parquet(storage.join(step.uri, file.path)) for file in rewrites]
    table = schemas.conform(pa.concat_tables(tables), schemas.REWRITES)
    tokenizer = load_tokenizer(student)
    pairs = zip(table.column("prompt").to_pylist(), table.column("response").to_pylist(), strict=True)
    built = build_examples(tokenizer, pairs, section.max_tokens)
    if not built.examples:
        raise StepFailed("no document is left to train on: each is shorter than two tokens, or all prompt")
    examples_uri = storage.join(home, "examples", "part-000000.parquet")
    storage.put_parquet(examples_uri, to_table(built.examples))
    job = TrainJob(student.path, examples_uri, section, storage.join(home, "checkpoints"), home, cap_tokens)
    planned = loop.plan(job)
    if not storage.exists(storage.join(home, "trained.json")):
        name = f"distill: {folder or 'training'}"
        copies = 5.0 if section.method == "full" else 1.5
        with context.reporter.task(name, len(planned.steps), "steps") as progress:
            resources = Resources(memory_bytes(student, copies))
            context.runner.train(loop.train, (job,), progress, resources, section.zero_stage)
        _write_card(step, section, pruned, home, folder or "recovered", planned.tokens)
        storage.put_json(storage.join(home, "trained.json"), {"tokens": planned.tokens, "steps": len(planned.steps)})
    storage.delete(storage.join(home, "checkpoints"))
    used = table.column("used").to_pylist()
    return {
        "training_tokens": planned.tokens,
        "training_steps": len(planned.steps),
        "examples": len(built.examples),
        "truncated": built.truncated,
        "dropped": len(built.dropped),
        "rewritten": used.count("rewrite"),
    }


def _write_card(step: StepInput, section: DistillSection, pruned: Manifest, home: str, kind: str, tokens: int) -> None:
    facts = {"method": section.method, "rank": section.rank, "learning rate": section.learning_rate, "training tokens": tokens}
    sizes = {key: pruned.facts[key] for key in ("parameters_before", "parameters_after", "ratio_reached")}
    card = model_card(model_of(step["model"]), step["model"].facts["source"], kind, {**sizes, **facts})
    storage.put_bytes(storage.join(home, "model", "README.md"), card.encode())


def _metrics(uri: str, folder: str) -> tuple[TableFile, ...]:
    path = storage.join(folder, "metrics/part-00000.parquet") if folder else "metrics/part-00000.parquet"
    full = storage.join(uri, path)
    return (TableFile(path=path, rows=storage.read_parquet(full, ["name"]).num_rows, bytes=storage.info(full).size or 0),)


def _reference(step: StepInput, model: ModelReference, folder: str) -> ModelReference:
    place = storage.join(step.uri, *([folder] if folder else []), "model")
    return reference_of(place, model, f"{step.identity}:{folder}")
