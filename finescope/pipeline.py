"""The whole method on one page: which step builds on which, what it does, and a run of them all."""

import contextlib
import hashlib
import itertools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from finescope import manifest, steps, storage
from finescope.config import Recipe, Section
from finescope.config_seeds import SeedFile
from finescope.errors import RecipeError, StepFailed, UserError
from finescope.manifest import Manifest, label_of
from finescope.rounds import Round, rounds_of
from finescope.runners.base import Context, Reporter, Runner
from finescope.steps import Outcome, Step, StepInput

_PATHS = {"corpus": ["path"], "seeds": ["path"], "curate": ["decontaminate"], "evaluate": ["target", "general"]}


def steps_of(recipe: Recipe) -> dict[str, Step]:
    """The steps of a recipe by label, in order. Pure data: nothing is loaded, only small input files are hashed.

    What comes before `score` is shared by all domains; from there on each has its own, and all of them do a step before
    any does the next. With a screen all of it but `index`, `model` and `sae` depends on the seeds of every domain.
    """
    inputs = placed(recipe)
    corpus = _values(recipe.corpus)
    # How many rejects are put up with changes no result: who allows more of them goes on with what is done.
    index = Step("index", {key: value for key, value in corpus.items() if key != "max_reject_rate"})
    model = Step("model", {**_values(recipe.model), "layer": recipe.sae.layer})
    # Nor does keeping the activations.
    sae = Step("sae", {key: value for key, value in _values(recipe.sae).items() if key != "cache"}, (index, model))
    if recipe.screen is None:
        embed = Step("embed", _values(recipe.embed), (index, model, sae))
        shared = (index, model, sae, embed)
    else:
        screen = Step("screen", _screening(inputs, recipe), (index, model, sae))
        embed = Step("embed", _values(recipe.embed), (index, model, sae, screen))
        shared = (index, model, sae, screen, embed)
    domains = [_domain_steps(inputs, recipe, seeds, shared) for seeds in inputs.seeds.files]
    return {step.label: step for step in (*shared, *(step for same in zip(*domains, strict=True) for step in same))}


def _screening(inputs: Recipe, recipe: Recipe) -> dict[str, Any]:
    """The section of the screen: how the seeds' likeness is measured is part of it; which domain is called what is not."""
    assert recipe.screen is not None
    of_others = {"score": _values(recipe.score), "embed": _values(recipe.embed)}
    return {**_values(recipe.screen), **of_others, "seeds": sorted(_contents(file.path) for file in inputs.seeds.files)}


def _domain_steps(inputs: Recipe, recipe: Recipe, file: SeedFile, shared: tuple[Step, ...]) -> tuple[Step, ...]:
    """`score` to `report` of one domain. Nothing in them tells of other domains: one more leaves these as they are.

    `teach` builds on no student, nor `prune` on what was rewritten: either is done again without the other.
    """
    index, model, _, *drawn_from = shared  # embed, and the screen that it depends on
    seeds = _contents(file.path)

    def step(name: str, section: dict[str, Any], *builds_on: Step) -> Step:
        return Step(name, section, builds_on, domain=file.domain)

    score = step("score", {**_values(recipe.score), "seeds": seeds}, *shared)
    evaluations = [_contents(path) for path in inputs.curate.decontaminate]
    curate = step("curate", {**_values(recipe.curate), "evaluations": evaluations}, *shared, score)
    given = (index, model, *drawn_from, curate)
    teach = step("teach", recipe.distill.teaching, *given)
    rounds: list[Step] = []
    for turn in rounds_of(recipe.prune, recipe.distill):
        before = rounds[-1:]
        # What is left to other rounds is said by the steps that this one builds on.
        pruning = {key: value for key, value in _values(turn.pruning).items() if key != "rounds"}
        prune = step(turn.prune, pruning, *given, *before)
        distill = step(turn.distill, _values(turn.training), model, teach, prune)
        rounds += [prune, distill]
    *_, prune, distill = rounds
    held_out = [_contents(path) for path in (*inputs.evaluate.target_of(file.domain), *inputs.evaluate.general)]
    measured = {**_values(recipe.evaluate), "target": list(recipe.evaluate.target_of(file.domain))}
    evaluation = {**measured, "seeds": seeds, "held_out": held_out}
    evaluate = step("evaluate", evaluation, index, model, *drawn_from, curate, prune, distill)
    report = step("report", {}, *shared, score, curate, teach, *rounds, evaluate)
    return score, curate, teach, *rounds, evaluate, report


def placed(recipe: Recipe) -> Recipe:
    """The recipe with its output absolute and `{output}` in paths replaced by it.

    Identities are made of the recipe as it is written: they do not depend on where the output lies. A run that was moved
    can be read; steps that load its own models cannot go on there, as references to them are absolute.
    """
    output = storage.absolute(recipe.output)

    def put(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{output}", output)
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        return type(value)(put(item) for item in value) if isinstance(value, tuple) else value

    changed = {
        section: getattr(recipe, section).model_copy(update={key: put(getattr(getattr(recipe, section), key)) for key in keys})
        for section, keys in _PATHS.items()
    }
    return recipe.model_copy(update={"output": output, **changed})


def functions_of(recipe: Recipe, context: Context) -> dict[str, Callable[[StepInput], Outcome]]:
    """What each step does, by label. Imports torch; a run that has nothing to do never comes here."""
    from finescope.stages.cautions import cautions_of
    from finescope.stages.curate import curate
    from finescope.stages.distill import distill
    from finescope.stages.embed import embed
    from finescope.stages.evaluate import evaluate
    from finescope.stages.index import index
    from finescope.stages.model import model
    from finescope.stages.prune import prune
    from finescope.stages.references import corpus_of
    from finescope.stages.report import report
    from finescope.stages.sae import sae
    from finescope.stages.score import score
    from finescope.stages.screen import Screening, screen
    from finescope.stages.teach import teach

    r = placed(recipe)
    functions: dict[str, Callable[[StepInput], Outcome]] = {
        "index": lambda step: index(context, r.corpus, step),
        "model": lambda step: model(context, r.model, r.sae.layer, step),
        "sae": lambda step: sae(context, corpus_of(r.corpus, step["index"]), r.sae, step),
        "screen": lambda step: screen(context, screening(step), step),
        "embed": lambda step: embed(context, corpus_of(r.corpus, step["index"]), r.embed, step),
    }

    def screening(step: StepInput) -> Screening:
        assert r.screen is not None
        return Screening(corpus_of(r.corpus, step["index"]), r.seeds.files, r.screen, r.score, r.embed)

    def add(seeds: SeedFile) -> None:
        of_domain: dict[str, Callable[[StepInput], Outcome]] = {
            "score": lambda step: score(context, corpus_of(r.corpus, step["index"]), seeds, r.score, r.embed, step),
            "curate": lambda step: curate(context, corpus_of(r.corpus, step["index"]), r.curate, step),
            "teach": lambda step: teach(context, corpus_of(r.corpus, step["index"]), r.distill, step),
            "evaluate": lambda step: evaluate(context, corpus_of(r.corpus, step["index"]), seeds, r.evaluate, step),
            "report": lambda step: report(r, step),
        }
        for turn in rounds_of(r.prune, r.distill):
            of_domain |= of_round(seeds, turn)
        functions.update({label_of(name, seeds.domain): function for name, function in of_domain.items()})

    def of_round(seeds: SeedFile, turn: Round) -> dict[str, Callable[[StepInput], Outcome]]:
        return {
            turn.prune: lambda step: prune(context, corpus_of(r.corpus, step["index"]), turn, cautions_of(r, seeds), step),
            turn.distill: lambda step: distill(context, turn, r.compute, step),
        }

    for seeds in r.seeds.files:
        add(seeds)
    return functions


def run(
    recipe: Recipe, reporter: Reporter, until: str | None = None, check: Callable[[Recipe], None] | None = None
) -> dict[str, Manifest]:
    """Run what is missing, in order, up to step `until` of every domain. What is done with the same recipe is not touched.

    `check` is called before the first step that is not done, and may raise what speaks against it.

    Raises:
        UserError: the input is wrong; nothing was lost.
        StepFailed: a step failed; `log_path` of the error is where its traceback is.
    """
    output = storage.absolute(recipe.output)
    plan = _until(prepared(recipe, reporter), until)
    done = {name: found for name, step in plan.items() if (found := steps.finished(step, output))}
    if len(done) == len(plan):
        for step in plan.values():
            steps.point_at(step, output, done[step.label])
        reporter.note(f"nothing to do: all {len(plan)} steps of '{output}' are done")
        return done
    if check is not None:
        check(recipe)
    with _runner(recipe, reporter) as runner:
        functions = functions_of(recipe, Context(runner, reporter))
        for name, step in plan.items():
            with _failures(name, output):
                manifest_ = steps.run(step, output, functions[name])
                if name == "model":
                    left = [step for label, step in plan.items() if label not in done]
                    _check_inputs(recipe, done["index"], manifest_, left)
            if name not in done:
                reporter.note(f"{name}: done in {manifest_.seconds:.1f} s, {_counts(manifest_)}{manifest_.uri}")
            done[name] = manifest_
    return done


def prepared(recipe: Recipe, reporter: Reporter) -> dict[str, Step]:
    """The steps of a recipe whose inputs, where finescope itself makes them, are made."""
    if recipe.prepare == "python-docs":
        from finescope.corpus.demo_inputs import prepare

        prepare(storage.join(storage.absolute(recipe.output), "inputs"), reporter)
    return steps_of(recipe)


def _until(plan: dict[str, Step], last: str | None) -> dict[str, Step]:
    if last is None:
        return plan
    names = [step.name for step in plan.values()]
    if last not in names:
        raise RecipeError(f"--until {last}: no such step; steps: {', '.join(dict.fromkeys(names))}")
    end = len(names) - names[::-1].index(last)
    return dict(itertools.islice(plan.items(), end))


@contextlib.contextmanager
def _runner(recipe: Recipe, reporter: Reporter) -> Iterator[Runner]:
    if recipe.compute.runner == "local":
        from finescope.runners.local import LocalRunner

        runner: Runner = LocalRunner()
    else:
        from finescope.runners.ray_cluster import RayRunner

        runner = RayRunner(recipe.compute, reporter)
    try:
        yield runner
    finally:
        runner.close()


@contextlib.contextmanager
def _failures(name: str, output: str) -> Iterator[None]:
    """Keep the traceback of a failed step beside the run, and name the step and the place in the error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "" if isinstance(error, StepFailed) else f"{type(error).__name__}: "
        failure = StepFailed(f"step '{name}' failed: {kind}{reason}")
        failure.log_path = _kept(error, storage.join(output, "logs", f"{name}-{manifest.now().replace(':', '')}.log"))
        raise failure from error


def _kept(error: Exception, log: str) -> str | None:
    """Where the traceback is; None where the output takes no file, as on a full disk, which is then most often the error."""
    try:
        storage.put_bytes(log, "".join(traceback.format_exception(error)).encode())
    except OSError:
        return None
    return log


def _check_inputs(recipe: Recipe, index: Manifest, model: Manifest, left: list[Step]) -> None:
    """Before the dear steps, and as soon as there is a tokenizer: the small inputs of the steps in `left`."""
    from finescope.stages.inputs import check_inputs
    from finescope.stages.references import corpus_of

    found = placed(recipe)
    check_inputs(found.model_copy(update={"corpus": corpus_of(found.corpus, index)}), model, left)


def _values(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json")


def _contents(path: str) -> str:
    """A hash of a small input file, so that a changed one is noticed; a missing one is its step's error to report."""
    found = storage.glob(path)
    return hashlib.sha256(b"".join(storage.read_bytes(file.path) for file in found)).hexdigest()[:16]


def _counts(record: Manifest) -> str:
    return f"{record.rows_out:,} rows, {record.rejects:,} rejects, " if record.rows_in else ""
