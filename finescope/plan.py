"""What a run will cost, before it begins: documents, tokens, floating-point operations, peak memory, disk.

Estimates, from sizes alone: a forward pass of one token costs two operations a weight, a backward pass four.
"""

import importlib.util
import json as json_
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from finescope import steps, storage
from finescope.config import Recipe
from finescope.corpus.estimate import estimate
from finescope.corpus.files import resolve
from finescope.corpus.shapes import recognise, shaped
from finescope.curation.near_duplicates import SKETCH_BYTES
from finescope.curation.select import POOL, with_spare
from finescope.errors import ResourceError
from finescope.manifest import Manifest, step_and_domain
from finescope.models.load import load_meta_model
from finescope.models.size import Size, size_of
from finescope.models.source import resolve as resolve_model
from finescope.pipeline import placed, steps_of
from finescope.processes import available_memory
from finescope.pruning.cost import prune_cost
from finescope.rounds import rounds_of
from finescope.runners.base import Reporter
from finescope.stages.cautions import cautions_of
from finescope.stages.prune import BATCH_TOKENS
from finescope.steps import Step

# Bytes of text a token, for estimates before anything is tokenised.
_BYTES_PER_TOKEN = 4
# A process with torch and transformers in it, before any weight.
_PROCESS = 700_000_000
# An embedded document: locator and id, and what a kept latent takes after compression (id i32, value f16).
_ROW_BYTES, _LATENT_BYTES = 40, 5
# A row of `screened`, as measured.
_SCREENED_BYTES = 10


@dataclass(frozen=True)
class Cost:
    """What one step takes."""

    step: str
    documents: int
    tokens: int
    flops: float
    memory_bytes: int  # of the largest process
    disk_bytes: int
    done: bool = False
    scratch_bytes: int = 0  # on this machine, until the step is done


@dataclass(frozen=True)
class Corpus:
    """How much there is to read."""

    documents: int
    mean_bytes: float

    def tokens(self, most: int) -> int:
        """Tokens of a mean document, of which `most` are read."""
        return int(min(most, max(2.0, self.mean_bytes / _BYTES_PER_TOKEN)))


def costs(recipe: Recipe) -> list[Cost]:
    """The cost of each step; of the steps that each domain has, once a domain.

    Raises:
        CorpusError, ModelError: the corpus or the model cannot be used.
    """
    output = storage.absolute(recipe.output)
    plan = steps_of(recipe)
    corpus = _corpus(recipe, steps.finished(plan["index"], output))
    source = resolve_model(recipe.model)
    meta = load_meta_model(source, trust_remote_code=recipe.model.trust_remote_code)
    model = size_of(meta, recipe.model.dtype)
    copied = model.weight_bytes if source.kind == "gguf" else 0
    found = [
        Cost("index", corpus.documents, 0, 0.0, _PROCESS, 0),
        Cost("model", 0, 0, 0.0, _PROCESS + 2 * model.weight_bytes, copied),
        *_dictionary_costs(recipe, corpus, model, _passing(recipe, corpus, plan.get("screen"))),
        *_model_costs(recipe, corpus, model),
        *_round_costs(recipe, corpus, model, meta),
    ]
    of_step = {cost.step: cost for cost in found}
    return [
        replace(of_step[step.name], step=label, done=steps.finished(step, output) is not None) for label, step in plan.items()
    ]


def check_resources(recipe: Recipe) -> None:
    """Hold the estimates of what is left to do against this machine, before anything is computed.

    Raises:
        ResourceError: not enough disk where the output goes, or not enough memory here. Memory of a cluster that is
            joined is for its scheduler to judge.
    """
    left = [cost for cost in costs(recipe) if not cost.done]
    sharded = recipe.compute.runner == "ray" and recipe.distill.zero_stage > 0
    if (
        sharded
        and any(step_and_domain(cost.step)[0] == "distill" for cost in left)
        and importlib.util.find_spec("deepspeed") is None
    ):
        raise ResourceError(
            "distill.zero_stage 1 to 3 needs DeepSpeed under the ray runner: pip install 'finescope[deepspeed]', or set it to 0"
        )
    _check_disk(recipe.output, left)
    joined = recipe.compute.runner == "ray" and (recipe.compute.address or os.environ.get("RAY_ADDRESS"))
    most = max(left, key=lambda cost: cost.memory_bytes, default=None)
    available = available_memory()
    if most is not None and available is not None and not joined and most.memory_bytes > available:
        raise ResourceError(
            f"step '{most.step}' needs about {_gb(most.memory_bytes)} of memory; {_gb(available)} are available "
            "(`finescope plan`)"
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


def _passing(recipe: Recipe, corpus: Corpus, step: Step | None) -> int:
    """Documents that are embedded: those that passed the screen, or about as many as its `share` says. All of them where it has
    not run yet and `recall` decides."""
    done = steps.finished(step, storage.absolute(recipe.output)) if step is not None else None
    if done is not None:
        return int(done.facts["passed"])
    share = recipe.screen.share if recipe.screen is not None else None
    return corpus.documents if share is None else math.ceil(corpus.documents * min(1.0, share * len(recipe.seeds.files)))


def _dictionary_costs(recipe: Recipe, corpus: Corpus, model: Size, passing: int) -> list[Cost]:
    """`sae`, `screen`, `embed`, `score`, `curate`: what goes over the corpus with the first blocks and the dictionary."""
    sae, embed = recipe.sae, recipe.embed
    coordinates = model.d_model if sae.coordinates.method == "all" else min(sae.coordinates.count, model.d_model)
    dictionary = 2 * coordinates * sae.num_latents
    dictionaries = sae.dictionaries()
    in_training = sum(2 * coordinates * item.num_latents for item in dictionaries)
    layers = {item.layer for item in dictionaries}
    blocks, deepest = (model.block_parameters * layer / model.num_layers for layer in (sae.layer, max(layers)))
    weights, read = (int((part + model.embedding_parameters) * model.bytes_per_parameter) for part in (blocks, deepest))
    trained = 0 if sae.path else min(sae.num_tokens, corpus.documents * corpus.tokens(sae.max_tokens))
    tokens = corpus.tokens(embed.max_tokens)
    activations = 4 * coordinates * len(layers)  # bytes of one, at every layer
    buffer = min(int(sae.buffer_mib * 2**20), activations * trained)
    row = _ROW_BYTES + _LATENT_BYTES * embed.keep_latents
    flops, memory = 2.0 * blocks + dictionary, _PROCESS + weights + 4 * dictionary + 8 * embed.batch_tokens * sae.num_latents
    drawn = 0 if recipe.screen is None else min(recipe.screen.sample + recipe.screen.audit, corpus.documents)
    screened = corpus.documents * _SCREENED_BYTES + drawn * row
    # Of a training step: the encoder's product; what its active latents cost is little beside it (not of relu_l1 and jumprelu).
    sae_flops = trained * (2 * deepest + in_training * sae.epochs)
    return [
        # Weights, their gradient and two moments of Adam's, fp32; the activations of a step.
        Cost(
            "sae",
            0,
            trained,
            sae_flops,
            _PROCESS + read + buffer + 16 * in_training + 12 * sae.batch_tokens * sae.num_latents,
            # The dictionaries, two checkpoints of them with Adam's moments, and the activations where they are kept.
            28 * in_training + activations * trained * sae.cache,
        ),
        Cost("screen", corpus.documents, drawn * tokens, drawn * tokens * flops, memory, screened),
        Cost("embed", passing, passing * tokens, passing * tokens * flops, memory, passing * row),
        Cost("score", passing, 0, 0.0, _PROCESS, passing * _ROW_BYTES),
        _curate_cost(recipe, corpus),
    ]


def _curate_cost(recipe: Recipe, corpus: Corpus) -> Cost:
    """`curate`: what it keeps, and what it reads and puts by to choose from."""
    section, curated = recipe.curate, _curated(recipe, corpus)
    read = min(corpus.documents, with_spare(curated * POOL if section.diversity else curated))
    row = corpus.mean_bytes + SKETCH_BYTES * section.drops_near_duplicates
    return Cost("curate", curated, 0, 0.0, _PROCESS, int(curated * corpus.mean_bytes), scratch_bytes=int(read * row))


def _prune_cost(recipe: Recipe, corpus: Corpus, model: Size, meta: PreTrainedModel) -> Cost:
    """`prune`: one block of the model at a time."""
    documents, longest = min(recipe.prune.documents, _curated(recipe, corpus)), corpus.tokens(recipe.prune.max_tokens)
    tokens = documents * longest
    cost = prune_cost(meta, recipe.prune, model.bytes_per_parameter, tokens, longest, BATCH_TOKENS)
    student = int(model.weight_bytes * _kept(recipe, model))
    flops = cost.flops + cost.importance_flops * recipe.prune.general_documents / max(1, documents)
    return Cost("prune", documents, tokens, flops, _PROCESS + cost.memory_bytes, student, scratch_bytes=cost.scratch_bytes)


def _kept(recipe: Recipe, model: Size) -> float:
    """The share of all parameters that the student has."""
    return 1 - recipe.prune.ratio * model.block_parameters / model.num_parameters


def _model_costs(recipe: Recipe, corpus: Corpus, model: Size) -> list[Cost]:
    """`distill`, `evaluate`, `report`: what runs the whole model over few documents."""
    distill, evaluate = recipe.distill, recipe.evaluate
    curated, kept = _curated(recipe, corpus), _kept(recipe, model)
    rewritten = int(curated * distill.rewrite_share * distill.rewrite) * (
        min(distill.rewrite_tokens, corpus.tokens(distill.rewrite_tokens)) + corpus.tokens(distill.max_tokens)
    )
    trained = curated * distill.epochs * corpus.tokens(distill.max_tokens) * (1 + distill.control)
    operations = 4 if distill.method == "lora" else 6  # LoRA needs no gradient of the frozen weights
    training = int(model.num_parameters * kept) * (16 if distill.method == "full" else 4)
    sets = 2 * evaluate.documents * corpus.tokens(evaluate.max_tokens) * (3 + distill.control)
    head = 12 * min(distill.micro_batch_tokens, 1024) * model.vocab_size
    full = model.num_parameters
    student = int(model.weight_bytes * kept)
    students = student * (1 + distill.control)
    return [
        # Two checkpoints are kept; an adapter's are small beside the students.
        Cost(
            "distill",
            curated,
            rewritten + trained,
            2.0 * full * rewritten + operations * kept * full * trained,
            _PROCESS + training + head,
            students + (2 * training if distill.method == "full" else students // 4),
        ),
        Cost("evaluate", 2 * evaluate.documents, sets, 2.0 * full * sets, _PROCESS + model.weight_bytes + student + head, 0),
        Cost("report", 0, 0, 0.0, _PROCESS // 4, 1_000_000),
    ]


def _round_costs(recipe: Recipe, corpus: Corpus, model: Size, meta: PreTrainedModel) -> list[Cost]:
    """`prune` and `distill` of each round: those of a recipe of that round alone, which rewrites in the first. A later round is
    given a smaller model than is counted here."""
    found: list[Cost] = []
    for turn in rounds_of(recipe.prune, recipe.distill):
        training = turn.training.model_copy(update={"rewrite": turn.training.rewrite and turn.before is None})
        alone = recipe.model_copy(update={"prune": turn.pruning, "distill": training})
        distill, *_ = _model_costs(alone, corpus, model)
        found += [replace(_prune_cost(alone, corpus, model, meta), step=turn.prune), replace(distill, step=turn.distill)]
    return found


def _curated(recipe: Recipe, corpus: Corpus) -> int:
    """Documents that are kept at most; a threshold alone says nothing of how many reach it."""
    section, limits = recipe.curate, [corpus.documents]
    if section.documents is not None:
        limits.append(section.documents)
    if section.share is not None:
        limits.append(math.floor(section.share * corpus.documents + 1e-9))
    if section.tokens is not None:
        limits.append(int(section.tokens / corpus.tokens(recipe.embed.max_tokens)))
    return min(limits)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
