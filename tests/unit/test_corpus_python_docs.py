from pathlib import Path

import pytest

from finescope.corpus.python_docs import DOCUMENTATION, STDLIB, collect

LONG = "word " * 50


def _package(root: Path, name: str, files: dict[str, str]) -> None:
    for path, source in {"__init__.py": "", **files}.items():
        file = root / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)


def _collect(packages: dict[str, int], **settings: int) -> tuple[list[dict[str, str]], list[str]]:
    table, missing = collect(packages, 0, lambda _: None, **settings)
    assert table.schema.equals(DOCUMENTATION)
    return table.to_pylist(), missing


def test_every_kind_of_documentation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f'''"""Module.

    {LONG}"""
raise SystemExit("imported")
class Outer:
    """Outer. {LONG}"""
    async def method(self):
        """Method. {LONG}
            indented
                more
        """
    class Inner:
        """Inner. {LONG}"""
if True:
    def conditional():
        """Conditional. {LONG}"""
def short():
    """Too short."""
def broken():
    "\\ud800 {LONG}"
'''
    _package(tmp_path, "fine_docs", {"sub/mod.py": source, "bad.py": "def (", "tests/test_x.py": f'"""Test. {LONG}"""'})
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, missing = _collect({"fine_docs": 10, "no_such_package": 3})
    assert missing == ["no_such_package"]
    names = sorted(row["name"] for row in rows)
    prefix = "fine_docs.sub.mod"
    assert names == [prefix, f"{prefix}.Outer", f"{prefix}.Outer.Inner", f"{prefix}.Outer.method", f"{prefix}.conditional"]
    method = next(row for row in rows if row["name"].endswith("method"))
    assert method["text"] == f"Method. {LONG.strip()} \nindented\n    more"
    assert {row["source"] for row in rows} == {"fine_docs"}


def test_no_text_twice_and_no_more_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = "".join(f'def f{i}():\n    """Number {i}. {LONG}"""\n' for i in range(9))
    _package(tmp_path, "fine_one", {"a.py": functions, "b.py": functions})
    _package(tmp_path, "fine_two", {"a.py": functions, "b.py": f'"""Other. {LONG}"""'})
    monkeypatch.syspath_prepend(str(tmp_path))
    rows, _ = _collect({"fine_one": 100, "fine_two": 100})
    assert [row["source"] for row in rows].count("fine_two") == 1
    assert len({row["text"] for row in rows}) == len({row["id"] for row in rows}) == len(rows) == 10
    first, _ = _collect({"fine_one": 4})
    again, _ = _collect({"fine_one": 4})
    assert first == again
    assert len(first) == 4
    assert _collect({"fine_one": 100}, max_chars=200)[0] == []


def test_standard_library_is_there_on_every_machine() -> None:
    rows, missing = _collect({STDLIB: 20})
    assert len(rows) == 20
    assert missing == []
    assert all(200 <= len(row["text"]) <= 4000 for row in rows)
