"""`evaluate`: base, pruned, recovered and control, on held-out text of the domain and on general text, and their speed."""

import datetime
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from finescope import schemas
from finescope.config import CorpusSection, EvaluateSection
from finescope.config_seeds import SeedFile
from finescope.corpus.documents import read_seeds, read_texts
from finescope.corpus.tokenise import tokenise
from finescope.evaluation.perplexity import perplexity_of_documents
from finescope.evaluation.speed import parameter_bytes, throughput, weight_bytes
from finescope.models.load import ModelReference, load_model, load_tokenizer
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.references import memory_bytes, model_of, random_documents, read_located, read_shards, write_table
from finescope.steps import Outcome, StepInput

# One batch, measured a few times: the shape in which models are compared (documents, tokens read, tokens made, repeats).
_SPEED_BATCH, _SPEED_PROMPT, _SPEED_DECODED, _SPEED_REPEATS = 4, 64, 8, 3


@dataclass(frozen=True)
class _Job:
    """What the machine that measures one model is sent."""

    model: ModelReference
    sets: dict[str, tuple[str, ...]]  # name -> texts
    section: EvaluateSection


def evaluate(context: Context, corpus: CorpusSection, seeds: SeedFile, section: EvaluateSection, step: StepInput) -> Outcome:
    """Measure every model of the run on the same tokens. Rows are those of `metrics`."""
    base = model_of(step["model"])
    sets = {
        "target": _target(corpus, seeds, section, base)[: section.documents],
        "general": _general(context, corpus, section, step, base)[: section.documents],
    }
    documents = sum(len(texts) for texts in sets.values())
    models: dict[str, Any] = {}
    for name, reference in _models(step, base).items():
        job = _Job(reference, sets, section)
        with context.reporter.task(f"evaluate: {name}", documents, "documents") as progress:
            models[name] = context.runner.call(_measure, (job,), progress, Resources(memory_bytes(reference, 1.2)))
    rows = [
        {"step": "evaluate", "name": f"{name}.{key}", "value": float(value), "time": datetime.datetime.now(datetime.UTC)}
        for name, measured in models.items()
        for key, value in _flat(measured).items()
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.METRICS)
    facts = {
        "models": models,
        "documents": {name: len(texts) for name, texts in sets.items()},
        "target_source": "files" if section.target_of(seeds.domain) else "seeds",
        "general_source": "files" if section.general else "random",
    }
    return Outcome(len(rows), len(rows), 0, {"metrics": write_table(step.uri, "metrics", table)}, facts)


def _models(step: StepInput, base: ModelReference) -> dict[str, ModelReference]:
    facts = {"pruned": step["prune"].facts, "recovered": step["distill"].facts}
    if "control" in step["distill"].facts:
        facts["control"] = step["distill"].facts["control"]
    return {"base": base, **{name: ModelReference.model_validate(fact["reference"]) for name, fact in facts.items()}}


def _target(corpus: CorpusSection, seeds: SeedFile, section: EvaluateSection, base: ModelReference) -> tuple[str, ...]:
    tokenizer = load_tokenizer(base)
    if target := section.target_of(seeds.domain):
        return tuple(read_texts(target, corpus, tokenizer))
    return tuple(read_seeds(seeds, corpus, tokenizer))


def _general(
    context: Context, corpus: CorpusSection, section: EvaluateSection, step: StepInput, base: ModelReference
) -> tuple[str, ...]:
    if section.general:
        return tuple(read_texts(section.general, corpus, load_tokenizer(base)))
    curated = read_shards(step["curate"], "curated", ["doc_id"]).column("doc_id").to_pylist()
    located = random_documents(step, section.documents, 0, curated)
    table = read_located(context, step["index"], base, corpus, located, "evaluate: reading")
    return tuple(table.column("text").to_pylist())


def _measure(job: _Job, progress: Progress) -> dict[str, Any]:
    """Perplexity on each set, tokens a second, sizes: one model, on one machine."""
    model, tokenizer = load_model(job.model), load_tokenizer(job.model)
    found: dict[str, Any] = {"parameters": job.model.num_parameters, "perplexity": {}, "tokens": {}}
    for name, texts in job.sets.items():
        tokens = tokenise(tokenizer, list(texts), job.section.max_tokens)
        measured = perplexity_of_documents(model, tokens, job.section.batch_tokens, tokenizer.pad_token_id, progress)
        found["perplexity"][name] = measured.value
        found["tokens"][name] = measured.num_tokens
    speed = throughput(model, _SPEED_BATCH, _SPEED_PROMPT, _SPEED_DECODED, _SPEED_REPEATS)
    return {
        **found,
        "memory_bytes": parameter_bytes(model),
        "prefill_tokens_per_second": speed.prefill,
        "decode_tokens_per_second": speed.decode,
        # A hub model has no directory of its own here; its file size is that of its weights as they are held.
        "file_bytes": weight_bytes(job.model.path) if job.model.revision is None else parameter_bytes(model),
    }


def _flat(measured: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in measured.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": number for inner, number in value.items()}
        else:
            flat[key] = value
    return flat
