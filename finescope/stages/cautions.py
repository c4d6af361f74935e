"""What speaks against a recipe's pruning though it can be done: said by `plan`, by `prune`, and in the report."""

import re
from collections.abc import Sequence

from finescope.config import PruneSection, Recipe
from finescope.config_seeds import SeedFile
from finescope.corpus.documents import read_row_strings

# Above these ratios one shot, and whole blocks alone, take more than training gives back.
_ONE_SHOT, _BLOCKS_ALONE = 0.5, 0.4
# A set is of mathematics or code where this share of its texts looks like it.
_SHARE = 0.25
_SIGNS = re.compile(
    r"\d\s?[+*=^\u00d7\u00f7]\s?[\d(]"  # arithmetic: a digit, an operator, a digit. Not - and /, which dates and ranges have too
    r"|\d[a-z]\s?[=+]\s?-?\d|\b[a-z]\^\d"  # with a variable: 2x + 1, x^2. Not p = 0.05, which medicine writes
    r"|\\(?:frac|sqrt|sum|int|begin|left|cdot|times|mathbb|boxed)\b|\$[^$\n]*[\\^_=][^$\n]*\$"  # LaTeX
    r"|```"  # a fence of code
    r"|^\s*(?:def \w+\(|class \w+|return\b.|import \w+|from \w+ import|#include|(?:for|while|if)\s?\(.*\)\s*\{)"  # statements
    r"|\)\s*\{|\(\)\s*;|^\s*\}",  # braces and calls. Not a line that ends with a semicolon, as lists of statutes do
    re.MULTILINE,
)


def cautions_of(recipe: Recipe, seeds: SeedFile) -> list[str]:
    """What a person should know before one domain's `prune`, a sentence each.

    Raises:
        CorpusError: the seeds or the held-out sets cannot be read.
    """
    if not recipe.prune.removes_blocks:
        return cautions(recipe.prune, {})
    sets = {seeds.key: read_row_strings((seeds.path,), "jsonl", seeds.key)}
    if target := recipe.evaluate.target_of(seeds.domain):
        sets["evaluate.target"] = read_row_strings(target, "auto", "evaluate.target")
    return cautions(recipe.prune, sets)


def cautions(section: PruneSection, sets: dict[str, list[str]]) -> list[str]:
    """The same of texts by the recipe's key of their set; they count where whole blocks leave."""
    found: list[str] = []
    if section.ratio > _ONE_SHOT and section.rounds == 1:
        found.append(
            f"prune.ratio {section.ratio}: more than half of the blocks' parameters in one shot leave little to train; "
            "prune.rounds: 2 or more prunes and trains in turns"
        )
    if section.structure == ("blocks",) and section.ratio > _BLOCKS_ALONE:
        found.append(
            f"prune.ratio {section.ratio} of whole blocks alone: above {_BLOCKS_ALONE} little of the model is left to correct; "
            "prune.structure: [blocks, mlp] or auto loses less"
        )
    if section.removes_blocks:
        shares = {name: formal_share(texts) for name, texts in sets.items()}
        found += [
            f"prune.structure has blocks, and {share:.0%} of {name} look like mathematics or code: a model that loses whole "
            "blocks is known to lose these first; prune.structure: auto keeps all blocks"
            for name, share in shares.items()
            if share >= _SHARE
        ]
    return found


def formal_share(texts: Sequence[str]) -> float:
    """The share of texts with a sign of mathematics or code: arithmetic with digits, LaTeX, a fence or a statement of code."""
    return sum(_SIGNS.search(text) is not None for text in texts) / max(len(texts), 1)
