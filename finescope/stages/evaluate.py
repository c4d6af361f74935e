"""`evaluate`: base, pruned, recovered and control, on held-out text of the domain and on general text, and their speed."""

import datetime
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch

from finescope import schemas, storage
from finescope.config import CorpusSection, EvaluateSection
from finescope.config_seeds import SeedFile
from finescope.corpus.documents import read_seeds, read_texts
from finescope.corpus.tokenise import tokenise
from finescope.evaluation.flops import flops_of
from finescope.evaluation.memory import parameter_bytes
from finescope.evaluation.perplexity import perplexity_of_documents
from finescope.evaluation.speed import Shape, gain_over_flops, throughputs
from finescope.models.load import ModelReference, load_model, load_tokenizer
from finescope.runners.base import Context, Progress, Resources
from finescope.stages.references import memory_bytes, model_of, random_documents, read_located, read_shards, write_table
from finescope.steps import Outcome, StepInput

# What models read and make when their speeds are compared: fewer tokens where the model has not as many positions.
_PROMPT, _DECODED, _REPEATS = 512, 16, 5


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
    references = _models(step, base)
    models: dict[str, dict[str, Any]] = {}
    for name, reference in references.items():
        job = _Job(reference, sets, section)
        with context.reporter.task(f"evaluate: {name}", documents, "documents") as progress:
            models[name] = context.runner.call(_measure, (job,), progress, Resources(memory_bytes(reference, 1.2)))
    figures, setting = _speeds(context, references)
    models = {name: found | figures[name] for name, found in models.items()}
    rows = [
        {"step": "evaluate", "name": f"{name}.{key}", "value": float(value), "time": datetime.datetime.now(datetime.UTC)}
        for name, measured in models.items()
        for key, value in _flat(measured).items()
        if value is not None
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.METRICS)
    facts = {
        "models": models,
        "speed": setting,
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
    """Perplexity on each set, and sizes: one model, on one machine."""
    model, tokenizer = load_model(job.model), load_tokenizer(job.model)
    found: dict[str, Any] = {"parameters": job.model.num_parameters, "perplexity": {}, "tokens": {}}
    for name, texts in job.sets.items():
        tokens = tokenise(tokenizer, list(texts), job.section.max_tokens)
        measured = perplexity_of_documents(model, tokens, job.section.batch_tokens, tokenizer.pad_token_id, progress)
        found["perplexity"][name] = measured.value
        found["tokens"][name] = measured.num_tokens
    weights = parameter_bytes(model)
    # A hub model has no directory of its own here; its file size is that of its weights as they are held.
    return {**found, "memory_bytes": weights, "file_bytes": weights if job.model.revision else _file_bytes(job.model.path)}


def _file_bytes(directory: str) -> int:
    """Bytes of the safetensors files of a model's directory."""
    return sum(info.size or 0 for info in storage.glob(directory) if info.path.endswith(".safetensors"))


def _speeds(context: Context, references: dict[str, ModelReference]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What `_compare` finds of each model; of those of one size, which in one run are of one shape, the first is measured."""
    first = {reference.num_parameters: name for name, reference in reversed(references.items())}
    compared = {name: reference for name, reference in references.items() if name in first.values()}
    with context.reporter.task("evaluate: speed", (_REPEATS + 1) * len(compared), "rounds") as progress:
        resources = Resources(memory_bytes(references["base"], 1.2 * len(compared)))
        figures, setting = context.runner.call(_compare, (compared,), progress, resources)
    return {name: figures[first[reference.num_parameters]] for name, reference in references.items()}, setting


def _compare(models: dict[str, ModelReference], progress: Progress) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Speed, memory and operations of each model, in turns on one machine, the base first; and how they were measured."""
    loaded = {name: load_model(reference) for name, reference in models.items()}
    base, *_ = loaded.values()
    positions = int(base.config.get_text_config().max_position_embeddings)
    shape = Shape(1, min(_PROMPT, positions - _DECODED), _DECODED)
    speeds = throughputs(loaded, shape, _REPEATS, progress)
    flops = {name: flops_of(model) for name, model in loaded.items()}
    prefill = {name: (speeds[name].prefill, flops[name].prefill(shape.prompt_tokens)) for name in models}
    figures = {
        name: {
            "prefill_tokens_per_second": speeds[name].prefill,
            "decode_tokens_per_second": speeds[name].decode,
            "peak_memory_bytes": speeds[name].peak_bytes,
            "flops_per_token": flops[name].token,
            "prefill_gain_over_flops": gain_over_flops(prefill["base"], prefill[name]),
        }
        for name in models
    }
    setting = {"device": base.device.type, "threads": torch.get_num_threads(), "repeats": _REPEATS, **asdict(shape)}
    return figures, setting


def _flat(measured: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in measured.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": number for inner, number in value.items()}
        else:
            flat[key] = value
    return flat
