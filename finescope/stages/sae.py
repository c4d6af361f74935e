"""`sae`: a dictionary trained on activations of documents drawn from all over the corpus, or one that is there already."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from finescope import schemas, storage
from finescope.config import CorpusSection, SaeSection
from finescope.corpus.documents import read_documents
from finescope.corpus.tokenise import length_batches, pad_batch, tokenise
from finescope.models.load import ModelReference, load_tokenizer
from finescope.runners.base import Context, Progress, Resources
from finescope.sae.dictionary import save_dictionary
from finescope.sae.fit import work_units
from finescope.sae.stream import TokenBatch
from finescope.sae.train import adopt_dictionary, train_dictionary
from finescope.stages.references import limited_units, memory_bytes, model_of, write_table
from finescope.steps import Outcome, StepInput

# Units of work that are read at a time and mixed; what is held in memory is their text.
_MIXED_UNITS = 8
# Documents that are sorted by length together, and tokens of a forward pass, padding included.
_SORTED_DOCUMENTS, _BATCH_TOKENS = 512, 4096
# Documents on which a dictionary that was given is measured again.
_MEASURED_DOCUMENTS = 256


@dataclass(frozen=True)
class _Job:
    """What the machine that trains is sent."""

    model: ModelReference
    corpus: CorpusSection
    section: SaeSection
    units: tuple[dict[str, Any], ...]
    uri: str  # where the dictionary goes


def sae(context: Context, corpus: CorpusSection, section: SaeSection, step: StepInput) -> Outcome:
    """Train the dictionary, or check the one that `sae.path` names; rows are those of `metrics`.

    Raises:
        ModelError: the dictionary of `sae.path` is of another model.
        StepFailed: too few documents, or the loss is not finite.
    """
    model = model_of(step["model"])
    units = tuple(unit for unit in limited_units(step["index"], corpus.limit) if unit["take"] > 0)
    job = _Job(model, corpus, section, units, storage.join(step.uri, "dictionary"))
    resources = Resources(memory_bytes(model))
    if section.path is not None:
        with context.reporter.task("sae: measuring", 1, "dictionaries") as progress:
            facts, history = context.runner.call(_adopt, (job,), progress, resources)
    else:
        with context.reporter.task("sae: training", work_units(section), "tokens") as progress:
            facts, history = context.runner.call(_train, (job,), progress, resources)
    rows = [{"step": "sae", "name": name, "value": value, "time": time} for name, value, time in history]
    table = pa.Table.from_pylist(rows, schema=schemas.METRICS)
    return Outcome(table.num_rows, table.num_rows, 0, {"metrics": write_table(step.uri, "metrics", table)}, facts)


History = list[tuple[str, float, datetime.datetime]]


def _train(job: _Job, progress: Progress) -> tuple[dict[str, Any], History]:
    trained = train_dictionary(job.model, _batches(job), job.section, progress)
    save_dictionary(job.uri, trained.dictionary)
    fitted = trained.fit
    ended = datetime.datetime.now(datetime.UTC)
    # Rows keep the order of the training; the step is not a column of `metrics`, `history_steps` tells of it.
    history = [(name, value, ended) for _, name, value in fitted.history]
    autoencoder = trained.dictionary.autoencoder
    facts = {
        "layer": trained.dictionary.layer,
        "architecture": autoencoder.architecture,
        "num_latents": autoencoder.num_latents,
        "k": autoencoder.k,
        "coordinates": autoencoder.coordinates.tolist(),
        "fvu": fitted.fvu,
        "dead_share": fitted.dead_share,
        "l0": fitted.l0,
        "tokens": fitted.trained_tokens,
        "held_out_tokens": fitted.held_out_tokens,
        "history_steps": sorted({number for number, _, _ in fitted.history}),
    }
    return facts, history


def _adopt(job: _Job, progress: Progress) -> tuple[dict[str, Any], History]:
    assert job.section.path is not None
    dictionary, measured = adopt_dictionary(job.section.path, job.model, _first(_batches(job), _MEASURED_DOCUMENTS))
    save_dictionary(job.uri, dictionary)
    progress(1)
    autoencoder = dictionary.autoencoder
    facts = {
        "layer": dictionary.layer,
        "architecture": autoencoder.architecture,
        "num_latents": autoencoder.num_latents,
        "k": autoencoder.k,
        "coordinates": autoencoder.coordinates.tolist(),
        "fvu": measured,
        "fvu_recorded": dictionary.fvu,
        "path": job.section.path,
    }
    return facts, [("fvu", measured, datetime.datetime.now(datetime.UTC))]


def _batches(job: _Job) -> Iterator[TokenBatch]:
    """Padded batches of documents, in an order drawn from the seed: units are mixed with each other, lengths too."""
    tokenizer = load_tokenizer(job.model)
    random = np.random.default_rng(job.section.seed)
    order = random.permutation(len(job.units))
    for start in range(0, len(order), _MIXED_UNITS):
        texts: list[str] = []
        for number in order[start : start + _MIXED_UNITS]:
            unit = job.units[number]
            read = read_documents(unit, job.corpus, unit["name"], tokenizer, unit["take"], "sae")
            texts.extend(read.table.column("text").to_pylist())
        mixed = random.permutation(len(texts))
        for first in range(0, len(mixed), _SORTED_DOCUMENTS):
            chosen = [texts[index] for index in mixed[first : first + _SORTED_DOCUMENTS]]
            tokens = tokenise(tokenizer, chosen, job.section.max_tokens)
            batches = length_batches([len(item) for item in tokens], _BATCH_TOKENS)
            for place in random.permutation(len(batches)):
                yield pad_batch([tokens[index] for index in batches[place]], tokenizer.pad_token_id)


def _first(batches: Iterator[TokenBatch], documents: int) -> Iterator[TokenBatch]:
    for ids, mask in batches:
        yield ids, mask
        documents -= len(ids)
        if documents <= 0:
            return
