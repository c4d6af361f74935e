"""Memory of `curate` against the documents that it keeps, of a corpus a fifth larger. Prints JSON.

    python tests/benchmarks/curate_memory.py --documents 100000 1000000

Texts are 20 random words; one in a hundred is another one with its last word changed. Each selection is a process of its own
with the local runner, so that its memory is that of the driver and of one worker. Anonymous memory is sampled ten times a
second; the rest of the resident memory is files that are mapped, which the system drops when it needs the room.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))
from curate_inputs import run_curate, write_inputs

WORDS, LETTERS, ROWS_A_FILE, ROWS_A_GROUP = 20, 5, 100_000, 10_000


def texts(count: int, random: np.random.Generator) -> pa.Array:
    """`count` texts of `WORDS` words of `LETTERS` letters."""
    letters = random.integers(ord("a"), ord("z") + 1, (count, WORDS, LETTERS + 1), dtype=np.uint8)
    letters[:, :, LETTERS] = ord(" ")
    for row in range(100, count, 100):
        letters[row] = letters[row - 50]
        letters[row, -1, 0] = ord("z")
    return pa.array(letters.reshape(count, -1).view(f"S{WORDS * (LETTERS + 1)}")[:, 0]).cast(pa.string())


def memory(key: str) -> int:
    """Bytes, as the system tells them of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(key)


def select(root: Path, documents: int, deduplicate: str) -> None:
    """Write the inputs, select, and print what it took."""
    rows, random = documents * 6 // 5, np.random.default_rng(0)
    tables = []
    for start in range(0, rows, ROWS_A_FILE):
        count = min(ROWS_A_FILE, rows - start)
        ids = pa.array([f"d{number:08d}" for number in range(start, start + count)])
        tables.append(pa.table({"id": ids, "text": texts(count, random)}))
    inputs = write_inputs(root, tables, random.normal(size=rows).tolist(), ROWS_A_GROUP)
    del tables
    pa.default_memory_pool().release_unused()
    before, peak, ended = memory("RssAnon"), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.1):
            peak[0] = max(peak[0], memory("RssAnon"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    started = time.process_time()
    manifest = run_curate(root, inputs, documents=documents, deduplicate=deduplicate)
    seconds = time.process_time() - started
    ended.set()
    sampler.join()
    result = {"kept": manifest.rows_out, "reasons": manifest.facts["reasons"], "shards": len(manifest.files("curated"))}
    figures = {"cpu_seconds": round(seconds, 1), "anonymous_before": before, "anonymous_peak": peak[0]}
    print(json.dumps({"deduplicate": deduplicate, **result, **figures}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--deduplicate", nargs="+", default=["exact", "near"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        select(Path(arguments.one), arguments.documents[0], arguments.deduplicate[0])
        return
    runs: list[dict[str, Any]] = []
    for deduplicate in arguments.deduplicate:
        for documents in arguments.documents:
            with tempfile.TemporaryDirectory(prefix="curate-memory-") as root:
                command = [sys.executable, __file__, "--one", root, "--documents", str(documents), "--deduplicate", deduplicate]
                runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(json.dumps({"runs": runs}, indent=2))


if __name__ == "__main__":
    main()
