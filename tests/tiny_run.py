"""A whole run in seconds: a random model with a tokenizer of its own, a corpus of two kinds of sentences, a recipe."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finescope.config import Recipe

MATHS = ["sum", "product", "integer", "prime", "divide", "root", "square", "equation", "angle", "proof", "number", "even"]
COOKING = ["salt", "onion", "butter", "roast", "oven", "slice", "garlic", "soup", "taste", "flour", "boil", "pan"]
COMMON = ["the", "a", "of", "and", "is", "with", "then", "we", "find", "add", "take", "until"]
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def sentence(words: list[str], random: np.random.Generator, length: int = 18) -> str:
    """Words of one kind between common ones."""
    return " ".join(random.choice(words if random.random() < 0.6 else COMMON) for _ in range(length))


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """A quarter maths, the rest cooking; columns id, text, source."""
    random = np.random.default_rng(seed)
    kinds = ["maths" if index % 4 == 0 else "cooking" for index in range(count)]
    words = {"maths": MATHS, "cooking": COOKING}
    return [{"id": f"d{seed}-{i:04d}", "text": sentence(words[kind], random), "source": kind} for i, kind in enumerate(kinds)]


def write_model(directory: Path, seed: int = 0) -> Path:
    """A Llama of 3 blocks with large random weights and a word-level tokenizer with a chat template."""
    words = ["<unk>", "<pad>", "<eos>", "<|user|>", "<|assistant|>", *COMMON, *MATHS, *COOKING]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = _TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words),
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_inputs(root: Path, documents: int = 200, files: int = 2, rows_per_group: int = 25) -> Path:
    """The model, the corpus (Parquet), seeds and held-out sets below `root`."""
    write_model(root / "model")
    (root / "corpus").mkdir(parents=True)
    corpus = rows(documents)
    size = -(-documents // files)
    for number in range(files):
        table = pa.Table.from_pylist(corpus[number * size : (number + 1) * size])
        pq.write_table(table, root / "corpus" / f"part-{number}.parquet", row_group_size=rows_per_group)
    random = np.random.default_rng(99)
    for name, words, count in (("seeds", MATHS, 4), ("target", MATHS, 6), ("general", COOKING, 6)):
        lines = [json.dumps({"text": sentence(words, random)}) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def recipe_values(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The values of a small recipe on `write_inputs`; `changes` are sections that replace keys of these."""
    values: dict[str, Any] = {
        "output": str(root / "runs" / name),
        "model": {"path": str(root / "model"), "dtype": changes.pop("dtype", "float32")},
        "corpus": {"path": [str(root / "corpus" / "*.parquet")], "id": "id", "text": "text"},
        "seeds": {"path": str(root / "seeds.jsonl")},
        "sae": {
            "layer": 2,
            "coordinates": {"method": "jacobian", "count": 24, "documents": 8, "probes": 2},
            "num_latents": 64,
            "k": 8,
            "num_tokens": 2000,
            "batch_tokens": 128,
            "buffer_mib": 0.03,
            "recovery_documents": 8,
            "epochs": 4,
            "learning_rate": 3e-3,
            "auxk": 16,
        },
        "embed": {"max_tokens": 32, "keep_latents": 32, "batch_tokens": 256},
        "curate": {"documents": 24},
        "prune": {"ratio": 0.25, "round_to": 8, "documents": 16, "max_tokens": 32},
        "distill": {
            "rewrite_share": 0.25,
            "rewrite_tokens": 24,
            "rank": 4,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "micro_batch_tokens": 128,
            "max_tokens": 32,
            "epochs": 2,
            "zero_stage": 0,
            "control": True,
            "checkpoint_steps": 1,
        },
        "evaluate": {
            "target": [str(root / "target.jsonl")],
            "general": [str(root / "general.jsonl")],
            "max_tokens": 32,
            "batch_tokens": 256,
        },
        "compute": {"runner": "local"},
    }
    for section, keys in changes.items():
        values[section] = {**values[section], **keys}
    return values


def tiny_recipe(root: Path, name: str, **changes: Any) -> Recipe:
    """`recipe_values` as a recipe."""
    return Recipe.model_validate(recipe_values(root, name, **changes))
