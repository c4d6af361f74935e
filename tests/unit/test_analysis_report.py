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


def test_rounds_blocks_and_cautions_are_told_of(tmp_path: Path) -> None:
    manifests = build_run(str(tmp_path / "run"))
    last = manifests["prune"]
    blocks = {"removed": [2, 5], "losses": [1.5, 1.75, 2.25], "tokens": 4000}
    facts = {**last.facts, "ratio_reached": 0.36, "parameters_after": 700, "cautions": ["mind <this>"], "blocks": blocks}
    first = last.model_copy(update={"step": "prune-1", "facts": {**last.facts, "ratio_reached": 0.2, "parameters_after": 800}})
    of_input = {"of_input": {"ratio_reached": 0.19}}
    both = {**manifests, "prune-1": first, "prune": last.model_copy(update={"facts": {**facts, **of_input}})}
    page = _Page(render("run", both)).text
    assert "Mind: mind <this>." in page
    assert "Blocks that left, by the loss on 4,000 tokens: 2, 5. It rose from 1.500 to 2.250 nats a token" in page
    # Cells without what is between them: step, parameters after, removed of the input and of the base.
    assert "prune-180020 %20 %prune70019 %36 %" in page
    alone = _Page(render("run", manifests)).text
    assert not any(words in alone for words in ("Mind:", "Blocks that left", "removed of its input"))


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
        "0.93",
        "in general text",
        "512 tokens and 16 more",
        "contradicts",
        "duplicate",
    ):
        assert figure in page.text, figure
    assert page.tags["svg"] == 1 + (2 + 4) + 2 + 3
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
    assert "tokens of random documents" not in page.text
    assert "17.30" not in page.text
    assert "The corpus has no column source" in page.text


def _sae(tmp_path: Path, kind: str) -> str:
    html = render(str(tmp_path), build_run(str(tmp_path), until="sae", sae=kind))
    return html[html.index('<h2 id="sae">') : html.index('<h2 id="rejects">')]


def _rows(html: str) -> dict[str, list[str]]:
    """Cells of each row of the section's table, by its first one."""
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return {row[0]: row[1:] for row in rows}


def test_metrics_of_every_dictionary(tmp_path: Path) -> None:
    html = _sae(tmp_path, "trained")
    rows = _rows(html)
    assert rows["over the whole measured set"] == ["main", "wide"]
    # The last value of each name, not the last of the curve (0.22).
    assert rows["fraction of variance unexplained"] == ["0.2345", "0.1987"]
    assert rows["active latents a token (L0)"] == ["32.0", "31.6"]
    assert rows["dead latents: active on no token of the set"] == ["10.0 %", "10.0 %"]
    assert rows["dense latents: active on more than 10 % of the tokens"] == ["1.2 %", "0.6 %"]
    assert rows["cross-entropy with the reconstruction spliced in"] == ["3.037", "-"]
    assert rows["cross-entropy recovered: (zeros - reconstruction) / (zeros - model)"] == ["98.5 %", "-"]
    assert rows["latents that another seed found as well: largest cosine above 0.7"] == ["-", "51.2 %"]
    assert html.count("<svg") == 2 + 4
    text = _Page(html).text
    for title in ("main: 4,096 latents, 410 dead", "wide: 8,192 latents, 820 dead"):
        assert title in text
    assert "fvu" not in text, "what the table says is not said again among the facts"


def test_curves_end_with_the_training(tmp_path: Path) -> None:
    # What is measured at the end goes by the same names as the curves; as a 41st point it would stand at step 41 of 400.
    lines = re.findall(r'aria-roledescription="line mark" d="M([^"]*)"', _sae(tmp_path, "trained"))
    assert [line.count("L") + 1 for line in lines] == [40] * 8


def test_a_given_dictionary_has_metrics_and_no_curves(tmp_path: Path) -> None:
    html = _sae(tmp_path, "adopted")
    assert _rows(html)["fraction of variance unexplained"] == ["0.2345"]
    assert html.count("<svg") == 1
    assert "In training" not in html
    text = _Page(html).text
    assert "given<i>" in text
    assert "fvu recorded" in text


def test_a_run_from_before_there_were_latents_has_its_facts_and_curves(tmp_path: Path) -> None:
    html = _sae(tmp_path, "old")
    assert "<table>" not in html
    assert html.count("<svg") == 4
    assert "0.21" in _Page(html).text
