"""A corpus that every machine has: the documentation strings of installed Python packages.

Sources are read with `ast`; nothing is imported or run.
"""

import ast
import hashlib
import importlib.machinery
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from finescope.runners.base import Progress

DOCUMENTATION = pa.schema([("id", pa.string()), ("name", pa.string()), ("text", pa.string()), ("source", pa.string())])
STDLIB = "stdlib"

_MAX_SOURCE_BYTES = 1_000_000
_SKIPPED_DIRECTORIES = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "lib2to3"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class _Documentation:
    """One documentation string."""

    name: str  # qualified: package.module.Class.method
    text: str


def collect(
    packages: Mapping[str, int], seed: int, progress: Progress, min_chars: int = 200, max_chars: int = 4000
) -> tuple[pa.Table, list[str]]:
    """Documentation strings of `packages` (name to documents at most), and the packages that are not installed.

    Returns a table of DOCUMENTATION, by package in the order given, within one in an order drawn by `seed`; no text
    stands in it twice. Equal for equal installed versions, wherever they are installed. `stdlib` is Python's own.
    A package's files are parsed in the order drawn until there is half as much again as asked for.

    Args:
        progress: told of each package that is done.
        min_chars, max_chars: characters of a text, inclusive.
    """
    rows: list[dict[str, str]] = []
    missing: list[str] = []
    seen: set[str] = set()
    for package, limit in packages.items():
        root = _source_directory(package)
        if root is None:
            missing.append(package)
        else:
            found = _sample(root, package, limit, seed, (min_chars, max_chars), seen)
            seen.update(item.text for item in found)
            rows += [_row(item, package) for item in found]
        progress(1)
    return pa.Table.from_pylist(rows, schema=DOCUMENTATION), missing


def _row(item: _Documentation, package: str) -> dict[str, str]:
    # Overloads share a name, so that the id is of name and text.
    return {"id": _draw(f"{item.name}\0{item.text}", 0)[:16], "name": item.name, "text": item.text, "source": package}


def _source_directory(package: str) -> Path | None:
    """Where the sources of a top-level package lie; None: not installed, or not a package of Python files."""
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    # The path finder alone looks at files; importlib.util.find_spec would ask editable installs' import hooks too.
    spec = importlib.machinery.PathFinder.find_spec(package)
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(locations[0]) if locations else None


def _sample(root: Path, package: str, limit: int, seed: int, chars: tuple[int, int], seen: set[str]) -> list[_Documentation]:
    """At most `limit` of a package's documentation strings that are not in `seen`, in the order drawn."""
    prefix = "" if package == STDLIB else f"{package}."
    files = sorted(_source_files(root), key=lambda path: _draw(path.relative_to(root).as_posix(), seed))
    found: dict[str, _Documentation] = {}
    for path in files:
        if 2 * len(found) >= 3 * limit:
            break
        for item in _read_file(path, prefix + _module_name(path.relative_to(root))):
            if chars[0] <= len(item.text) <= chars[1] and item.text not in seen:
                found.setdefault(item.text, item)
    return sorted(found.values(), key=lambda item: _draw(item.name, seed))[:limit]


def _source_files(root: Path) -> Iterator[Path]:
    for directory, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _SKIPPED_DIRECTORIES]
        yield from (Path(directory, name) for name in names if name.endswith(".py") and not name.startswith("test_"))


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read_file(path: Path, module: str) -> Iterator[_Documentation]:
    """The documentation strings of a source file; none of one that this Python cannot parse or that is huge."""
    try:
        source = path.read_bytes()
        if len(source) > _MAX_SOURCE_BYTES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from _documentation_of(tree, module.rstrip("."))


def _documentation_of(node: ast.AST, name: str) -> Iterator[_Documentation]:
    if isinstance(node, _DOCUMENTED):
        raw = ast.get_docstring(node, clean=False)
        if raw is not None and _is_text(raw):
            yield _Documentation(name, inspect.cleandoc(raw).strip())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documentation_of(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _documentation_of(child, name)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: a literal may name half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _draw(name: str, seed: int) -> str:
    """A place in an order that looks random and is the same everywhere."""
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).hexdigest()
