"""Steps of several domains: their names, and what one label takes over from another."""

import os
from pathlib import Path

import pytest
from test_steps import FIRST, Function, contents, killed

from finescope import steps, storage
from finescope.errors import UserError
from finescope.manifest import of_domain, read_run
from finescope.steps import Step


def test_steps_of_domains_have_names_of_their_own(tmp_path: Path):
    output, function = str(tmp_path), Function()
    first, law = Step("first", {"seeds": "a"}, domain="math"), Step("first", {"seeds": "b"}, domain="law")
    assert first.identity == Step("first", {"seeds": "a"}).identity
    for step in (first, law):
        done = steps.run(step, output, function)
        assert (done.step, done.domain, done.uri) == ("first", step.domain, storage.join(output, step.label))
    after = Step("after", {}, (law,), domain="law")
    steps.run(after, output, function)
    assert function.calls[-1]["first"].domain == "law", "inputs are named by what they are"
    assert list(read_run(output).steps) == ["first-math", "first-law", "after-law"]


def test_a_domain_takes_over_what_a_run_of_one_domain_did(tmp_path: Path):
    output, function = str(tmp_path), Function()
    alone, named = Step("first", {"seeds": "a"}), Step("first", {"seeds": "a"}, domain="math")
    done = steps.run(alone, output, function)
    assert steps.finished(named, output) == done
    steps.run(named, output, function)
    assert len(function.calls) == 1
    assert {label: state.path for label, state in read_run(output).steps.items()} == {"first-math": "first"}
    steps.run(alone, output, function)
    assert {label: state.path for label, state in read_run(output).steps.items()} == {"first": "first"}
    assert len(function.calls) == 1


def test_two_domains_with_the_same_seeds_share_what_is_done(tmp_path: Path):
    output, function = str(tmp_path), Function()
    for domain in ("math", "maths"):
        steps.run(Step("first", {"seeds": "a"}, domain=domain), output, function)
    assert len(function.calls) == 1
    assert {label: state.path for label, state in read_run(output).steps.items()} == {
        "first-math": "first-math",
        "first-maths": "first-math",
    }


def test_what_a_run_of_one_domain_left_is_no_domain_s(tmp_path: Path):
    names = ("index", "model", "sae", "embed", "score", "distill", "score-math")
    manifests = {}
    for label in names:
        name, _, domain = label.partition("-")
        manifests[label] = steps.run(Step(name, {"of": label}, domain=domain), str(tmp_path), Function())
    found = of_domain(manifests, "math")
    assert list(found) == ["index", "model", "sae", "embed", "score"]
    assert found["score"] is manifests["score-math"]
    assert list(of_domain(manifests, "")) == list(names[:-1])


def test_a_driver_at_work_under_another_label_is_not_disturbed(tmp_path: Path):
    killed(str(tmp_path), pid=os.getppid())
    before, function = contents(tmp_path), Function()
    with pytest.raises(UserError, match=rf"process {os.getppid()} is at work on step 'first'"):
        steps.run(Step(FIRST.name, FIRST.section, domain="math"), str(tmp_path), function)
    assert not function.calls
    assert contents(tmp_path) == before
