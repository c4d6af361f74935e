"""What a run will cost, before it begins: documents, tokens, floating-point operations, peak memory, disk."""

import importlib.util
import json as json_
import math
import os
import tempfile
from dataclasses import asdict, replace

from rich.console import Console
from rich.table import Table

from finescope import steps, storage
from finescope.config import Recipe
from finescope.corpus.estimate import estimate
from finescope.corpus.files import resolve
from finescope.corpus.shapes import recognise, shaped
from finescope.distillation.tracking import check_trackers
from finescope.errors import ResourceError
from finescope.manifest import Manifest, step_and_domain
from finescope.models.load import load_meta_model
from finescope.models.size import Size, size_of
from finescope.models.source import resolve as resolve_model
from finescope.pipeline import placed, steps_of
from finescope.plan_costs import PROCESS, Corpus, Cost, dictionary_costs, model_costs, round_costs, teach_cost
from finescope.processes import available_memory
from finescope.runners.base import Reporter
from finescope.stages.cautions import cautions_of
from finescope.stages.teacher import KEY, teacher_section
from finescope.steps import Step


def costs(recipe: Recipe) -> list[Cost]:
    """The cost of each step; of the steps that each domain has, once a domain.

    Raises:
        CorpusError, ModelError: the corpus, the model or the teacher cannot be used.
    """
    output = storage.absolute(recipe.output)
    plan = steps_of(recipe)
    corpus = _corpus(recipe, steps.finished(plan["index"], output))
    source = resolve_model(recipe.model, "model.path")
    meta = load_meta_model(source, trust_remote_code=recipe.model.trust_remote_code)
    model = size_of(meta, recipe.model.dtype)
    copied = model.weight_bytes if source.kind == "gguf" else 0
    found = [
        Cost("index", corpus.documents, 0, 0.0, PROCESS, 0),
        Cost("model", 0, 0, 0.0, PROCESS + 2 * model.weight_bytes, copied),
        *dictionary_costs(recipe, corpus, model, _passing(recipe, corpus, plan.get("screen"))),
        _teach_cost(recipe, corpus, model),
        *model_costs(recipe, corpus, model),
        *round_costs(recipe, corpus, model, meta),
    ]
    of_step = {cost.step: cost for cost in found}
    return [
        replace(of_step[step.name], step=label, done=steps.finished(step, output) is not None) for label, step in plan.items()
    ]


def check_resources(recipe: Recipe) -> None:
    """Hold the estimates of what is left to do against this machine, before anything is computed.

    Raises:
        ResourceError: a package is missing, or disk where the output goes, or memory here. Memory of a cluster that is
            joined is for its scheduler to judge.
    """
    left = [cost for cost in costs(recipe) if not cost.done]
    if any(step_and_domain(cost.step)[0] == "distill" for cost in left):
        _check_training(recipe)
    _check_disk(recipe.output, left)
    joined = recipe.compute.runner == "ray" and (recipe.compute.address or os.environ.get("RAY_ADDRESS"))
    most = max(left, key=lambda cost: cost.memory_bytes, default=None)
    available = available_memory()
    if most is not None and available is not None and not joined and most.memory_bytes > available:
        raise ResourceError(
            f"step '{most.step}' needs about {_gb(most.memory_bytes)} of memory; {_gb(available)} are available "
            "(`finescope plan`)"
        )


def _check_training(recipe: Recipe) -> None:
    check_trackers(recipe.compute.track)
    sharded = recipe.compute.runner == "ray" and recipe.distill.zero_stage > 0
    if sharded and importlib.util.find_spec("deepspeed") is None:
        raise ResourceError(
            "distill.zero_stage 1 to 3 needs DeepSpeed under the ray runner: pip install 'finescope[deepspeed]', or set it to 0"
        )


def _check_disk(output: str, left: list[Cost]) -> None:
    """What stays goes to the output; what a step puts by meanwhile too where that is a local disk, else to temporary files."""
    disk, scratch = sum(cost.disk_bytes for cost in left), max((cost.scratch_bytes for cost in left), default=0)
    place, needed, free = f"output: '{output}'", disk + scratch, storage.free_bytes(storage.absolute(output))
    if free is None:
        temporary = tempfile.gettempdir()
        place, needed, free = f"TMPDIR: '{temporary}'", scratch, storage.free_bytes(temporary)
    if free is not None and needed > free:
        raise ResourceError(f"{place} has {_gb(free)} free; the plan needs about {_gb(needed)} (`finescope plan`)")


def show(recipe: Recipe, as_json: bool, reporter: Reporter) -> None:
    """Print the plan on stdout, tell `reporter` what speaks against it, and hold it against the machine."""
    planned = costs(recipe)
    if as_json:
        print(json_.dumps([asdict(cost) for cost in planned], indent=2))  # noqa: T201
    else:
        table = Table("step", "state", "documents", "tokens", "FLOPs", "peak memory", "disk", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for cost in planned:
            state = "done" if cost.done else "to do"
            flops = f"{cost.flops:.1e}" if cost.flops else "-"
            disk = cost.disk_bytes + cost.scratch_bytes
            sizes = (f"{cost.documents:,}", f"{cost.tokens:,}", flops, _gb(cost.memory_bytes), _gb(disk))
            table.add_row(cost.step, state, *sizes)
        Console(width=100).print(table)
    for file in recipe.seeds.files:
        for caution in cautions_of(placed(recipe), file):
            reporter.warn(f"{file.domain}: {caution}" if file.domain else caution)
    check_resources(recipe)


def _corpus(recipe: Recipe, index: Manifest | None) -> Corpus:
    """Documents and their mean size: as `index` counted them where it is done, else an estimate."""
    corpus = placed(recipe).corpus
    if index is None:
        files = resolve(corpus)
        documents, text = estimate(files, shaped(corpus, recognise(corpus, files)))
    else:
        tables = [storage.read_parquet(path, ["num_rows", "bytes"]) for path in index.files("documents")]
        documents, text = (sum(sum(table.column(name).to_pylist()) for table in tables) for name in ("num_rows", "bytes"))
    return Corpus(min(documents, recipe.corpus.limit or documents), text / max(documents, 1))


def _teach_cost(recipe: Recipe, corpus: Corpus, model: Size) -> Cost:
    wanted = teacher_section(recipe.distill, recipe.model)
    if wanted is None:
        return teach_cost(recipe, corpus, model if recipe.distill.teacher == "self" else None, 0)
    source = resolve_model(wanted, KEY)
    teacher = size_of(load_meta_model(source, trust_remote_code=wanted.trust_remote_code), wanted.dtype)
    return teach_cost(recipe, corpus, teacher, teacher.weight_bytes if source.kind == "gguf" else 0)


def _passing(recipe: Recipe, corpus: Corpus, step: Step | None) -> int:
    """Documents that are embedded: those that passed the screen, or about as many as its `share` says. All of them where it has
    not run yet and `recall` decides."""
    done = steps.finished(step, storage.absolute(recipe.output)) if step is not None else None
    if done is not None:
        return int(done.facts["passed"])
    share = recipe.screen.share if recipe.screen is not None else None
    return corpus.documents if share is None else math.ceil(corpus.documents * min(1.0, share * len(recipe.seeds.files)))


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
