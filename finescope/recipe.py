"""Reading a recipe: YAML, overrides from the command line, and errors that say where and what was expected."""

import difflib
import types
import typing
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from finescope import storage
from finescope.config import Recipe
from finescope.errors import RecipeError


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as everybody writes it, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be plain text; quote a value that begins with a brace or a bracket"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `section.field=value` overrides applied.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, a value has the wrong type or is out of range.
    """
    try:
        text = storage.read_bytes(path).decode()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RecipeError(f"no recipe at '{path}'; `finescope init` writes one") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse(text, path, overrides)


def parse(text: str, origin: str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; `origin` names it in errors."""
    data = _yaml(text, origin)
    if not isinstance(data, dict):
        raise RecipeError(f"{origin}: a mapping of sections was expected, not {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise RecipeError(f"{origin}: " + "; ".join(lines)) from None


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{origin}:{where} cannot be read: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not YAML: {str(error).splitlines()[0]}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(f"--set {override}: expected section.field=value")
    place: Any = data
    for key in keys[:-1]:
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            raise RecipeError(f"--set {override}: '{key}' is not a section")
    place[keys[-1]] = _yaml(value, f"--set {path}")


def _explain(item: Any) -> str:
    """One line for one pydantic error: path, what was given, what was expected, the nearest key."""
    unknown = item["type"] == "extra_forbidden"
    location = tuple(part for part in item["loc"] if unknown or not _is_branch(part))
    path = ".".join(str(part) for part in location)
    if unknown:
        *parents, key = location
        fields = _fields_at(tuple(parents))
        near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(fields)}"
        return f"{path}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{path}: missing"
    if item["type"] == "model_type":
        return f"{path}: a mapping of keys was expected, got {item['input']!r}; known: {', '.join(_fields_at(location))}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _is_branch(part: Any) -> bool:
    """Whether pydantic put the name of a union's branch into an error's path."""
    return isinstance(part, str) and ("[" in part or part.startswith("constrained-"))


def _fields_at(path: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        model = _section_type(model.model_fields[str(part)].annotation)
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, types.UnionType):
        annotation = next(option for option in typing.get_args(annotation) if option is not type(None))
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation
