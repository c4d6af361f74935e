"""`teach`: the teacher rewrites the documents that the student is to be trained on, and says what it expects at each token."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection, DistillSection
from finescope.corpus.text import prompt_and_response
from finescope.corpus.tokenise import CPU_BATCH_TOKENS, tokenise
from finescope.distillation.rewrite import select_first
from finescope.distillation.signal import TeacherScorer
from finescope.distillation.teachers import Server, rewriter_of
from finescope.models.load import ModelReference, default_device, load_model, load_tokenizer
from finescope.runners.base import Context, Resources
from finescope.stages.references import PROCESS_BYTES, memory_bytes, model_of, random_documents, read_located, read_shards
from finescope.stages.teacher import teacher_of
from finescope.stages.units import Record, below, map_units, shard_of, shards, total, write_unit
from finescope.steps import Outcome, StepInput

# Documents of a unit: what is done again after a crash, and what one actor takes at a time.
_UNIT = 64
# Cached positions of the documents that are written together, and tokens of those that a GPU reads together, padding included.
_REWRITE_BATCH_TOKENS, _SCORE_BATCH_TOKENS = 8192, 4096
# Where the log-probabilities go, below the step's directory: of a unit of rewrites they are a unit of the same number.
_SCORED = "logprobs"
_DOCUMENT = {"doc_id": pa.string(), "prompt": pa.string(), "response": pa.string(), "selected": pa.bool_()}


class _Rewrite:
    """Rewrites one unit of documents."""

    def __init__(self, teacher: ModelReference | Server, model: ModelReference, section: DistillSection, uri: str) -> None:
        self._rewriter, self._uri = rewriter_of(teacher, model, section, _REWRITE_BATCH_TOKENS), uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        documents = pa.table({name: pa.array(unit[name], kind) for name, kind in _DOCUMENT.items()})
        # Units are told of when they are done.
        table = self._rewriter(documents, lambda amount: None)
        rewritten = table.column("used").to_pylist().count("rewrite")
        return _put(self._uri, unit, table, rewritten=rewritten)


class _Score:
    """The teacher's log-probabilities of one shard of rewrites."""

    def __init__(self, teacher: ModelReference, model: ModelReference, section: DistillSection, uri: str) -> None:
        batch_tokens = CPU_BATCH_TOKENS if default_device().type == "cpu" else _SCORE_BATCH_TOKENS
        sizes = (section.max_tokens, section.kl_top_k, section.kl_temperature, batch_tokens)
        vocab_size = min(teacher.vocab_size, model.vocab_size)
        self._scorer = TeacherScorer(load_model(teacher), load_tokenizer(model), vocab_size, *sizes)
        self._uri = uri

    def __call__(self, batch: pa.Table) -> pa.Table:
        unit = batch.to_pylist()[0]
        table = self._scorer(storage.read_parquet(unit["rewrites"]))
        return _put(self._uri, unit, table, targets=sum(table.column("targets").to_pylist()))


def _put(uri: str, unit: dict[str, Any], table: pa.Table, **known: int) -> pa.Table:
    """Write a unit: a row a document, so that none is rejected."""
    return write_unit(uri, unit["unit"], unit["table"], table, schemas.REJECTS.empty_table(), table.num_rows, **known)


def teach(context: Context, corpus: CorpusSection, section: DistillSection, step: StepInput) -> Outcome:
    """Rewrite the curated documents, or random ones, and those of the control; rows are those of `rewrites`.

    Raises:
        ModelError: the teacher cannot be used, or is not the one that an earlier attempt had.
    """
    teacher, model = teacher_of(section, step), model_of(step["model"])
    units = _units(context, corpus, section, step, model)
    resources = Resources(PROCESS_BYTES, accelerator=False)
    if isinstance(teacher, ModelReference):
        resources = Resources(memory_bytes(teacher, 1.5))
    documents = sum(len(unit["doc_id"]) for unit in units)
    arguments = (teacher, model, section, step.uri)
    records = map_units(context, "teach: rewriting", _Rewrite, arguments, units, resources, step.uri, documents)
    written = _by_table(units, records)
    tables = {name: shards(found, name) for name, found in written.items()}
    source = step["model"].facts["source"] if section.teacher == "self" else section.teacher
    reference = teacher.model_dump(mode="json") if isinstance(teacher, ModelReference) else asdict(teacher)
    facts = {"teacher": {"source": source, **reference}, "rewritten": total(written["rewrites"], "rewritten")}
    if section.kl_weight:
        uri = storage.join(step.uri, _SCORED)
        units = [_scored(unit, step.uri) for unit in units]
        arguments = (teacher, model, section, uri)
        records = map_units(context, "teach: log-probabilities", _Score, arguments, units, resources, uri, documents)
        scored = _by_table(units, records)
        tables |= {name: below(_SCORED, shards(found, name)) for name, found in scored.items()}
        facts["targets"] = total(scored["teacher_logprobs"], "targets")
    of_rewrites = written["rewrites"]
    return Outcome(total(of_rewrites, "rows_in"), total(of_rewrites, "rows"), total(of_rewrites, "rejects"), tables, facts)


def _units(
    context: Context, corpus: CorpusSection, section: DistillSection, step: StepInput, model: ModelReference
) -> list[dict[str, Any]]:
    """What is to be rewritten, in units: those of `rewrites`, then those of the control's."""
    curated = read_shards(step["curate"], "curated")
    drawn = None
    if section.control or section.data == "random":
        located = random_documents(step, curated.num_rows, section.seed, ())
        drawn = read_located(context, step["index"], model, corpus, located, "teach: random documents")
        drawn = drawn.append_column("doc_id", pa.array(located["doc_id"].to_list(), pa.string()))
    chosen = {"rewrites": drawn if section.data == "random" else curated}
    if section.control:
        chosen["control_rewrites"] = drawn
    units: list[dict[str, Any]] = []
    for table, documents in chosen.items():
        assert documents is not None
        pairs = select_first(_pairs(documents, corpus, section, model), section.rewrite_share if section.rewrite else 0.0)
        for start in range(0, pairs.num_rows, _UNIT):
            units.append({"unit": len(units), "table": table, **pairs.slice(start, _UNIT).to_pydict()})
    return units


def _pairs(documents: pa.Table, corpus: CorpusSection, section: DistillSection, model: ModelReference) -> pa.Table:
    """doc_id, prompt and response of each document, as the recipe or the columns' names tell; else its text alone.

    Of a text alone only what is trained on counts: it is cut to `max_tokens` before it is rewritten.
    """
    tokenizer = load_tokenizer(model)
    tokens = tokenise(tokenizer, documents.column("text").to_pylist(), section.max_tokens)
    pairs: list[tuple[str | None, str]] = [(None, tokenizer.decode(item, skip_special_tokens=True)) for item in tokens]
    prompt, response = prompt_and_response(corpus, documents.column_names)
    if prompt is not None and response is not None:
        rendered = zip(prompt.render(documents), response.render(documents), strict=True)
        pairs = [(ask, answer) if ask and answer else plain for plain, (ask, answer) in zip(pairs, rendered, strict=True)]
    columns = {
        "doc_id": documents.column("doc_id"),
        "prompt": pa.array([ask for ask, _ in pairs], pa.string()),
        "response": pa.array([answer for _, answer in pairs], pa.string()),
    }
    return pa.table(columns)


def _scored(unit: dict[str, Any], uri: str) -> dict[str, Any]:
    """Of a unit of rewrites the one whose log-probabilities are of the same documents."""
    table, number = unit["table"], unit["unit"]
    return {
        "unit": number,
        "table": table.replace("rewrites", "teacher_logprobs"),
        "rewrites": storage.join(uri, shard_of(table, number)),
    }


def _by_table(units: Sequence[dict[str, Any]], records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for unit, record in zip(units, records, strict=True):
        found.setdefault(unit["table"], []).append(record)
    return found
