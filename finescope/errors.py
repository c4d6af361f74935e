"""Errors that a user can act on. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """The user's input is wrong (exit code 2). The message says which file or field and what was expected."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe cannot be used: unknown key, wrong type, out of range."""


class CorpusError(UserError):
    """The corpus or the seeds cannot be used: no file, no such column, duplicate ids, a file that changed."""


class ModelError(UserError):
    """The model cannot be used: not found, unknown architecture, weights that are refused."""


class DictionaryError(ModelError):
    """The dictionary cannot be used: not found, a layout or an architecture that is not known, weights that do not fit."""


class ResourceError(UserError):
    """The machine cannot hold what the plan needs: disk, memory, a missing extra."""


class StepFailed(Exception):
    """A step ran and failed (exit code 1). `log_path` is where the traceback is kept, once it is."""

    exit_code = 1
    log_path: str | None = None
