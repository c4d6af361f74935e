"""The student's directory, written while its blocks are made."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from finescope.models.anatomy import Anatomy
from finescope.models.load import quiet

# Finished blocks are collected up to this before they become a file: a small student is one, as it is elsewhere.
SHARD_BYTES = 512 * 2**20


class StudentFiles:
    """A stock directory: it is given the blocks in their order; what is beside them is written last."""

    def __init__(self, student: PreTrainedModel, anatomy: Anatomy, directory: Path, shard_bytes: int) -> None:
        """`directory` is not there yet."""
        self._student, self._anatomy, self._directory, self._shard_bytes = student, anatomy, directory, shard_bytes
        self._shards: list[Path] = []
        self._collected: dict[str, Tensor] = {}
        directory.mkdir()

    def put(self, layer: int, block: nn.Module) -> None:
        """Take a finished block: its weights are the student's no longer."""
        self._collected |= {f"{self._anatomy.blocks}.{layer}.{name}": value for name, value in block.state_dict().items()}
        block.to("meta")
        if sum(value.nbytes for value in self._collected.values()) >= self._shard_bytes:
            self._shards.append(self._directory / f"{len(self._shards)}.safetensors")
            # Experts are stored one by one.
            stored = revert_weight_conversion(self._student, self._collected)
            save_file({name: value.contiguous() for name, value in stored.items()}, self._shards[-1], {"format": "pt"})
            self._collected = {}

    def finish(self) -> None:
        """Write what is left, with embeddings, norms and head (tied weights once), the configurations, and an index if needed."""
        blocks = f"{self._anatomy.blocks}."
        rest = {name: value for name, value in self._student.state_dict().items() if not name.startswith(blocks)}
        with quiet():
            self._student.save_pretrained(self._directory, state_dict=self._collected | rest, max_shard_size="1000TB")
        self._collected = {}
        if self._shards:
            self._number([*self._shards, self._directory / SAFE_WEIGHTS_NAME])

    def _number(self, shards: list[Path]) -> None:
        """Name the files by their number of how many, and write which tensor is in which."""
        places, size = {}, 0
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard.rename(self._directory / name)
            with safe_open(self._directory / name, framework="pt") as file:
                places |= dict.fromkeys(file.keys(), name)
            size += (self._directory / name).stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (self._directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
