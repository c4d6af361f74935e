"""The section `distill`: what the teacher writes and says, and how the student is trained on it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from finescope.section import Section, Seed, Share

# What the teacher's part depends on; the rest is the training's, and may change without a word being written again.
_TEACHING = (
    *("teacher", "teacher_model", "teacher_revision", "rewrite", "rewrite_share", "rewrite_tokens", "rewrite_temperature"),
    *("rewrite_engine", "max_tokens", "data", "control", "seed"),
)
_TEACHING_LOGITS = ("kl_temperature", "kl_top_k")


class DistillSection(Section):
    """Rewriting by the teacher and training of the student (paper: rank 32, 5e-5, batch 128, 256 tokens)."""

    teacher: str = Field(
        default="self",
        min_length=1,
        description="self: the unpruned model; another as in model.path; or an OpenAI-compatible server: http(s)://HOST/v1",
    )
    teacher_model: str | None = Field(default=None, description="name of the model on that server")
    teacher_revision: str | None = Field(default=None, description="hub revision of a teacher that is not the model itself")
    rewrite: bool = True
    rewrite_share: Share = Field(default=1.0, description="share of the curated documents that the teacher rewrites, best first")
    rewrite_tokens: int = Field(default=256, ge=1, description="tokens of a rewritten response at most")
    rewrite_temperature: float = Field(
        default=0.0, ge=0.0, description="0: the most likely token; else sampled, from (seed, doc_id, position) alone"
    )
    rewrite_engine: Literal["auto", "transformers", "vllm"] = Field(
        default="auto", description="auto: vllm where it is installed and there is a GPU"
    )
    data: Literal["curated", "random"] = Field(default="curated", description="random: documents of the whole corpus")
    control: bool = Field(default=False, description="train a second student on as many tokens of random documents")
    max_tokens: int = Field(default=256, ge=2, description="tokens of an example")
    kl_weight: Share = Field(
        default=0.0,
        description="logit distillation: share of the loss that is the divergence from the teacher's next-token distribution; "
        "the rest is the cross-entropy",
    )
    kl_divergence: Literal["forward", "reverse", "jensen_shannon"] = Field(
        default="forward", description="forward: KL(teacher || student)"
    )
    kl_temperature: float = Field(default=1.0, gt=0.0, description="both distributions' logits are divided by it")
    kl_top_k: int = Field(
        default=32, ge=1, description="tokens of the teacher's distribution that are stored; the others are one"
    )
    method: Literal["lora", "full"] = "lora"
    rank: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=5.0e-5, gt=0.0)
    batch_size: int = Field(default=128, ge=1, description="documents an optimiser step, over all workers")
    micro_batch_tokens: int = Field(default=4096, ge=1, description="tokens of a forward pass, padding included")
    packing: bool = Field(
        default=True, description="several short examples in a row, none of which sees another; false: one a row, padded"
    )
    epochs: int = Field(default=3, ge=1)
    warmup_share: Share = 0.1
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed ZeRO stage under the ray runner; 0: no DeepSpeed")
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what DeepSpeed keeps in the CPU's memory; all: the weights too, at zero_stage 3"
    )
    held_out: int = Field(
        default=32, ge=0, description="examples that are not trained on, a tenth of all at most: the loss on them is watched"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="checkpoints without a lower loss on held_out after which the training ends, and the best one's weights are "
        "the result; null: all epochs, and the last weights",
    )
    checkpoint_steps: int = Field(default=20, ge=1, description="optimiser steps between two checkpoints")
    seed: Seed = 0

    @model_validator(mode="after")
    def _parts_fit(self) -> "DistillSection":
        served = self.teacher.startswith(("http://", "https://"))
        if served != (self.teacher_model is not None):
            raise ValueError("teacher_model: expected the name of a model where teacher is a server's URL, and only there")
        if served and self.kl_weight:
            raise ValueError("kl_weight: a server's log-probabilities cannot be had for text that it is given; expected 0")
        if self.teacher_revision is not None and (served or self.teacher == "self"):
            raise ValueError("teacher_revision: expected only with a teacher that is a model of its own")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload: expected a zero_stage of 1 to 3 with it")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("offload: all: expected a zero_stage of 3 with it")
        if self.patience is not None and self.held_out == 0:
            raise ValueError("patience: expected held_out examples to measure on")
        return self

    @property
    def teaching(self) -> dict[str, Any]:
        """What the step `teach` depends on, for its identity."""
        names = (*_TEACHING, *(_TEACHING_LOGITS if self.kl_weight else ()))
        return {**self.model_dump(mode="json", include=set(names)), "logits": self.kl_weight > 0}
