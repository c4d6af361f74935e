"""The recipe's section `sae`, the largest: part of `config`, from which it is imported."""

from typing import Literal

from pydantic import Field, model_validator

from finescope.section import Section, Seed, Share


class CoordinatesSection(Section):
    """Which coordinates of the activation the autoencoder sees (paper, section on top-K activation selection)."""

    method: Literal["jacobian", "magnitude", "variance", "pca", "random", "all"] = Field(
        default="all", description="jacobian is the paper's; pca: the leading principal directions instead of coordinates"
    )
    count: int = Field(default=128, ge=1, description="coordinates kept, of all methods but all (paper: 128 of 4,096)")
    probes: int = Field(default=2, ge=1, le=64, description="Jacobian-vector products a document (paper: 1, 2 or 4)")
    documents: int = Field(default=32, ge=1, description="documents of the reference sample D0")

    @model_validator(mode="after")
    def _a_choice_has_a_method(self) -> "CoordinatesSection":
        if "method" not in self.model_fields_set and (given := sorted(self.model_fields_set)):
            raise ValueError(f"{given[0]} says nothing without a method: expected method too, such as jacobian (the paper's)")
        return self


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
    learning_rate: float = Field(default=3e-3, gt=0.0, description="Adam's, peak (paper: 1e-5)")
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
