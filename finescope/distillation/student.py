"""The student as it is trained (a module from tokens to loss) and as it is kept (a stock Hugging Face directory)."""

import functools
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from finescope.distillation.batches import IGNORED
from finescope.distillation.engine import Sums
from finescope.distillation.losses import ChunkedHead, Mixture, Teacher
from finescope.errors import ModelError
from finescope.models.anatomy import anatomy_of
from finescope.models.likelihood import check_logits, logit_cap

Method = Literal["lora", "full"]
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt")
_PREFIX = "causal."  # names in `Student` -> names in the language model


class Student(nn.Module):
    """A causal language model as a map from tokens to the loss, summed over the positions with a target."""

    def __init__(self, causal: PreTrainedModel, mixture: Mixture):
        super().__init__()
        check_logits(causal)
        self.causal = causal
        head = causal.get_output_embeddings()
        assert isinstance(head, nn.Linear), type(head)
        assert isinstance(head.weight, nn.Parameter)
        assert head.bias is None
        self.head = ChunkedHead(head.weight, mixture, logit_cap(causal))

    def forward(
        self, tokens: Tensor, targets: Tensor, positions: Tensor | None, ids: Tensor | None, logprobs: Tensor | None
    ) -> Sums:
        """tokens, targets, positions: [rows, length] int64, as `batches.collate` makes them; ids and logprobs: as of
        `losses.Teacher`, in the order of the targets, or None. Returns scalars, in nats."""
        # [rows, length, d_model]; examples of a row are told apart by positions that begin anew.
        hidden = self.causal.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        trained = targets != IGNORED
        teacher = Teacher(ids, logprobs) if ids is not None and logprobs is not None else None
        return self.head(hidden[trained], targets[trained], teacher)


def load_student(directory: Path, method: Method, rank: int, seed: int, mixture: Mixture, recompute: bool) -> Student:
    """The student of a local directory, ready to be trained: with adapters on all linear maps of its blocks, or whole.

    Frozen weights are bf16 on a GPU; trainable ones are fp32 everywhere. `recompute`: the activations of a block are not kept for
    the backward pass but made again (gradient checkpointing).
    """
    frozen_dtype = torch.bfloat16 if method == "lora" and torch.cuda.is_available() else torch.float32
    causal = _load(directory, frozen_dtype)
    if recompute:
        # Of the blocks themselves: the switch of transformers works in training mode only, see below.
        for block in causal.get_submodule(anatomy_of(causal).blocks).children():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if method == "lora":
        _add_adapter(causal, rank, seed)
    # No `train()`: it would only turn on a dropout that a checkpoint's config may carry, and distillation needs none.
    return Student(causal, mixture)


def save_student(directory: Path, weights: dict[str, Tensor], method: Method, rank: int, origin: str, target: Path) -> None:
    """Merge trained weights into the student of `directory` and write it beside its adapter, if it has one.

    `target`/model is a stock Hugging Face directory of the student's own dtype, with all that lay beside its weights
    (tokenizer, chat template, generation config); `target`/adapter is peft's and names `origin` as its base model.
    """
    causal = _load(directory, "auto")
    peft_model = _add_adapter(causal, rank, seed=0) if method == "lora" else None
    values = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    wrong = [name for name in values if name not in dict(causal.named_parameters())]
    assert not wrong, f"trained weights that the student does not have: {wrong[:3]}"
    causal.load_state_dict(values, strict=False)
    merged: Any = causal
    if peft_model is not None:
        peft_model.peft_config["default"].base_model_name_or_path = origin
        peft_model.save_pretrained(str(target / "adapter"))
        # peft's own card names a base model by a path of this machine.
        (target / "adapter" / "README.md").unlink(missing_ok=True)
        merged = peft_model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(target / "model"))
    for file in sorted(directory.iterdir()):
        kept = file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != "README.md"
        if kept and not (target / "model" / file.name).exists():
            shutil.copy2(file, target / "model" / file.name)


def _load(directory: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, report = loaded
    missing = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if missing:
        raise ModelError(f"the weights in '{directory}' do not fit its config: {', '.join(map(str, missing[:3]))}")
    return model


def _add_adapter(causal: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    # Adapters are put into `causal` itself; the PeftModel around it is needed to save and to merge.
    targets = list(anatomy_of(causal).block_linears)
    # alpha = rank: the product of the factors is added as it is.
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(causal, config)
    assert isinstance(model, PeftModel)
    return model
