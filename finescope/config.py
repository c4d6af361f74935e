"""The recipe: one frozen section per step, in pipeline order. All defaults are here and, for `sae`, `screen` and
`distill`, in modules of their own.

What changes a result lives in a step's section; what does not lives in `compute`, which moves no output.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from finescope.config_distill import DistillSection
from finescope.config_sae import SaeSection
from finescope.config_screen import ScreenSection
from finescope.config_seeds import Domain, SeedsSection
from finescope.section import Count, Section, Seed, Share

# What every run does, and with what only a recipe that asks for it does, in order.
STEPS = ("index", "model", "sae", "embed", "score", "curate", "teach", "prune", "distill", "evaluate", "report")
ALL_STEPS = (*STEPS[:3], "screen", *STEPS[3:])
# Documents that can be kept where they are chosen for diversity: among four times as many.
MOST_DIVERSE = 50_000


class ModelSection(Section):
    """The language model that is read, pruned and used as its own teacher."""

    path: str = Field(description="hub id, directory, FILE.gguf, or package:MODULE/FILE.gguf", min_length=1)
    revision: str | None = Field(default=None, description="hub revision; pinned to its commit when the run begins")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's on a GPU, float32 on a CPU"
    )
    trust_remote_code: bool = Field(default=False, description="run the Python code that a hub repository brings")
    allow_pickle: bool = Field(default=False, description="read weights from pickle files (.bin, .pt)")


class CorpusSection(Section):
    """Where the documents are and what their text is."""

    path: tuple[str, ...] = Field(
        description="globs and fsspec URIs: parquet, jsonl(.gz .zst), csv, txt; hf://datasets/OWNER/NAME; {output} is the run's",
        min_length=1,
    )
    format: Literal["auto", "parquet", "jsonl", "csv", "txt"] = Field(default="auto", description="auto: by file name")
    id: str | None = Field(default=None, description="column of unique ids; null: a hash of file, row group, row and text")
    text: str = Field(
        default="text",
        description="a column, or a template such as '{instruction}\\n{output}'; no column 'text': a known shape is recognised",
        min_length=1,
    )
    messages: str | None = Field(default=None, description="column of chat messages, rendered by the model's chat template")
    prompt: str | None = Field(default=None, description="column or template of the prompt that distillation trains on")
    response: str | None = Field(default=None, description="column or template of the response to that prompt")
    limit: int | None = Field(default=None, ge=1, description="documents read at most, in order of file and row")
    range_mib: float = Field(
        default=32.0, ge=1e-6, description="a JSONL file is cut into units of work of about so many MiB, at line ends"
    )
    max_characters: int = Field(default=200_000, ge=1, description="a longer document is rejected")
    max_reject_rate: Share = Field(default=0.01, description="a step that rejects a larger share of its rows fails")

    @field_validator("path", mode="before")
    @classmethod
    def _one_path_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _prompt_and_response_come_together(self) -> "CorpusSection":
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response are given together or not at all")
        return self


class EmbedSection(Section):
    """One pooled code a document."""

    max_tokens: int = Field(default=512, ge=2, description="tokens of a document that are read, counted from its start")
    pooling: Literal["mean", "max"] = "mean"
    keep_latents: int = Field(default=128, ge=1, description="largest latents of a document's code that are stored")
    batch_tokens: int = Field(
        default=4096, ge=1, description="tokens of a forward pass at most, padding included; on a CPU 1,024 at most"
    )


class ScoreSection(Section):
    """How a document's code is compared with the seeds'."""

    similarity: Literal["balanced", "max", "mean", "softmax"] = Field(
        default="balanced", description="over the seeds; balanced: like all of them, alike ones count less; max is the paper's"
    )
    temperature: float = Field(
        default=0.2, gt=0.0, description="of softmax, in units of the cosine: near zero it is max, far above one mean"
    )
    weighting: Literal["none", "idf", "centred", "decoded", "contrast"] = Field(
        default="decoded", description="what is compared; none is the paper's"
    )


class CurateSection(Section):
    """Which of the scored documents are kept. Limits hold together: the strictest ends the selection."""

    documents: int | None = Field(
        default=1000,
        ge=1,
        description="documents kept at most (paper: 100 a domain, 1,200 for code); no limit where share, tokens or threshold "
        "is given and this is not",
    )
    share: Share | None = Field(default=None, gt=0.0, description="of the corpus's documents that are kept at most")
    tokens: int | None = Field(
        default=None, ge=1, description="tokens of the kept documents at most, as embed counts them: embed.max_tokens a document"
    )
    threshold: float | None = Field(default=None, description="lowest score that is kept")
    per_seed: int | None = Field(default=None, ge=1, description="documents at most whose nearest seed is the same")
    deduplicate: Literal[True, False, "exact", "near"] = Field(
        default=True,
        description="the best ranked stays: of equal texts (exact: but for case and white space) and similar ones (near, true)",
    )
    duplicate_jaccard: float = Field(
        default=0.8, ge=0.3, le=1.0, description="near-duplicates are texts whose sets of shingles are so similar, or more"
    )
    duplicate_shingle: int = Field(default=5, ge=1, description="words and signs of a shingle")
    decontaminate: tuple[str, ...] = Field(default=(), description="evaluation sets; a 13-gram in common removes a document")
    diversity: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="lambda of greedy maximal marginal relevance: (1 - lambda) * score - lambda * similarity to the nearest "
        "kept, over the best 4 * documents that pass the filters",
    )

    @model_validator(mode="before")
    @classmethod
    def _another_limit_replaces_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "documents" in values:
            return values
        given = any(values.get(name) is not None for name in ("share", "tokens", "threshold"))
        return {**values, "documents": None} if given else values

    @model_validator(mode="after")
    def _something_limits_it(self) -> "CurateSection":
        if all(limit is None for limit in (self.documents, self.share, self.tokens, self.threshold)):
            raise ValueError("expected a limit: documents, share, tokens or threshold")
        if self.diversity and (self.documents is None or self.documents > MOST_DIVERSE):
            raise ValueError(f"diversity: expected documents of at most {MOST_DIVERSE:,}: its cost grows with their square")
        return self

    @property
    def drops_near_duplicates(self) -> bool:
        """Whether similar texts are dropped, and not only equal ones."""
        return self.deduplicate in (True, "near")


WithinBlocks = Literal["heads", "mlp", "experts"]
_WITHIN_BLOCKS: tuple[WithinBlocks, ...] = get_args(WithinBlocks)


class PruneSection(Section):
    """How much of the blocks is removed, and how it is chosen."""

    ratio: float = Field(default=0.35, ge=0.0, lt=1.0, description="share of the block parameters (embeddings not counted)")
    method: Literal["taylor", "taylor_second", "activation", "wifv", "magnitude", "random"] = Field(
        default="taylor", description="importance; taylor: LLM-Pruner, of first or second order; activation: Minitron; wifv: FLAP"
    )
    structure: Literal["auto"] | tuple[Literal["heads", "mlp", "experts", "blocks"], ...] = Field(
        default="auto",
        description="auto: all that the model's blocks have, split by estimated loss; blocks: whole ones leave first, as many as "
        "the ratio holds, and the others fill the rest",
    )
    rounds: int = Field(
        default=1, ge=1, description="rounds of pruning and training in turns, which reach the ratio in equal factors"
    )
    allocation: Literal["uniform"] = Field(default="uniform", description="the same sizes in every block")
    compensate: bool = Field(default=True, description="re-fit the kept output weights by ridge least squares")
    round_to: int = Field(default=32, ge=1, description="MLP channels kept are a multiple of this")
    documents: int = Field(default=512, ge=1, description="calibration documents, the best of the curated set")
    max_tokens: int = Field(default=256, ge=2, description="tokens of a calibration document")
    calibration: Literal["curated", "random"] = Field(default="curated", description="random: documents of the whole corpus")
    general_documents: int = Field(
        default=64, ge=0, description="random documents on which importance is computed again, to be compared; 0: it is not"
    )
    seed: Seed = 0

    @property
    def reads_documents(self) -> bool:
        """Whether an importance is computed that depends on the calibration documents."""
        return self.method not in ("magnitude", "random") and bool(self.within_blocks)

    @field_validator("structure")
    @classmethod
    def _names_a_structure(cls, value: Any) -> Any:
        if not value:
            raise ValueError("expected auto, or at least one of heads, mlp, experts and blocks")
        return value

    @property
    def removes_blocks(self) -> bool:
        """Whether whole blocks leave."""
        return "blocks" in self.structure

    @property
    def within_blocks(self) -> Literal["auto"] | tuple[WithinBlocks, ...]:
        """What leaves inside of the blocks that stay; empty: nothing."""
        named: tuple[WithinBlocks, ...] = tuple(kind for kind in _WITHIN_BLOCKS if kind in self.structure)
        return "auto" if self.structure == "auto" else named


class EvaluateSection(Section):
    """What base, pruned and recovered models are measured on."""

    tasks: tuple[Literal["perplexity"], ...] = ("perplexity",)
    target: tuple[str, ...] | dict[Domain, tuple[str, ...]] = Field(
        default=(), description="held-out documents of the domain, by domain where there are several; empty: the seeds"
    )
    general: tuple[str, ...] = Field(default=(), description="held-out documents of anything else; empty: random documents")
    documents: int = Field(default=128, ge=1, description="documents a set at most")
    max_tokens: int = Field(default=512, ge=2)
    batch_tokens: int = Field(default=4096, ge=1)

    def target_of(self, domain: str) -> tuple[str, ...]:
        """The held-out documents of one domain."""
        return self.target.get(domain, ()) if isinstance(self.target, dict) else self.target


class ComputeSection(Section):
    """Where it runs. Never changes a result, never moves an output."""

    runner: Literal["ray", "local"] = "ray"
    address: str | None = Field(default=None, description="Ray cluster; null: RAY_ADDRESS, else one is started here")
    actors: Literal["auto"] | Count = "auto"
    gpus_per_actor: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    cpus_per_actor: float = Field(default=1.0, gt=0.0)
    memory_per_actor_gb: float | None = Field(default=None, gt=0.0, description="asked of Ray's scheduler; null: estimated")
    train_workers: Literal["auto"] | Count = "auto"
    gradient_checkpointing: Literal["auto"] | bool = Field(
        default="auto", description="training recomputes each block's activations instead of keeping them; auto: on a GPU"
    )
    track: tuple[Literal["mlflow", "wandb", "tensorboard"], ...] = Field(
        default=(), description="where else training metrics go; needs finescope[track]"
    )


class Recipe(Section):
    """A whole run."""

    output: str = Field(description="any fsspec URI: local, s3://, gs://, abfs://, memory://", min_length=1)
    prepare: Literal["python-docs"] | None = Field(
        default=None, description="python-docs: first make OUTPUT/inputs from the documentation of the installed Python packages"
    )
    model: ModelSection
    corpus: CorpusSection
    seeds: SeedsSection
    sae: SaeSection = SaeSection()
    screen: ScreenSection | None = Field(
        default=None,
        description="{}: before embed, a cheap pass stops what cannot be among the best; keys: "
        + ", ".join(ScreenSection.model_fields),
    )
    embed: EmbedSection = EmbedSection()
    score: ScoreSection = ScoreSection()
    curate: CurateSection = CurateSection()
    prune: PruneSection = PruneSection()
    distill: DistillSection = DistillSection()
    evaluate: EvaluateSection = EvaluateSection()
    compute: ComputeSection = ComputeSection()

    @model_validator(mode="after")
    def _targets_are_of_domains(self) -> "Recipe":
        domains = [file.domain for file in self.seeds.files if file.domain]
        target = self.evaluate.target
        if isinstance(target, dict) and (unknown := [name for name in target if name not in domains]):
            known = ", ".join(domains) or "none, since seeds.path is of one domain"
            raise ValueError(f"evaluate.target: {unknown[0]} is no domain of seeds; domains: {known}")
        if domains and target and not isinstance(target, dict):
            raise ValueError(f"evaluate.target: expected files by domain, as seeds has several: {', '.join(domains)}")
        return self
