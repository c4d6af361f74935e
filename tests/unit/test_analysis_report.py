import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import EVIL, build_run

from finescope import storage
from finescope.analysis.report import render, write_report

SECTIONS = ("result", "curated", "scores", "sae", "pruned", "distilled", "examples", "rejects", "time", "recipe")


class _Page(HTMLParser):
    """Tags, attributes and text as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("report") / "run")
    return render(output, build_run(output))


def test_every_section_is_there(html: str) -> None:
    ids = [value for name, value in _Page(html).attributes if name == "id"]
    assert [name for name in ids if name in SECTIONS] == list(SECTIONS)
    assert len(ids) == len(set(ids))


def test_text_of_the_corpus_is_text(html: str) -> None:
    page = _Page(html)
    assert (
        page.tags["script"] == page.tags["img"] == page.tags["em"] == page.tags["b"] - html.count("<b>") - html.count("<b ") == 0
    )
    for text in (EVIL, "<img src=x onerror=alert(2)>", "<script>alert(1)</script>", "Explain <em>this</em>", "<b>nothing</b>"):
        assert text in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in html


def test_the_page_loads_nothing(html: str) -> None:
    page = _Page(html)
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
    assert loads
    assert all(value.startswith("#") for value in loads)
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(value for name, value in page.attributes if name == "content" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none'")
    # References inside the charts meet their targets, though all charts number theirs from nought.
    ids = {value for name, value in page.attributes if name == "id"}
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= ids


def test_the_figures_are_there(html: str) -> None:
    page = _Page(html)
    for figure in (
        "134.5 M",
        "11.90",
        "+23 %",
        "17.30",
        "sympy",
        "90 %",
        "cut 0.4",
        "LlamaForCausalLM",
        "contradicts",
        "duplicate",
    ):
        assert figure in page.text, figure
    assert page.tags["svg"] == 1 + 4 + 1 + 3
    # The stylesheet's colours are what makes a chart readable in the dark.
    assert 'class="mark-text role-axis-label"' in html


@pytest.mark.parametrize(
    ("until", "sections"),
    [
        ("index", ("rejects", "time", "recipe")),
        ("sae", ("sae", "rejects", "time", "recipe")),
        ("prune", ("curated", "scores", "sae", "pruned", "examples", "rejects", "time", "recipe")),
    ],
)
def test_a_run_that_is_not_done_has_the_sections_of_what_is(tmp_path: Path, until: str, sections: tuple[str, ...]) -> None:
    page = _Page(render(str(tmp_path), build_run(str(tmp_path), until=until)))
    ids = [value for name, value in page.attributes if name == "id"]
    assert tuple(name for name in SECTIONS if name in ids) == sections
    assert {value[1:] for name, value in page.attributes if name == "href" and value[1:] in SECTIONS} == set(sections)


def test_without_control_and_without_sources(tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    uri = "memory://report/page.html"
    write_report(output, build_run(output, control=False, source=False), uri)
    page = _Page(storage.read_bytes(uri).decode())
    assert "random documents" not in page.text
    assert "17.30" not in page.text
    assert "The corpus has no column source" in page.text
