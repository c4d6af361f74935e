"""What each step costs, from sizes alone: a forward pass of one token is two operations a weight, a backward pass four."""

import math
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from finescope.config import Recipe
from finescope.curation.near_duplicates import SKETCH_BYTES
from finescope.curation.select import POOL, with_spare
from finescope.models.size import Size
from finescope.pruning.cost import prune_cost
from finescope.rounds import rounds_of
from finescope.stages.prune import BATCH_TOKENS

# Bytes of text a token, for estimates before anything is tokenised.
_BYTES_PER_TOKEN = 4
# A process with torch and transformers in it, before any weight.
PROCESS = 700_000_000
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


def dictionary_costs(recipe: Recipe, corpus: Corpus, model: Size, passing: int) -> list[Cost]:
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
    flops, memory = 2.0 * blocks + dictionary, PROCESS + weights + 4 * dictionary + 8 * embed.batch_tokens * sae.num_latents
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
            PROCESS + read + buffer + 16 * in_training + 12 * sae.batch_tokens * sae.num_latents,
            # The dictionaries, two checkpoints of them with Adam's moments, and the activations where they are kept.
            28 * in_training + activations * trained * sae.cache,
        ),
        Cost("screen", corpus.documents, drawn * tokens, drawn * tokens * flops, memory, screened),
        Cost("embed", passing, passing * tokens, passing * tokens * flops, memory, passing * row),
        Cost("score", passing, 0, 0.0, PROCESS, passing * _ROW_BYTES),
        _curate_cost(recipe, corpus),
    ]


def _curate_cost(recipe: Recipe, corpus: Corpus) -> Cost:
    """`curate`: what it keeps, and what it reads and puts by to choose from."""
    section, curated = recipe.curate, curated_documents(recipe, corpus)
    read = min(corpus.documents, with_spare(curated * POOL if section.diversity else curated))
    row = corpus.mean_bytes + SKETCH_BYTES * section.drops_near_duplicates
    return Cost("curate", curated, 0, 0.0, PROCESS, int(curated * corpus.mean_bytes), scratch_bytes=int(read * row))


def teach_cost(recipe: Recipe, corpus: Corpus, teacher: Size | None, copied: int) -> Cost:
    """`teach`: what is written is read in the same pass; with `kl_weight` all that is trained on is read once more.

    Args:
        teacher: None: a server, which computes elsewhere.
        copied: bytes of its weights that the step keeps, of a GGUF file.
    """
    section, documents = recipe.distill, curated_documents(recipe, corpus) * (1 + recipe.distill.control)
    longest, written = corpus.tokens(section.max_tokens), corpus.tokens(section.rewrite_tokens)
    rewritten = int(documents * section.rewrite_share * section.rewrite) * (longest + written)
    scored = documents * longest if section.kl_weight else 0
    weights, operations = (1.5 * teacher.weight_bytes, 2.0 * teacher.num_parameters) if teacher else (0, 0.0)
    texts = 2 * documents * corpus.mean_bytes  # the original and what is trained on
    return Cost(
        "teach",
        documents,
        rewritten + scored,
        operations * (rewritten + scored),
        PROCESS + max(int(weights), 2 * copied),
        int(texts) + copied + scored * (6 * section.kl_top_k + 2),
    )


def _prune_cost(recipe: Recipe, corpus: Corpus, model: Size, meta: PreTrainedModel) -> Cost:
    """`prune`: one block of the model at a time."""
    documents, longest = min(recipe.prune.documents, curated_documents(recipe, corpus)), corpus.tokens(recipe.prune.max_tokens)
    tokens = documents * longest
    cost = prune_cost(meta, recipe.prune, model.bytes_per_parameter, tokens, longest, BATCH_TOKENS)
    student = int(model.weight_bytes * _kept(recipe, model))
    flops = cost.flops + cost.importance_flops * recipe.prune.general_documents / max(1, documents)
    return Cost("prune", documents, tokens, flops, PROCESS + cost.memory_bytes, student, scratch_bytes=cost.scratch_bytes)


def _kept(recipe: Recipe, model: Size) -> float:
    """The share of all parameters that the student has."""
    return 1 - recipe.prune.ratio * model.block_parameters / model.num_parameters


def model_costs(recipe: Recipe, corpus: Corpus, model: Size) -> list[Cost]:
    """`distill`, `evaluate`, `report`: what runs the whole model over few documents."""
    distill, evaluate = recipe.distill, recipe.evaluate
    curated, kept = curated_documents(recipe, corpus), _kept(recipe, model)
    trained = curated * distill.epochs * corpus.tokens(distill.max_tokens) * (1 + distill.control)
    operations = 4 if distill.method == "lora" else 6  # LoRA needs no gradient of the frozen weights
    training = int(model.num_parameters * kept) * (16 if distill.method == "full" else 4)
    sets = 2 * evaluate.documents * corpus.tokens(evaluate.max_tokens) * (3 + distill.control)
    head = 12 * min(distill.micro_batch_tokens, 1024) * model.vocab_size
    full = model.num_parameters
    student = int(model.weight_bytes * kept)
    students = student * (1 + distill.control)
    return [
        # Two checkpoints are kept and the best one; an adapter's are small beside the students.
        Cost(
            "distill",
            curated,
            trained,
            operations * kept * full * trained,
            PROCESS + training + head,
            students + (3 * training if distill.method == "full" else students // 4),
        ),
        Cost("evaluate", 2 * evaluate.documents, sets, 2.0 * full * sets, PROCESS + model.weight_bytes + student + head, 0),
        Cost("report", 0, 0, 0.0, PROCESS // 4, 1_000_000),
    ]


def round_costs(recipe: Recipe, corpus: Corpus, model: Size, meta: PreTrainedModel) -> list[Cost]:
    """`prune` and `distill` of each round: those of a recipe of that round alone. A later round is given a smaller model than is
    counted here."""
    found: list[Cost] = []
    for turn in rounds_of(recipe.prune, recipe.distill):
        alone = recipe.model_copy(update={"prune": turn.pruning, "distill": turn.training})
        distill, *_ = model_costs(alone, corpus, model)
        found += [replace(_prune_cost(alone, corpus, model, meta), step=turn.prune), replace(distill, step=turn.distill)]
    return found


def curated_documents(recipe: Recipe, corpus: Corpus) -> int:
    """Documents that are kept at most; a threshold alone says nothing of how many reach it."""
    section, limits = recipe.curate, [corpus.documents]
    if section.documents is not None:
        limits.append(section.documents)
    if section.share is not None:
        limits.append(math.floor(section.share * corpus.documents + 1e-9))
    if section.tokens is not None:
        limits.append(int(section.tokens / corpus.tokens(recipe.embed.max_tokens)))
    return min(limits)
