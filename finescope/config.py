"""The recipe: one frozen section per step, in pipeline order. This file alone holds the defaults.

What changes a result lives in a step's section; what does not lives in `compute`, which moves no output.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

STEPS = ("index", "model", "sae", "embed", "score", "curate", "prune", "distill", "evaluate", "report")
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown key, every number finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
        description="globs and fsspec URIs: parquet, jsonl(.gz .zst), csv, txt; {output} is the run's", min_length=1
    )
    format: Literal["auto", "parquet", "jsonl", "csv", "txt"] = Field(default="auto", description="auto: by file name")
    id: str | None = Field(default=None, description="column of unique ids; null: a hash of file, row group, row and text")
    text: str = Field(default="text", description="a column, or a template such as '{instruction}\\n{output}'", min_length=1)
    messages: str | None = Field(default=None, description="column of chat messages, rendered by the model's chat template")
    prompt: str | None = Field(default=None, description="column or template of the prompt that distillation trains on")
    response: str | None = Field(default=None, description="column or template of the response to that prompt")
    limit: int | None = Field(default=None, ge=1, description="documents read at most, in order of file and row")
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


class SeedsSection(Section):
    """The examples that say what the domain is."""

    path: str = Field(description="JSONL; rows like the corpus's, or rows with `text` alone", min_length=1)


class CoordinatesSection(Section):
    """Which coordinates of the activation the autoencoder sees (paper, section on top-K activation selection)."""

    method: Literal["jacobian", "magnitude", "variance", "pca", "random", "all"] = Field(
        default="jacobian", description="pca: the leading principal directions instead of coordinates"
    )
    count: int = Field(default=128, ge=1, description="coordinates kept (paper: 128 of 4,096)")
    probes: int = Field(default=2, ge=1, le=64, description="Jacobian-vector products a document (paper: 1, 2 or 4)")
    documents: int = Field(default=32, ge=1, description="documents of the reference sample D0")


class SaeVariant(Section):
    """Another dictionary trained in the same pass over the activations; null: as the first one."""

    layer: int | None = Field(default=None, ge=1)
    architecture: Literal["topk", "batch_topk", "jumprelu", "relu_l1"] | None = None
    num_latents: int | None = Field(default=None, ge=2)
    k: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0.0)
    seed: Seed | None = Field(default=None, description="another seed alone: how stable the latents are is measured")

    @property
    def name(self) -> str:
        """What it is called in files and tables: all that is different, such as `num_latents-16384-k-64`."""
        return "-".join(f"{key}-{value}" for key, value in self.model_dump(exclude_none=True).items())


class SaeSection(Section):
    """The sparse autoencoder."""

    layer: int = Field(default=16, ge=1, description="after, or in, this block (1-based)")
    site: Literal["residual", "attention", "mlp", "mlp_hidden"] = Field(
        default="residual", description="residual stream after the block; output of its attention or MLP; input of its down map"
    )
    coordinates: CoordinatesSection = CoordinatesSection()
    architecture: Literal["topk", "batch_topk", "jumprelu", "relu_l1"] = Field(
        default="topk", description="relu_l1 is the paper's objective"
    )
    num_latents: int = Field(default=4096, ge=2)
    k: int = Field(default=32, ge=1, description="active latents a token (topk), on the average (batch_topk)")
    l1_coefficient: float = Field(default=1e-3, ge=0.0, description="lambda of the paper's objective (relu_l1)")
    l0_coefficient: float = Field(default=1e-3, ge=0.0, description="weight of the number of active latents (jumprelu)")
    auxk_coefficient: float = Field(default=1 / 32, ge=0.0, description="alpha of the paper's objective")
    auxk: int | None = Field(
        default=None, ge=1, description="dead latents that reconstruct the residual error at a time; null: half the coordinates"
    )
    dead_after_tokens: int = Field(default=100_000, ge=1, description="a latent silent for so many tokens is dead")
    num_tokens: int = Field(default=2_000_000, ge=1, description="activations trained on, in all")
    max_tokens: int = Field(default=512, ge=2, description="tokens of a document that are read, counted from its start")
    batch_tokens: int = Field(default=2048, ge=1, description="activations a training step, over all workers")
    buffer_mib: float = Field(
        default=256.0, gt=0.0, description="memory of the shuffle buffer; a checkpoint is kept each time it is used up"
    )
    epochs: int = Field(default=1, ge=1, description="passes over each filled shuffle buffer")
    learning_rate: float = Field(default=2e-3, gt=0.0, description="Adam's, peak (paper: 1e-5)")
    warmup_share: Share = Field(default=0.05, description="of the training steps, in which the learning rate rises")
    decay_share: Share = Field(default=0.3, description="of the training steps, in which it falls to zero")
    workers: int = Field(default=1, ge=1, description="processes that train together, each on its share of a step's activations")
    variants: tuple[SaeVariant, ...] = Field(default=(), description="more dictionaries, trained in the same pass")
    recovery_documents: int = Field(
        default=32,
        ge=0,
        description="held-out documents on which the model's loss with the reconstruction spliced in is measured",
    )
    cache: bool = Field(default=False, description="keep the activations beside the run, for another training on them")
    seed: Seed = 0
    path: str | None = Field(
        default=None, description="a trained dictionary (finescope, SAELens or sparsify directory), used instead of training"
    )

    @model_validator(mode="after")
    def _sections_of_dictionaries_fit(self) -> "SaeSection":
        for number, section in enumerate((self, *self.variants)):
            k, num_latents = section.k or self.k, section.num_latents or self.num_latents
            if k > num_latents:
                where = f"variants.{number - 1}: " if number else ""
                raise ValueError(f"{where}k ({k}) is larger than num_latents ({num_latents})")
        names = [variant.name for variant in self.variants]
        if "" in names or len(set(names)) < len(names):
            raise ValueError("variants: each must differ from the main dictionary and from the others")
        return self

    def dictionaries(self) -> tuple["SaeSection", ...]:
        """The section of each dictionary, the main one first; those of variants have none of their own."""
        changes = [{}, *(variant.model_dump(exclude_none=True) for variant in self.variants)]
        return tuple(self.model_copy(update={"variants": (), **change}) for change in changes)


class EmbedSection(Section):
    """One pooled code a document."""

    max_tokens: int = Field(default=512, ge=2, description="tokens of a document that are read, counted from its start")
    pooling: Literal["mean", "max"] = "mean"
    keep_latents: int = Field(default=128, ge=1, description="largest latents of a document's code that are stored")
    batch_tokens: int = Field(default=4096, ge=1, description="tokens of a forward pass, padding included")


class ScoreSection(Section):
    """How a document's code is compared with the seeds'."""

    similarity: Literal["max", "mean"] = Field(default="max", description="over the seeds")
    weighting: Literal["none", "idf", "centred", "contrast"] = Field(default="centred", description="none is the paper's")


class CurateSection(Section):
    """Which of the scored documents are kept."""

    documents: int = Field(default=1000, ge=1, description="documents kept (paper: 100 a domain, 1,200 for code)")
    deduplicate: bool = Field(default=True, description="of equal texts (case and white space apart) the best ranked stays")
    decontaminate: tuple[str, ...] = Field(default=(), description="evaluation sets; a 13-gram in common removes a document")
    per_seed: int | None = Field(default=None, ge=1, description="documents at most whose nearest seed is the same")
    diversity: float = Field(default=0.0, ge=0.0, le=0.0, description="maximal marginal relevance; only 0.0 in this version")
    threshold: float | None = Field(default=None, description="lowest score that is kept")


class PruneSection(Section):
    """How much of the blocks is removed, and how it is chosen."""

    ratio: float = Field(default=0.35, ge=0.0, lt=1.0, description="share of the block parameters (embeddings not counted)")
    method: Literal["taylor", "magnitude", "random"] = "taylor"
    structure: Literal["auto"] | tuple[Literal["heads", "mlp"], ...] = Field(
        default="auto", description="auto: heads and mlp, split by estimated loss"
    )
    allocation: Literal["uniform"] = Field(default="uniform", description="the same sizes in every block")
    compensate: bool = Field(default=True, description="re-fit the kept output weights by ridge least squares")
    round_to: int = Field(default=32, ge=1, description="MLP channels kept are a multiple of this")
    documents: int = Field(default=256, ge=1, description="calibration documents, the best of the curated set")
    max_tokens: int = Field(default=256, ge=2, description="tokens of a calibration document")
    calibration: Literal["curated", "random"] = Field(default="curated", description="random: documents of the whole corpus")
    seed: Seed = 0

    @field_validator("structure")
    @classmethod
    def _names_a_structure(cls, value: Any) -> Any:
        if not value:
            raise ValueError("expected auto, or at least one of heads and mlp")
        return value


class DistillSection(Section):
    """Rewriting by the teacher and training of the student (paper: rank 32, 5e-5, batch 128, 256 tokens)."""

    teacher: Literal["self"] = "self"
    rewrite: bool = True
    rewrite_share: Share = Field(default=1.0, description="share of the curated documents that the teacher rewrites, best first")
    rewrite_tokens: int = Field(default=256, ge=1, description="tokens of a rewritten response at most")
    method: Literal["lora", "full"] = "lora"
    rank: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=5.0e-5, gt=0.0)
    batch_size: int = Field(default=128, ge=1, description="documents an optimiser step, over all workers")
    micro_batch_tokens: int = Field(default=4096, ge=1, description="tokens of a forward pass, padding included")
    max_tokens: int = Field(default=256, ge=2, description="tokens of an example")
    epochs: int = Field(default=3, ge=1)
    warmup_share: Share = 0.1
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed ZeRO stage under the ray runner; 0: no DeepSpeed")
    kl_weight: float = Field(default=0.0, ge=0.0, le=0.0, description="logit distillation; only 0.0 in this version")
    data: Literal["curated", "random"] = Field(default="curated", description="random: documents of the whole corpus")
    control: bool = Field(default=False, description="train a second student on as many tokens of random documents")
    checkpoint_steps: int = Field(default=20, ge=1, description="optimiser steps between two checkpoints")
    seed: Seed = 0


class EvaluateSection(Section):
    """What base, pruned and recovered models are measured on."""

    tasks: tuple[Literal["perplexity"], ...] = ("perplexity",)
    target: tuple[str, ...] = Field(default=(), description="held-out documents of the domain; empty: the seeds")
    general: tuple[str, ...] = Field(default=(), description="held-out documents of anything else; empty: random documents")
    documents: int = Field(default=128, ge=1, description="documents a set at most")
    max_tokens: int = Field(default=512, ge=2)
    batch_tokens: int = Field(default=4096, ge=1)


class ComputeSection(Section):
    """Where it runs. Never changes a result, never moves an output."""

    runner: Literal["ray", "local"] = "ray"
    address: str | None = Field(default=None, description="Ray cluster; null: RAY_ADDRESS, else one is started here")
    actors: Literal["auto"] | Count = "auto"
    gpus_per_actor: Literal["auto"] | Annotated[float, Field(ge=0.0)] = "auto"
    cpus_per_actor: float = Field(default=1.0, gt=0.0)
    memory_per_actor_gb: float | None = Field(default=None, gt=0.0, description="asked of Ray's scheduler; null: estimated")
    train_workers: Literal["auto"] | Count = "auto"


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
    embed: EmbedSection = EmbedSection()
    score: ScoreSection = ScoreSection()
    curate: CurateSection = CurateSection()
    prune: PruneSection = PruneSection()
    distill: DistillSection = DistillSection()
    evaluate: EvaluateSection = EvaluateSection()
    compute: ComputeSection = ComputeSection()
