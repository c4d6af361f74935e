"""What the checks say of real rewrites: SmolLM2-135M rewrites rows of a corpus. Prints JSON, counts by domain and reason.

    OMP_NUM_THREADS=1 python tests/benchmarks/answer_checks.py --corpus '../shared/data/corpus/*.parquet' --show decisions.txt

`--show` writes each row with what was decided, for reading. `--written` keeps what the teacher wrote in a file and, where that is
there, does not ask it again, so that another version of the checks is tried in a second.
"""

import argparse
import collections
import glob
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from activations import reference

from finescope.distillation.rewrite import Rewriter, select_first
from finescope.distillation.token_writer import TokenWriter, TransformersGenerator
from finescope.distillation.writer import Task, Writer, Written
from finescope.models.load import load_model, load_tokenizer

DOMAINS = ("math", "code", "medicine", "law")


class Recorded:
    """A writer's answers, by document, from a file or from the writer."""

    def __init__(self, writer: Writer, kept: Path | None) -> None:
        self._writer, self._kept = writer, kept
        self.answers: dict[str, Written | None] = {}
        if kept is not None and kept.exists():
            lines = map(json.loads, kept.read_text().splitlines())
            self.answers = {line["doc_id"]: line["written"] and Written(**line["written"]) for line in lines}

    def __call__(self, tasks: Sequence[Task], progress: Callable[[int], Any]) -> list[Written | None]:
        left = [task for task in tasks if task.doc_id not in self.answers]
        self.answers |= {task.doc_id: found for task, found in zip(left, self._writer(left, progress), strict=True)}
        if self._kept is not None:
            lines = [{"doc_id": name, "written": found and asdict(found)} for name, found in self.answers.items()]
            self._kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [self.answers[task.doc_id] for task in tasks]


def documents(corpus: str, rows: int, seed: int) -> tuple[pa.Table, list[str]]:
    """As many rows of each domain, drawn at random, as the rewriter takes them; and their domains."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(glob.glob(corpus))])
    generator = np.random.default_rng(seed)
    parts = []
    for domain in DOMAINS:
        part = table.filter(pc.field("domain") == domain)
        parts.append(part.take(np.sort(generator.choice(part.num_rows, rows // len(DOMAINS), replace=False))))
    chosen = pa.concat_tables(parts)
    asked = [f"{row['instruction']}\n{row['input']}".strip() for row in chosen.select(["instruction", "input"]).to_pylist()]
    given = pa.table({"doc_id": chosen.column("id"), "prompt": asked, "response": chosen.column("output")})
    return select_first(given, 1.0), chosen.column("domain").to_pylist()


def shown(row: dict[str, Any], domain: str, written: Written | None) -> str:
    """One decision, to be read."""
    text = "" if written is None else written.text
    decision = row["reason"] or "REWRITE IS USED"
    head = f"{'=' * 100}\n{row['doc_id']} {domain}: {decision}\n"
    parts = {"PROMPT": row["prompt"][:600], "ORIGINAL": row["response_original"], "REWRITE": text}
    return head + "".join(f"--- {name}\n{part}\n" for name, part in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--show", type=Path)
    parser.add_argument("--written", type=Path)
    arguments = parser.parse_args()
    given, domains = documents(arguments.corpus, arguments.rows, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = reference(folder)
        tokenizer = load_tokenizer(model)
        generator = TransformersGenerator(load_model(model), tokenizer, 0.0, 8192)
        recorded = Recorded(TokenWriter(generator, tokenizer, 0), arguments.written)
        table = Rewriter(lambda: recorded, tokenizer, arguments.tokens)(given, lambda _: None)
    rows = table.to_pylist()
    if arguments.show is not None:
        texts = [shown(row, domain, recorded.answers.get(row["doc_id"])) for row, domain in zip(rows, domains, strict=True)]
        arguments.show.write_text("\n".join(texts))
    counts = {name: collections.Counter() for name in DOMAINS}
    for row, domain in zip(rows, domains, strict=True):
        counts[domain][row["reason"] or "used"] += 1
    print(json.dumps({"rows": len(rows), "decisions": {name: dict(count.most_common()) for name, count in counts.items()}}))


if __name__ == "__main__":
    main()
