"""`distill`: the pruned model is trained on what the teacher has written, and a control beside it."""

from collections.abc import Mapping
from typing import Any

from finescope import schemas, storage
from finescope.config import ComputeSection, DistillSection
from finescope.distillation import loop
from finescope.distillation.examples import build_examples, to_table
from finescope.distillation.job import TrainJob, plan
from finescope.errors import StepFailed
from finescope.manifest import Manifest, TableFile
from finescope.models.load import ModelReference, load_tokenizer, reference_of
from finescope.rounds import Round
from finescope.runners.base import Context, Resources
from finescope.stages.cards import model_card
from finescope.stages.references import memory_bytes, model_of, read_shards
from finescope.steps import Outcome, StepInput


def distill(context: Context, turn: Round, compute: ComputeSection, step: StepInput) -> Outcome:
    """Train and merge; rows are those of the teacher's `rewrites`, which all rounds train on.

    Raises:
        StepFailed: there is nothing to train on, or the training diverges.
    """
    section, model, pruned = turn.training, model_of(step["model"]), step[turn.prune]
    trained = _train(context, section, compute, step, pruned, "", None)
    tables = {"metrics": _metrics(step.uri, "")}
    facts: dict[str, Any] = {**trained, "reference": _reference(step, model, "").model_dump(mode="json")}
    if section.control:
        outcome = _train(context, section, compute, step, pruned, "control", trained["training_tokens"])
        tables |= {"control_metrics": _metrics(step.uri, "control")}
        facts["control"] = {**outcome, "reference": _reference(step, model, "control").model_dump(mode="json")}
    rows = step["teach"].rows_out
    return Outcome(rows, rows, 0, tables, facts)


def _train(
    context: Context,
    section: DistillSection,
    compute: ComputeSection,
    step: StepInput,
    pruned: Manifest,
    folder: str,
    cap_tokens: int | None,
) -> dict[str, Any]:
    """Train one student on what the teacher wrote, for the control where `folder` says so; its files go to `folder` of the step.

    Returns facts about it.
    """
    student, teach, of_whom = model_of(pruned), step["teach"], f"{folder}_" if folder else ""
    home = storage.join(step.uri, folder) if folder else step.uri
    table = schemas.conform(read_shards(teach, f"{of_whom}rewrites"), schemas.REWRITES)
    tokenizer = load_tokenizer(student)
    pairs = zip(table.column("prompt").to_pylist(), table.column("response").to_pylist(), strict=True)
    built = build_examples(tokenizer, pairs, section.max_tokens)
    if not built.examples:
        raise StepFailed("no document is left to train on: each is shorter than two tokens, or all prompt")
    examples_uri = storage.join(home, "examples", "part-000000.parquet")
    storage.put_parquet(examples_uri, to_table(built.examples))
    told = tuple(teach.files(f"{of_whom}teacher_logprobs")) if section.kl_weight else ()
    recompute = None if compute.gradient_checkpointing == "auto" else compute.gradient_checkpointing
    places = storage.join(home, "checkpoints"), home
    job = TrainJob(student.path, examples_uri, section, *places, cap_tokens, told, recompute, compute.track)
    planned = plan(job)
    if not storage.exists(job.record):
        name = f"distill: {folder or 'training'}"
        copies = 5.0 if section.method == "full" else 1.5
        with context.reporter.task(name, len(planned.steps), "steps") as progress:
            resources = Resources(memory_bytes(student, copies))
            context.runner.train(loop.train, (job,), progress, resources, section.zero_stage)
    trained: dict[str, Any] = storage.read_json(job.record)
    used = table.column("used").to_pylist()
    facts = {
        **trained,
        "examples": len(built.examples),
        "truncated": built.truncated,
        "dropped": len(built.dropped),
        "rewritten": used.count("rewrite"),
    }
    if not storage.exists(storage.join(home, "model", "README.md")):
        _write_card(step, section, pruned, home, folder or "recovered", facts)
    storage.delete(storage.join(home, "checkpoints"))
    return facts


def _write_card(
    step: StepInput, section: DistillSection, pruned: Manifest, home: str, kind: str, facts: Mapping[str, Any]
) -> None:
    told = {key: pruned.facts[key] for key in ("parameters_before", "parameters_after", "ratio_reached")}
    told |= {"teacher": step["teach"].facts["teacher"]["source"], **facts}
    settings = {"distill": section.model_dump(mode="json")}
    card = model_card(model_of(step["model"]), step["model"].facts["source"], kind, told, settings)
    storage.put_bytes(storage.join(home, "model", "README.md"), card.encode())


def _metrics(uri: str, folder: str) -> tuple[TableFile, ...]:
    path = storage.join(folder, "metrics/part-00000.parquet") if folder else "metrics/part-00000.parquet"
    full = storage.join(uri, path)
    return (TableFile(path=path, rows=storage.read_parquet(full, ["name"]).num_rows, bytes=storage.info(full).size or 0),)


def _reference(step: StepInput, model: ModelReference, folder: str) -> ModelReference:
    place = storage.join(step.uri, *([folder] if folder else []), "model")
    return reference_of(place, model, f"{step.identity}:{folder}")
