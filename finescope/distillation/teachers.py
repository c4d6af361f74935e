"""The rewriter that a recipe asks for."""

import functools
import importlib.util

import torch

from finescope.config import DistillSection
from finescope.distillation.rewrite import Rewriter
from finescope.distillation.server_writer import Server, ServerWriter
from finescope.distillation.token_writer import Generator, TokenWriter, TransformersGenerator
from finescope.distillation.vllm_generator import VllmGenerator
from finescope.distillation.writer import Writer
from finescope.errors import ResourceError
from finescope.models.load import ModelReference, load_model, load_tokenizer

__all__ = ["Server", "rewriter_of"]


def rewriter_of(
    teacher: ModelReference | Server, tokenizer_of: ModelReference, section: DistillSection, batch_tokens: int
) -> Rewriter:
    """The rewriter for `section`. Its teacher is loaded when there is something to rewrite.

    Args:
        tokenizer_of: the model whose tokens the lengths in `section` are counted in.
        batch_tokens: cached positions of the documents that transformers writes together.

    Raises:
        ResourceError: `rewrite_engine` is vllm and vLLM or a GPU is not there.
    """
    writer = functools.partial(_writer, teacher, section, batch_tokens, _takes_vllm(section))
    return Rewriter(writer, load_tokenizer(tokenizer_of), section.rewrite_tokens)


def _writer(teacher: ModelReference | Server, section: DistillSection, batch_tokens: int, vllm: bool) -> Writer:
    temperature = section.rewrite_temperature
    if isinstance(teacher, Server):
        return ServerWriter(teacher, temperature, section.seed)
    tokenizer = load_tokenizer(teacher)
    generator: Generator
    if vllm:
        generator = VllmGenerator(teacher, temperature)
    else:
        generator = TransformersGenerator(load_model(teacher), tokenizer, temperature, batch_tokens)
    return TokenWriter(generator, tokenizer, section.seed)


def _takes_vllm(section: DistillSection) -> bool:
    if section.rewrite_engine == "transformers":
        return False
    there = importlib.util.find_spec("vllm") is not None and torch.cuda.is_available()
    if section.rewrite_engine == "vllm" and not there:
        raise ResourceError("distill.rewrite_engine: vllm needs a GPU and the extra: pip install 'finescope[vllm]'")
    return there
