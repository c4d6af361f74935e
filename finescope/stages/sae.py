"""`sae`: dictionaries trained on activations of documents from all over the corpus, or one that is there already."""

import datetime
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from finescope import directories, schemas, storage
from finescope.config import CorpusSection, SaeSection
from finescope.errors import StepFailed
from finescope.manifest import TableFile
from finescope.models.hooks import HookPoint, module_path
from finescope.models.load import ModelReference, load_meta_model
from finescope.runners.base import Context, Resources, Source
from finescope.sae.chunks import CHUNK_DOCUMENTS, Chunk, plan_chunks
from finescope.sae.extract import Extractor, SiteColumns
from finescope.sae.fit import FitPlan, work_units
from finescope.sae.naming import MAIN, metric_name
from finescope.sae.train import TRAINED, TrainingJob, dictionary_uri, train
from finescope.stages.references import PROCESS_BYTES, limited_units, memory_bytes, model_of, write_table
from finescope.stages.sae_coordinates import choose
from finescope.stages.sae_measures import DocumentSet, adopted, recovered, stabilities
from finescope.steps import Outcome, StepInput

# Of the chunks this share, and so many at most, are measured on and never trained on.
_HELD_OUT_SHARE, _HELD_OUT_CHUNKS = 0.05, 4
# Documents on which a dictionary that was given is measured again.
_MEASURED_DOCUMENTS = 256

# Of what is recorded about a dictionary; too long for a manifest, or in a table.
_NO_FACTS = ("name", "history", "metrics", "latents_bytes")

Rows = list[tuple[str, float, str]]  # name, value, time of the table `metrics`


@dataclass(frozen=True)
class _Documents:
    """The documents of the step: chunks in the order in which they are used."""

    held_out: list[Chunk]
    trained: list[Chunk]

    @property
    def all(self) -> list[Chunk]:
        return self.held_out + self.trained


def sae(context: Context, corpus: CorpusSection, section: SaeSection, step: StepInput) -> Outcome:
    """Train the dictionaries, or check the one that `sae.path` names; rows are those of `metrics`.

    Raises:
        ModelError: the dictionary of `sae.path` is of another model, or a layer or site is not the model's.
        StepFailed: too few documents, or a loss that is not finite.
    """
    model = model_of(step["model"])
    documents = _documents(step, corpus, section)
    given = DocumentSet(model, corpus, section.max_tokens, tuple(documents.held_out))
    tables: dict[str, tuple[TableFile, ...]] = {}
    if section.path is not None:
        few = given.first(_MEASURED_DOCUMENTS)
        facts, rows, latents = adopted(context, few, section.path, dictionary_uri(step.uri, MAIN))
        tables["latents"] = write_table(step.uri, "latents", latents)
        names = (MAIN,)
    else:
        facts, rows, tables["latents"] = _train(context, model, corpus, section, documents, step)
        names = (MAIN, *(variant.name for variant in section.variants))
    uris = {name: dictionary_uri(step.uri, name) for name in names}
    late = recovered(context, given, section.recovery_documents, uris) + stabilities(section, uris)
    ended = datetime.datetime.now(datetime.UTC).isoformat()
    rows += [(name, value, ended) for name, value in late]
    facts["measures"] = dict(late)
    table = _metrics(rows)
    tables = {"metrics": write_table(step.uri, "metrics", table), **tables}
    return Outcome(table.num_rows, table.num_rows, 0, tables, facts)


def _documents(step: StepInput, corpus: CorpusSection, section: SaeSection) -> _Documents:
    units = [unit for unit in limited_units(step["index"], corpus.limit) if unit["take"] > 0]
    # A document has an activation at least, but for the few that are rejected or of one token.
    chunks = plan_chunks(units, section.seed, most=section.num_tokens + _HELD_OUT_CHUNKS * CHUNK_DOCUMENTS)
    held_out = max(1, min(_HELD_OUT_CHUNKS, int(_HELD_OUT_SHARE * len(chunks))))
    return _Documents(chunks[:held_out], chunks[held_out:])


def _train(
    context: Context, model: ModelReference, corpus: CorpusSection, section: SaeSection, documents: _Documents, step: StepInput
) -> tuple[dict[str, Any], Rows, tuple[TableFile, ...]]:
    sections = section.dictionaries()
    names = (MAIN, *(variant.name for variant in section.variants))
    hooks = [HookPoint(item.layer, item.site) for item in sections]
    distinct = list(dict.fromkeys(hooks))
    meta = load_meta_model(model)
    modules = tuple(module_path(meta, hook) for hook in distinct)  # the model has them, before anything runs
    if not documents.trained:
        raise StepFailed("the corpus has too few documents to train the autoencoder: at least 2 are needed")
    sites = choose(context, model, corpus, section, distinct, documents.trained, step.uri)
    ends = [sum(site.width for site in sites[: number + 1]) for number in range(len(sites))]
    spans = [(end - site.width, end) for site, end in zip(sites, ends, strict=True)]
    site_of = tuple(distinct.index(hook) for hook in hooks)
    stream = _identity([step["index"].identity, step["model"].identity, section.max_tokens, section.seed], sites)
    plan = FitPlan(
        sections=sections,
        columns=tuple(spans[number] for number in site_of),
        chunks=len(documents.all),
        held_out=len(documents.held_out),
        checkpoints=storage.join(step.uri, "checkpoints"),
        identity=stream,
    )
    job = TrainingJob(model, plan, names, sites, site_of, modules, step.uri)
    record_uri = storage.join(step.uri, TRAINED)
    if not storage.exists(record_uri):
        cache = storage.join(step.uri.rpartition("/")[0], f"activations-{stream}") if section.cache else None
        if cache is not None:
            directories.delete_temporaries(cache)
        source = Source(
            Extractor,
            (model, corpus, section.max_tokens, sites, cache),
            pa.Table.from_pylist(documents.all),
            Resources(memory_bytes(model) + 2 * 4 * plan.width * CHUNK_DOCUMENTS * section.max_tokens),
            int(section.buffer_mib * 2**20),
        )
        with context.reporter.task("sae: training", work_units(section), "tokens") as progress:
            context.runner.train_on_stream(train, (job,), source, section.workers, progress, _resources(plan, section.workers))
    record = storage.read_json(record_uri)
    storage.delete(storage.join(step.uri, "checkpoints"))
    trained = record["dictionaries"][0]["tokens"]
    if trained < section.num_tokens - section.batch_tokens:
        context.reporter.warn(f"sae.num_tokens: {section.num_tokens:,} activations were asked for; the corpus has {trained:,}")
    return _results(record, names)


def _results(record: dict[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], Rows, tuple[TableFile, ...]]:
    """Facts, rows of `metrics` and files of `latents` of what the processes that trained have left."""
    found = {entry["name"]: entry for entry in record["dictionaries"]}
    rows: Rows = []
    files = []
    facts: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(names):
        entry = found[name]
        # Rows keep the order of the training; its step is not a column of `metrics`, `history_steps` tells of it.
        rows += [(metric_name(name, figure), value, record["ended"]) for _, figure, value in entry["history"]]
        rows += [(figure, value, record["ended"]) for figure, value in entry["metrics"]]
        path = f"latents/part-{number:06d}.parquet"
        files.append(TableFile(path=path, rows=entry["num_latents"], bytes=entry["latents_bytes"]))
        facts[name] = {key: value for key, value in entry.items() if key not in _NO_FACTS}
        facts[name]["history_steps"] = sorted({step for step, _, _ in entry["history"]})
    return {**facts.pop(MAIN), "variants": facts}, rows, tuple(files)


def _metrics(rows: Rows) -> pa.Table:
    listed = [
        {"step": "sae", "name": name, "value": value, "time": datetime.datetime.fromisoformat(time)} for name, value, time in rows
    ]
    return pa.Table.from_pylist(listed, schema=schemas.METRICS)


def _resources(plan: FitPlan, workers: int) -> Resources:
    """Of a process that trains: buffers, weights with gradient and moments, and the activations of a step."""
    batch = plan.sections[0].batch_tokens // workers
    held = 0
    for section, (start, stop) in zip(plan.sections, plan.columns, strict=True):
        held += 4 * 4 * 2 * section.num_latents * (stop - start) + 3 * 4 * batch * section.num_latents
    return Resources(memory_bytes=PROCESS_BYTES + held + 4 * plan.buffer_rows * plan.width // workers)


def _identity(parts: list[Any], sites: Iterable[SiteColumns]) -> str:
    """Of a stream of activations: what it is made of, and every number by which its columns are chosen."""
    digest = hashlib.sha256(json.dumps(parts).encode())
    for site in sites:
        digest.update(f"{site.hook} {site.d_in} {site.width}".encode() + site.coordinates.tobytes())
        digest.update(b"" if site.basis is None else site.basis.tobytes())
    return digest.hexdigest()[:16]
