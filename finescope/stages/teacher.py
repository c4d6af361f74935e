"""Who teaches: the run's model itself, another model, or a server."""

from transformers import PreTrainedTokenizerBase

from finescope import storage
from finescope.config import DistillSection, ModelSection
from finescope.distillation.teachers import Server
from finescope.errors import ModelError, RecipeError
from finescope.models.anatomy import anatomy_of
from finescope.models.load import ModelReference, load_meta_model, load_tokenizer, materialise, source_tokenizer
from finescope.models.source import resolve
from finescope.stages.references import model_of
from finescope.steps import StepInput

KEY = "distill.teacher"
# What an attempt that was killed has pinned, and the weights of a GGUF file, below the step's directory.
_PINNED, _WEIGHTS = "teacher.json", "teacher"


def teacher_section(section: DistillSection, model: ModelSection) -> ModelSection | None:
    """Where a teacher is found that is neither the run's model nor a server: in the dtype of that `model`, and with as much
    permitted to it (pickles, remote code)."""
    if section.teacher == "self" or section.teacher_model is not None:
        return None
    return model.model_copy(update={"path": section.teacher, "revision": section.teacher_revision})


def check_teacher(section: DistillSection, model: ModelSection, reference: ModelReference) -> None:
    """See that the teacher is there and fits the student, before anything is computed. A server is not asked.

    Raises:
        ModelError: it is not found, refused, or of an unknown architecture.
        RecipeError: its log-probabilities are asked for, and its vocabulary is not that of the run's model.
    """
    if section.kl_weight and section.kl_top_k > reference.vocab_size:
        raise RecipeError(f"distill.kl_top_k: expected at most {reference.vocab_size}, the tokens of the model's vocabulary")
    wanted = teacher_section(section, model)
    if wanted is None:
        return
    source = resolve(wanted, KEY)
    anatomy_of(load_meta_model(source, trust_remote_code=wanted.trust_remote_code))
    tokenizer = source_tokenizer(source, wanted)
    if section.kl_weight:
        _check_vocabulary(section.teacher, tokenizer, load_tokenizer(reference))


def teacher_of(section: DistillSection, step: StepInput) -> ModelReference | Server:
    """The teacher, ready to be used. One that is a model of its own is pinned when the step first sees it, a hub's by its commit.

    Raises:
        ModelError: as `check_teacher`; or its files are others than when an earlier attempt began.
    """
    if section.teacher_model is not None:
        return Server(section.teacher, section.teacher_model)
    recorded = step["model"].section
    wanted = teacher_section(section, ModelSection.model_validate({key: recorded[key] for key in ModelSection.model_fields}))
    if wanted is None:
        return model_of(step["model"])
    pinned, source = storage.join(step.uri, _PINNED), resolve(wanted, KEY)
    if not storage.exists(pinned):
        found = materialise(source, wanted, storage.join(step.uri, _WEIGHTS))
        storage.put_json(pinned, found.model_dump(mode="json"))
    teacher = ModelReference.model_validate(storage.read_json(pinned))
    if teacher.revision is None and teacher.fingerprint != source.fingerprint:
        raise ModelError(f"{KEY} '{section.teacher}' has changed since it began to teach; remove '{step.uri}' to begin anew")
    return teacher


def _check_vocabulary(teacher: str, tokenizer: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    theirs, ours = tokenizer.get_vocab(), student.get_vocab()
    if theirs == ours:
        return
    differing = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))
    raise RecipeError(
        f"{KEY}: '{teacher}' has another vocabulary ({len(theirs)} tokens) than the model ({len(ours)}), first at id "
        f"{differing[1]}; with kl_weight a teacher with the same tokens is expected"
    )
