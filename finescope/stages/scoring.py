"""What `screen` and `score` do alike: the seeds' codes, and the sums over codes that a score is weighed with."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from finescope import storage
from finescope.config import CorpusSection, EmbedSection, ScoreSection
from finescope.config_seeds import SeedFile
from finescope.corpus.documents import read_seeds
from finescope.curation.codes import Codes, CorpusStatistics, codes_of
from finescope.curation.embed import embed_texts
from finescope.curation.score import Scorer
from finescope.curation.shards import ShardStatistics
from finescope.errors import CorpusError
from finescope.models.load import ModelReference, load_tokenizer
from finescope.runners.base import Context, Progress, Resources
from finescope.sae.dictionary import load_dictionary
from finescope.stages.references import memory_bytes, model_of
from finescope.steps import StepInput


def num_latents_of(step: StepInput) -> int:
    """The width of a code."""
    return int(step["sae"].facts["num_latents"])


def _dictionary(step: StepInput) -> str:
    return storage.join(step["sae"].uri, "dictionary")


def seed_codes(
    context: Context, corpus: CorpusSection, seeds: SeedFile, embedded: EmbedSection, step: StepInput, name: str
) -> tuple[list[str], Codes]:
    """The seeds' texts and codes; `name` is that of the step, as it is reported.

    Raises:
        CorpusError: a seed is empty, or has no active latent.
    """
    model = model_of(step["model"])
    texts = read_seeds(seeds, corpus, load_tokenizer(model))
    with context.reporter.task(f"{name}: seeds", len(texts), "seeds") as progress:
        arguments = (texts, model, _dictionary(step), embedded)
        table = context.runner.call(_embed_seeds, arguments, progress, Resources(memory_bytes(model)))
    return texts, _checked(codes_of(table, num_latents_of(step)), seeds)


def _embed_seeds(texts: list[str], model: ModelReference, dictionary: str, section: EmbedSection, progress: Progress) -> pa.Table:
    table = embed_texts(texts, model, dictionary, section)
    progress(len(texts))
    return table


def _checked(codes: Codes, seeds: SeedFile) -> Codes:
    empty = np.flatnonzero(np.diff(codes.offsets) == 0)
    if len(empty):
        number = int(empty[0]) + 1
        raise CorpusError(f"{seeds.key}: {seeds.path}: seed {number} has fewer than two tokens, or no latent is active on it")
    return codes


class Background:
    """What scores are weighed with: sums over codes that stand for the corpus and, for `contrast`, a sample of them."""

    def __init__(
        self, context: Context, files: Sequence[str], documents: int, step: StepInput, section: ScoreSection, name: str
    ) -> None:
        """Reads them, and the dictionary of the run's `sae`, where `decoded` needs it.

        Args:
            files: shards of codes, of so many `documents` in all.
            name: of the step, as it is reported.
        """
        self._section, with_sample, num_latents = section, section.weighting == "contrast", num_latents_of(step)
        decoded = section.weighting == "decoded"
        self._decoder = load_dictionary(_dictionary(step)).autoencoder.standardised_decoder().numpy() if decoded else None
        samples: list[tuple[int, Codes]] = []
        total: CorpusStatistics | None = None
        # Added up in the order of the shards, whatever order they come in: a sum of floats depends on it.
        waiting: dict[int, CorpusStatistics] = {}
        added = 0
        units, arguments = units_of(files), (num_latents, documents, with_sample)
        with context.reporter.task(f"{name}: corpus statistics", documents, "documents") as progress:
            for record in context.runner.map(ShardStatistics, arguments, units, Resources(accelerator=False)):
                (row,) = record.drop_columns(["latent_ids", "latent_values"]).to_pylist()
                columns = {column: record.column(column).combine_chunks().flatten() for column in ("latent_ids", "latent_values")}
                samples.append((row["unit"], codes_of(pa.table(columns), num_latents)))
                waiting[row["unit"]] = CorpusStatistics.from_row(row)
                while (part := waiting.pop(added, None)) is not None:
                    total, added = part if total is None else total + part, added + 1
                progress(row["documents"])
        samples.sort(key=lambda part: part[0])
        assert total is not None
        self._statistics = total
        self.sample = Codes.concatenated([codes for _, codes in samples]) if with_sample else None

    def scorer(self, seeds: Codes) -> Scorer:
        """The scorer of one domain."""
        section = self._section
        settings = (section.similarity, section.weighting, section.temperature)
        return Scorer(seeds, self._statistics, *settings, self.sample, self._decoder)


def units_of(files: Sequence[str]) -> pa.Table:
    """Shards as work for the workers of `curation.shards`."""
    return pa.table({"unit": pa.array(range(len(files)), pa.int64()), "file": pa.array(files, pa.string())})
