"""Code in a response: what a rewrite of it must hold too."""

import ast
import json
import re
import warnings

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|$)", re.DOTALL)
# Lines as programs of many languages have them and prose has not.
_CODE_LINE = re.compile(
    r"[;{}]\s*$|\)\s*:\s*$|^\s*[})\]]|^\s*</?[a-zA-Z!][^>]*>|^\s*(?:#include|#!/|import|from|def|class|function|public|private|const"
    r"|let|var|return|SELECT|FROM|WHERE|INSERT|UPDATE)\b(?=.*\W)|^\s*\w[\w.\[\]]*\s*[-+*/]?=[^=]|^\s*\w[\w.]*\([^)]*\)\s*$"
)
_STATEMENTS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.For, ast.While, ast.If)
_STATEMENTS += (ast.With, ast.Try)

_LATEX = re.compile(r"\\(?:boxed|begin|frac|dfrac|sqrt|text|left|cdot|times)\b")


def loses_code(original: str, rewrite: str) -> bool:
    """Whether the original has code, fenced or all of it, and the rewrite has none that would do in its place.

    Python must parse and have the names that the original defines and imports; JSON must parse to the same kind of thing; of
    another language it must look like code.
    """
    have = _blocks(rewrite)
    for block in _blocks(original):
        names = python_names(block)
        if names is not None:
            parsed = [found for found in map(python_names, have) if found is not None]
            if not parsed or not names <= frozenset().union(*parsed):
                return True
        elif (kind := _json_kind(block)) is not None:
            if kind not in map(_json_kind, have):
                return True
        elif looks_like_code(block) and not any(map(looks_like_code, have)):
            return True
    return False


def python_names(text: str) -> frozenset[str] | None:
    """The names that a Python program defines and imports; None where it is none, or no more than an expression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError is what the parser calls too deep a nesting
        return None
    lines = len(text.strip().splitlines())
    assigned = any(isinstance(node, ast.Assign | ast.AugAssign | ast.Call) for node in ast.walk(tree))
    if not any(isinstance(node, _STATEMENTS) for node in tree.body) and not (lines > 1 and assigned):
        return None
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = [alias.asname or alias.name for node in imports for alias in node.names]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    return frozenset(imported + defined)


def looks_like_code(text: str) -> bool:
    """Whether at least half of the lines, and two of them, are such as programs have; LaTeX ends its lines alike and is none."""
    if _LATEX.search(text):
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    code = sum(_CODE_LINE.search(line) is not None for line in lines)
    return code >= 2 and 2 * code >= len(lines)


def _blocks(text: str) -> list[str]:
    """What stands in fences; the whole text where there is no fence."""
    return _FENCE.findall(text) or [text.strip()]


def _json_kind(text: str) -> type | None:
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return type(json.loads(text))
    except (ValueError, RecursionError):
        return None
