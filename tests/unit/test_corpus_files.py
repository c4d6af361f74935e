import logging
from pathlib import Path

import fsspec
import pytest
from corpus_files import jsonl, parquet, section, texts

from finescope.corpus.files import CorpusFile, common_directory, format_of, resolve
from finescope.errors import CorpusError, ResourceError


def relative_names(files: list[CorpusFile]) -> list[str]:
    return [file.info.path.removeprefix(common_directory(files)) for file in files]


def test_patterns_keep_their_order_and_files_come_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz"):
        jsonl(tmp_path / name, {"text": name})
    corpus = section([str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl*")])
    files = resolve(corpus)
    assert [Path(file.info.path).name for file in files] == ["b.jsonl", "a.jsonl", "c.jsonl.gz"]
    assert [file.compression for file in files] == [None, None, "gzip"]
    assert relative_names(files) == ["b.jsonl", "a.jsonl", "c.jsonl.gz"]


def test_directory_is_searched_and_its_readme_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parquet(tmp_path / "x" / "train.parquet", {"text": ["a"]})
    parquet(tmp_path / "y" / "train.parquet", {"text": ["b"]})
    (tmp_path / "README.md").write_text("about")
    with caplog.at_level(logging.WARNING):
        files = resolve(section(tmp_path))
    assert relative_names(files) == ["x/train.parquet", "y/train.parquet"]
    assert "README.md" in caplog.text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.PARQUET", ("parquet", None)),
        ("a.ndjson", ("jsonl", None)),
        ("a.jsonl.zst", ("jsonl", "zstd")),
        ("a.csv.gz", ("csv", "gzip")),
        ("s3://b/c.d/a.txt", ("txt", None)),
    ],
)
def test_format_follows_from_the_name(path: str, expected: tuple[str, str | None]) -> None:
    assert format_of(path, "auto") == expected


def test_format_of_the_recipe_overrules_the_name() -> None:
    assert format_of("a.json.gz", "jsonl") == ("jsonl", "gzip")


@pytest.mark.parametrize("name", ["a.json", "a.bin", "noextension", "a.gz", "a.parquet.gz"])
def test_unknown_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(CorpusError, match=name):
        resolve(section(tmp_path / name))


def test_what_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.path: no file matches '.*/none\*\.parquet'"):
        resolve(section(tmp_path / "none*.parquet"))
    (tmp_path / "only.md").write_text("x")
    with pytest.raises(CorpusError, match="extension"):
        resolve(section(tmp_path))
    with pytest.raises(ResourceError, match="nosuch"):
        resolve(section("nosuch://bucket/a.parquet"))


def test_memory_uris_are_read_and_ids_do_not_depend_on_the_place(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}).read_bytes()
    fsspec.filesystem("memory").pipe({"/corpus-files/deep/a.jsonl": data})
    assert texts(section("memory://corpus-files/deep/*.jsonl")) == texts(section(tmp_path)) == ["one", "two"]
    files = resolve(section("memory://corpus-files/deep"))
    assert relative_names(files) == relative_names(resolve(section(tmp_path))) == ["a.jsonl"]
    assert files[0].info.path.startswith("memory://")
