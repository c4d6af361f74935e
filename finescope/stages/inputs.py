"""The small inputs of late steps, read once before the dear ones: a wrong seed must not cost a night."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from finescope.config import Recipe
from finescope.config_seeds import SeedFile
from finescope.corpus.documents import read_seeds, read_strings, read_texts
from finescope.corpus.tokenise import tokenise
from finescope.errors import CorpusError
from finescope.manifest import Manifest
from finescope.models.anatomy import anatomy_of
from finescope.models.depth import check_blocks_may_leave
from finescope.models.groups import kinds_of, layout_of
from finescope.models.load import load_meta_model, load_tokenizer
from finescope.stages.references import model_of
from finescope.stages.teacher import check_teacher
from finescope.steps import Step

# The first position is no part of a code (an attention sink), so that a text of one token has none.
_LEAST_TOKENS = 2


def check_inputs(recipe: Recipe, model: Manifest, left: Sequence[Step]) -> None:
    """Read the seeds, the evaluation sets and the held-out sets of the steps that are left to do; see what can be pruned, and
    that there is a teacher.

    Raises:
        RecipeError: `prune` is left, and the model cannot lose what `prune.structure` names; or `teach`, and the teacher's
            vocabulary is not the one that is needed.
        ModelError: `teach` is left, and the teacher is not found or refused.
        CorpusError: one of them is missing, empty or cannot be read; the message names file and line, or the seed.
    """
    reference = model_of(model)
    steps = {step.name for step in left}
    if "teach" in steps:
        check_teacher(recipe.distill, recipe.model, reference)
    if "prune" in steps:
        meta = load_meta_model(reference)
        layout = layout_of(meta, anatomy_of(meta))
        if recipe.prune.removes_blocks:
            check_blocks_may_leave(meta.config)
        if recipe.prune.within_blocks:
            kinds_of(layout, recipe.prune.within_blocks)
    tokenizer = load_tokenizer(reference)
    for seeds in recipe.seeds.files:
        if "screen" in steps or ("score", seeds.domain) in {(step.name, step.domain) for step in left}:
            _check_seeds(seeds, recipe, tokenizer)
    if "curate" in steps and recipe.curate.decontaminate:
        read_strings(recipe.curate.decontaminate)
    held_out = {recipe.evaluate.target_of(step.domain) for step in left if step.name == "evaluate"}
    for paths in sorted({*held_out, recipe.evaluate.general}) if held_out else ():
        if paths:
            read_texts(paths, recipe.corpus, tokenizer)


def _check_seeds(seeds: SeedFile, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = read_seeds(seeds, recipe.corpus, tokenizer)
    for number, tokens in enumerate(tokenise(tokenizer, texts, recipe.embed.max_tokens), start=1):
        if len(tokens) < _LEAST_TOKENS:
            found = f"{len(tokens)} token" if len(tokens) == 1 else f"{len(tokens)} tokens"
            raise CorpusError(f"{seeds.key}: {seeds.path}: seed {number} has {found}; at least {_LEAST_TOKENS} were expected")
