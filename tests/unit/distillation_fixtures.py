"""A tiny chat model and its tokenizer, made from nothing in milliseconds."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finescope.config import DistillSection
from finescope.distillation.examples import Example

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; 0 is <pad>, 1 is <s>, 2 is </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def tiny_llama(tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def student_directory(path: Path, dtype: torch.dtype = torch.float32) -> str:
    """A stock directory: model, generation config, tokenizer."""
    tiny_llama().to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def random_examples(count: int, seed: int = 0) -> tuple[Example, ...]:
    """Lengths 4..31, a third of them with a prompt."""
    generator = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(generator.integers(4, 32))
        start = 1 if index % 3 else length // 2
        examples.append(Example(generator.integers(3, 259, length).astype(np.int32), start))
    return tuple(examples)


def distill_section(**changes: object) -> DistillSection:
    """Small: 12 examples in batches of 4, 2 epochs, so 6 steps; a checkpoint every second."""
    values = {
        "method": "lora",
        "rank": 4,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "micro_batch_tokens": 48,
        "max_tokens": 32,
        "epochs": 2,
        "checkpoint_steps": 2,
        "zero_stage": 0,
        "held_out": 0,
    }
    return DistillSection.model_validate({**values, **changes})
