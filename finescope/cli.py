"""The command line. `finescope --help` imports neither torch nor ray: every command imports what it needs."""

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from finescope.errors import DictionaryError, ModelError, StepFailed, UserError

app = typer.Typer(
    name="finescope",
    help="Small language models for one domain: curate with sparse autoencoders, prune, distill.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Packages whose errors are neither OSError nor ours: no credentials, no such profile, no address.
_STORE_CLIENTS = ("botocore", "google", "azure", "httpx", "httpx2")

RecipePath = Annotated[str, typer.Argument(help="recipe file (YAML)", metavar="RECIPE")]
RunPath = Annotated[str, typer.Argument(help="a run's output: a directory or an fsspec URI", metavar="RUN")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.field=value; may be repeated")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable, on stdout")]
LogJson = Annotated[bool, typer.Option("--log-json", help="log as JSON lines on stderr")]
Verbose = Annotated[bool, typer.Option("--verbose", help="show tracebacks")]
RunnerName = Annotated[str | None, typer.Option("--runner", help="ray or local, instead of the recipe's")]


def main() -> None:
    """Entry point of the `finescope` command."""
    # Progress bars of the libraries below would tear up ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        # transformers imports DeepSpeed where it is installed, and that warns of a missing GPU unless told.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Deprecations inside the libraries are for their authors, not for who runs this at night.
    warnings.simplefilter("ignore", FutureWarning)
    app()


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="where the run goes")] = "runs/demo",
    runner: RunnerName = "local",
    set_: Overrides = None,
    log_json: LogJson = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole method on SmolLM2-135M and the documentation of the installed Python packages."""
    with _errors(verbose):
        from finescope import demo as demonstration

        overrides = [f"output={out}", f"compute.runner={runner}", *(set_ or [])]
        demonstration.run(overrides, _reporter(log_json))


@app.command()
def init(directory: Annotated[Path, typer.Argument(metavar="[DIR]")] = Path(), verbose: Verbose = False) -> None:
    """Write a commented recipe and an example seeds file."""
    with _errors(verbose):
        from finescope.scaffold import write_example

        for path in write_example(directory):
            print(path)  # noqa: T201


@app.command()
def plan(recipe: RecipePath, set_: Overrides = None, json: AsJson = False, verbose: Verbose = False) -> None:
    """Show the steps, which are done, and what each will cost."""
    with _errors(verbose):
        from finescope.recipe import load

        loaded = load(recipe, set_ or [])
        # Imports torch: a recipe that is wrong is told of without that wait.
        from finescope import pipeline
        from finescope import plan as planning

        reporter = _reporter(log_json=False)
        pipeline.prepared(loaded, reporter)
        planning.show(loaded, as_json=json, reporter=reporter)


@app.command()
def run(
    recipe: RecipePath,
    until: Annotated[str | None, typer.Option("--until", help="last step to run")] = None,
    set_: Overrides = None,
    log_json: LogJson = False,
    verbose: Verbose = False,
) -> None:
    """Run what is missing. Safe to repeat, to kill, to run again."""
    with _errors(verbose):
        from finescope import demo, pipeline
        from finescope.recipe import load

        pipeline.run(load(recipe, set_ or []), _reporter(log_json), until, demo.check_resources)


@app.command()
def status(run: RunPath, json: AsJson = False, verbose: Verbose = False) -> None:
    """Show the steps of a run: done, running or failed, and where each one's output is."""
    with _errors(verbose):
        from finescope.show import show_status

        show_status(run, as_json=json)


@app.command()
def inspect(
    run: RunPath,
    table: Annotated[str | None, typer.Argument(metavar="[TABLE]")] = None,
    json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Look into a run's tables: scores, sources, seeds, latents, pruned groups, rejects."""
    with _errors(verbose):
        from finescope.show import show_tables

        show_tables(run, table, as_json=json)


@app.command()
def report(run: RunPath, verbose: Verbose = False) -> None:
    """Write the HTML report of a run and print its path."""
    with _errors(verbose):
        from finescope.show import write_report

        for path in write_report(run):
            print(path)  # noqa: T201


@app.command("check-model")
def check_model(model: Annotated[str, typer.Argument()], json: AsJson = False, verbose: Verbose = False) -> None:
    """Show which parts of a model are recognised and what can be pruned, or which module is unknown."""
    with _errors(verbose):
        from finescope.show import show_model

        show_model(model, as_json=json)


@app.command()
def export(
    run: RunPath,
    to: Annotated[str, typer.Option("--to", help="directory to write", metavar="DIR")],
    format_: Annotated[str, typer.Option("--format", help="hf, sae-lens, sparsify or gguf")] = "hf",
    domain: Annotated[str | None, typer.Option("--domain", help="whose student, in a run of several domains")] = None,
    verbose: Verbose = False,
) -> None:
    """Export the student or the dictionary in another tool's layout."""
    with _errors(verbose):
        from finescope.export import export_run

        print(export_run(run, format_, to, domain))  # noqa: T201


@app.command()
def submit(
    recipe: RecipePath,
    address: Annotated[str, typer.Option("--address", help="the Ray dashboard, http://HEAD:8265")],
    set_: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Run a recipe as a Ray job on a cluster."""
    with _errors(verbose):
        from finescope.submit import submit_recipe

        sys.exit(submit_recipe(recipe, address, set_ or []))


def _reporter(log_json: bool):
    from finescope.console import ConsoleReporter

    return ConsoleReporter("json" if log_json else None)


@contextlib.contextmanager
def _errors(verbose: bool) -> Iterator[None]:
    """Turn what was raised into an exit code and one line on stderr."""
    try:
        yield
    except UserError as error:
        _end(error, error.exit_code, verbose, _hint(error))
    except StepFailed as error:
        _end(error, error.exit_code, verbose, "")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)  # noqa: T201
        raise SystemExit(130) from None
    except (OSError, RuntimeError, MemoryError) as error:
        _end(error, 1, verbose, "")
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _STORE_CLIENTS:
            raise
        _end(error, 2, verbose, "an object store's credentials and address come from the environment, as its own tools read them")


def _hint(error: UserError) -> str:
    of_model = isinstance(error, ModelError) and not isinstance(error, DictionaryError)
    return "`finescope check-model MODEL` shows what is recognised" if of_model else ""


def _end(error: BaseException, code: int, verbose: bool, hint: str) -> NoReturn:
    if verbose:
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    print(f"finescope: {message}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"finescope: {hint}", file=sys.stderr)  # noqa: T201
    log = getattr(error, "log_path", None)
    if log:
        print(f"finescope: log: {log}", file=sys.stderr)  # noqa: T201
    raise SystemExit(code) from None
