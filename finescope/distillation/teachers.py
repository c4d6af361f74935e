"""Who rewrites: the model of the run, another one, or a server."""

from dataclasses import dataclass

from finescope.config import DistillSection
from finescope.distillation.rewrite import Rewriter
from finescope.models.load import ModelReference, load_model, load_tokenizer


@dataclass(frozen=True)
class Server:
    """A model that is reached by OpenAI's protocol."""

    url: str
    model: str


def rewriter_of(
    teacher: ModelReference | Server, tokenizer_of: ModelReference, section: DistillSection, batch_tokens: int
) -> Rewriter:
    """What rewrites documents. `tokenizer_of` counts tokens for a teacher that has no tokenizer here."""
    assert isinstance(teacher, ModelReference), f"tokens of {tokenizer_of.path} cannot be sent"
    return Rewriter(load_model(teacher), load_tokenizer(teacher), section.rewrite_tokens, batch_tokens)
