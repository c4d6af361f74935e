"""A run that no model made: manifests and small tables written by finescope's own functions, for tests of what reads runs."""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from finescope import schemas, steps, storage
from finescope.config import STEPS
from finescope.manifest import Manifest, TableFile
from finescope.steps import Outcome, Step, StepInput

SCORED, CURATED, REJECTED = 400, 40, 5
LAYERS, HEADS, CHANNELS = 6, 3, 64
SOURCES = {"sympy": 80, "numpy": 200, "<script>alert(1)</script>": 120}
SEEDS = ("Solve the equation x**2 - 1 = 0", "<img src=x onerror=alert(2)>", "Differentiate sin(x) \N{GREEK SMALL LETTER PI}")
EVIL = "</pre><script>alert('corpus')</script><a href=\"http://evil.example/\">x</a> & {{ 7 * 7 }}"


def build_run(
    output: str, until: str = "evaluate", control: bool = True, source: bool = True, sae: str = "trained"
) -> dict[str, Manifest]:
    """Write a run at `output` (local or memory://) up to step `until`; the manifests of its steps.

    `sae`: "trained" (two dictionaries), "adopted" (one that was given) or "old" (before there was a table of latents).
    Of the curated documents rank 1 has the text `EVIL`; 36 of the 40 have the source sympy.
    """
    functions: dict[str, Callable[[StepInput], Outcome]] = {
        "index": lambda step: _index(step, source),
        "model": lambda step: Outcome(facts={"reference": {"num_parameters": 1000, "num_layers": LAYERS}, "source": "tiny"}),
        "sae": lambda step: _sae(step, sae),
        "embed": _embed,
        "score": _score,
        "curate": lambda step: _curate(step, source),
        "teach": lambda step: _teach(step, control),
        "prune": _prune,
        "distill": lambda step: _distill(step, control),
        "evaluate": lambda step: _evaluate(step, control),
    }
    done: dict[str, Manifest] = {}
    previous: tuple[Step, ...] = ()
    for name in STEPS[: STEPS.index(until) + 1]:
        step = Step(name, {"seed": 0, "name": name}, previous)
        done[name] = steps.run(step, output, functions[name])
        previous = (*previous, step)
    return done


def _put(step: StepInput, name: str, rows: Sequence[dict[str, Any]] | pa.Table, schema: pa.Schema | None, shards: int = 1):
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema=schema)
    size = -(-table.num_rows // shards) or 1
    files = []
    for number, start in enumerate(range(0, max(table.num_rows, 1), size)):
        part, path = table.slice(start, size), f"{name}/part-{number:06d}.parquet"
        written = storage.put_parquet(storage.join(step.uri, path), part)
        files.append(TableFile(path=path, rows=part.num_rows, bytes=written))
    return tuple(files)


def _scores() -> list[dict[str, Any]]:
    values = np.sort(np.random.default_rng(0).beta(2, 6, SCORED))[::-1]
    return [
        {"doc_id": f"d{at:04d}", "file": 0, "row_group": 0, "row": at, "num_tokens": 50 + at % 9, "score": float(value)}
        | {"seed": at % 2, "top_latents": [7, 11, 100 + at % 5]}
        for at, value in enumerate(values)
    ]


def _index(step: StepInput, source: bool) -> Outcome:
    unit = {"file": "corpus.parquet", "row_group": 0, "num_rows": SCORED + 3, "bytes": 1000, "etag": "e"}
    facts = {"files": 1, "documents": SCORED + 3} | ({"sources": SOURCES} if source else {})
    tables = {"documents": _put(step, "documents", [unit], schemas.DOCUMENTS), "rejects": ()}
    return Outcome(1, 1, 0, tables, facts)


def _metrics(step: StepInput, curves: dict[str, list[float]], name: str, table: str = "metrics"):
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    rows = [{"step": name, "name": metric, "value": v, "time": when} for metric, values in curves.items() for v in values]
    return _put(step, table, rows, schemas.METRICS)


def _sae(step: StepInput, kind: str) -> Outcome:
    at = np.arange(1, 41)
    rows = {"fvu": 0.2 + 0.8 / at, "dead_share": 0.3 * at / 40, "loss": 0.25 + 0.9 / at, "l0": 32 + 0 * at}
    curves = {name: [float(v) for v in values] for name, values in rows.items()}
    facts: dict[str, Any] = {"num_latents": 4096, "k": 32, "layer": 4, "architecture": "topk", "coordinates": list(range(128))}
    trained = {"fvu": 0.21, "dead_share": 0.3, "l0": 32.0, "tokens": 80_000, "history_steps": list(range(10, 401, 10))}
    if kind == "old":
        return Outcome(tables={"metrics": _metrics(step, curves, "sae")}, facts=facts | trained)
    if kind == "adopted":
        curves, facts = {}, facts | {"path": "given<i>", "fvu": 0.2345, "fvu_recorded": 0.233}
        dictionaries = {"main": 4096}
    else:
        curves |= {f"wide/{name}": [0.9 * v for v in values] for name, values in curves.items()}
        facts |= trained
        dictionaries = {"main": 4096, "wide": 8192}
    for name, scalars in _SCALARS.items():
        prefix = "" if name == "main" else f"{name}/"
        for metric, value in scalars.items() if name in dictionaries else ():
            curves.setdefault(f"{prefix}{metric}", []).append(value)
    tables = {"metrics": _metrics(step, curves, "sae"), "latents": _put(step, "latents", _latents(dictionaries), schemas.LATENTS)}
    return Outcome(tables=tables, facts=facts)


_SCALARS = {
    "main": {"fvu": 0.2345, "l0": 32.0, "dead_share": 0.1, "dense_share": 0.0123, "ce_base": 2.913, "ce_spliced": 3.037}
    | {"ce_zeroed": 11.42, "ce_recovered": 0.98543},
    "wide": {"fvu": 0.1987, "l0": 31.6, "dead_share": 0.1, "dense_share": 0.0061, "stability": 0.688, "stable_share": 0.512},
}


def _latents(dictionaries: dict[str, int]) -> list[dict[str, Any]]:
    """Log-normal frequencies of 20,000 activations, a tenth of the latents dead; latent 3 is active on all of them."""
    random, rows = np.random.default_rng(5), []
    for name, size in dictionaries.items():
        active = np.minimum(20_000 * random.lognormal(-6.0, 1.6, size), 20_000).astype(int) + 1
        active[::10] = 0
        active[3] = 20_000
        for latent, count in enumerate(active.tolist()):
            strength = {"mean_activation": 1.5, "max_activation": 9.0} if count else {}
            rows.append({"dictionary": name, "latent": latent, "active": count, "frequency": count / 20_000} | strength)
    return rows


def _embed(step: StepInput) -> Outcome:
    rows = [
        {key: row[key] for key in ("doc_id", "file", "row_group", "row", "num_tokens")}
        | {"fvu": 0.2, "latent_ids": [7, 11], "latent_values": [np.float16(1.0), np.float16(0.5)]}
        for row in _scores()
    ]
    reject = {"doc_id": None, "step": "embed", "file": "corpus.parquet", "row_group": 0, "row": 400, "reason": "empty_text"}
    rejects = [reject | {"row": SCORED + at, "detail": "" if at else "<b>nothing</b>"} for at in range(3)]
    tables = {"embeddings": _put(step, "embeddings", rows, schemas.EMBEDDINGS, 3)}
    tables["rejects"] = _put(step, "rejects", rejects, schemas.REJECTS)
    return Outcome(SCORED + 3, SCORED, 3, tables, {"tokens": 22_000, "fvu": 0.2})


def _score(step: StepInput) -> Outcome:
    tables = {"scores": _put(step, "scores", _scores(), schemas.SCORES, 3)}
    return Outcome(SCORED, SCORED, 0, tables, {"seeds": list(SEEDS), "seed_latents": [[7, 1], [11], [2]]})


def _curate(step: StepInput, source: bool) -> Outcome:
    scores = _scores()
    duplicates, kept = scores[1 : 1 + REJECTED], [scores[0], *scores[1 + REJECTED : CURATED + REJECTED]]
    columns: dict[str, Any] = {
        "rank": pa.array(range(1, CURATED + 1), pa.int64()),
        "doc_id": [row["doc_id"] for row in kept],
        "score": pa.array([row["score"] for row in kept], pa.float32()),
        "seed": pa.array([row["seed"] for row in kept], pa.int32()),
    }
    if source:
        columns["source"] = ["sympy"] * 36 + list(SOURCES)[1:] * 2
    columns["text"] = [EVIL, *(f"Document {at}: the roots of a polynomial of degree {at}." for at in range(2, CURATED + 1))]
    place = {"step": "curate", "file": "corpus.parquet", "row_group": 0, "row": 0, "reason": "duplicate", "detail": "of d0000"}
    rejects = [place | {"doc_id": row["doc_id"]} for row in duplicates]
    tables = {"curated": _put(step, "curated", pa.table(columns), None)}
    tables["rejects"] = _put(step, "rejects", rejects, schemas.REJECTS)
    facts = {"lowest_score": kept[-1]["score"], "scored": SCORED, "reasons": {"duplicate": REJECTED}}
    return Outcome(CURATED + REJECTED, CURATED, REJECTED, tables, facts)


def _prune(step: StepInput) -> Outcome:
    random, rows = np.random.default_rng(1), []
    for layer in range(1, LAYERS + 1):
        for kind, count, keep, size in (("heads", HEADS, 2, 900), ("mlp", CHANNELS, 40, 90)):
            values = random.lognormal(-8 + 0.2 * layer, 1.0, count)
            kept = set(np.argsort(-values)[:keep].tolist())
            base = {"layer": layer, "kind": kind, "num_params": size}
            general = values * random.lognormal(0.0, 0.5, count)
            rows += [
                base | {"group_index": g, "importance": values[g], "kept": g in kept, "general": general[g]} for g in range(count)
            ]
    _put_model(step, "pruned")
    facts = {"parameters_before": 1000, "parameters_after": 740, "ratio_reached": 0.34, "calibration_tokens": 900}
    facts |= {"mlp_channels_after": 40, "reload": {"architecture": "LlamaForCausalLM", "difference": 1e-6}, "compensated": True}
    facts |= {"general_documents": 64, "general_tokens": 700}
    latents = [
        {"layer": layer, "group_index": 1, "latent": latent, "correlation": 0.9 - 0.1 * at, "documents": 30 - at}
        | {"domain_mean": 1.5, "general_mean": 0.25}
        for layer in (2, 5)
        for at, latent in enumerate((7, 11, 101, 102, 103, 104))
    ]
    tables = {"importance": _put(step, "importance", rows, schemas.IMPORTANCE)}
    tables["head_latents"] = _put(step, "head_latents", latents, schemas.HEAD_LATENTS)
    return Outcome(len(rows), len(rows), 0, tables, facts)


def _teach(step: StepInput, control: bool) -> Outcome:
    reasons = [("rewrite", ""), ("rewrite", ""), ("original", "contradicts"), ("rewrite", ""), ("original", "too short")]
    rows = [
        {"doc_id": f"d{at:04d}", "prompt": "Explain <em>this</em>", "response_original": EVIL, "response": f"rewritten {at}"}
        | {"used": used, "reason": reason}
        for at, (used, reason) in enumerate(reasons * 8)
    ]
    names = ("rewrites", "control_rewrites") if control else ("rewrites",)
    tables = {name: _put(step, name, rows, schemas.REWRITES, 2) for name in names}
    scores = [{"doc_id": row["doc_id"], "targets": 2, "ids": [7, 8, 9, 7], "logprobs": [np.float16(-1.1)] * 6} for row in rows]
    tables["teacher_logprobs"] = _put(step, "teacher_logprobs", scores, schemas.TEACHER_LOGPROBS, 2)
    return Outcome(len(rows), len(rows), 0, tables, {"rewritten": 24, "teacher": {"source": "tiny"}})


def _distill(step: StepInput, control: bool) -> Outcome:
    at = np.arange(1, 31)
    curves = {"loss": list(1.5 + 1.5 / at), "learning_rate": list(5e-5 * (1 - at / 31)), "tokens_per_second": [900.0] * 30}
    tables = {"metrics": _metrics(step, curves, "distill")}
    facts: dict[str, Any] = {"training_tokens": 5000, "truncated": 2, "reference": {"path": "x"}}
    if control:
        curves["loss"] = list(1.9 + 1.6 / at)
        tables["control_metrics"] = _metrics(step, curves, "distill", "control_metrics")
        facts["control"] = {"training_tokens": 5000}
    _put_model(step, "recovered")
    return Outcome(CURATED, CURATED, 0, tables, facts)


def _put_model(step: StepInput, kind: str) -> None:
    storage.put_json(storage.join(step.uri, "model", "config.json"), {"architectures": ["LlamaForCausalLM"], "kind": kind})
    storage.put_bytes(storage.join(step.uri, "model", "model.safetensors"), kind.encode())


_SPEED = {"device": "cpu", "threads": 2, "repeats": 5, "documents": 1, "prompt_tokens": 512, "decode_tokens": 16}


def _evaluate(step: StepInput, control: bool) -> Outcome:
    sizes = {"base": (134_515_008, 9.7, 18.2), "pruned": (102_000_000, 31.4, 88.0), "recovered": (102_000_000, 11.9, 41.5)}
    sizes |= {"control": (102_000_000, 17.3, 37.9)} if control else {}
    models = {
        name: {"parameters": parameters, "file_bytes": 4 * parameters + 2_000_000, "memory_bytes": 4 * parameters}
        | {"prefill_tokens_per_second": 1.2e11 / parameters, "decode_tokens_per_second": 2.4e9 / parameters}
        | {"perplexity": {"target": target, "general": general}, "peak_memory_bytes": 5 * parameters}
        | {"flops_per_token": 2 * parameters, "prefill_gain_over_flops": None if name == "base" else 0.93}
        for name, (parameters, target, general) in sizes.items()
    }
    table = _metrics(step, {f"{name}.parameters": [float(found["parameters"])] for name, found in models.items()}, "evaluate")
    rows = sum(file.rows for file in table)
    return Outcome(rows, rows, 0, {"metrics": table}, {"models": models, "target_source": "files", "speed": _SPEED})
