"""What the tables of `prune` say, by figures that are counted by hand."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from fake_run import build_run

from finescope import schemas, storage
from finescope.analysis import pruning
from finescope.analysis.frames import frame_of
from finescope.analysis.pruning_section import pruning_section
from finescope.manifest import TableFile
from finescope.steps import Outcome, Step, run


def table(kinds: list[tuple[str, list[float], list[float | None], list[bool]]], layer: int = 1) -> pl.LazyFrame:
    """Rows of `importance` of one layer: by kind importance, general, kept."""
    frames = [
        pl.DataFrame(
            {"layer": layer, "kind": kind, "group_index": range(len(kept)), "importance": importance, "num_params": 10}
            | {"kept": kept, "general": general},
            schema_overrides={"general": pl.Float32},
        )
        for kind, importance, general, kept in kinds
    ]
    return pl.concat(frames).lazy()


IMPORTANCE = table([("mlp", [4.0, 1.0, 3.0, 2.0], [None] * 4, [True, False] * 2)])


def test_pruned_groups_say_what_was_lost_by_layer() -> None:
    nothing = table([("mlp", [0.0] * 4, [None] * 4, [True, False] * 2)], layer=2)
    found = pruning.pruned_groups(pl.concat([IMPORTANCE, nothing]))
    assert found.rows() == [(1, "mlp", 2, 2, 20, 0.3, None, None), (2, "mlp", 2, 2, 20, 0.0, None, None)]


def test_agreement_is_spearmans_and_the_share_of_other_choices() -> None:
    # Ranks 4 3 2 1 and, two alike, 3.5 1 3.5 2: less their means 1.5 0.5 -0.5 -1.5 and 1 -1.5 1 -0.5.
    ties = ("heads", [9.0, 7.0, 5.0, 1.0], [8.0, 1.0, 8.0, 3.0], [True, True, False, False])
    # Of eight channels the best four of each side have two in common.
    importance, general = [8.0, 7, 6, 5, 4, 3, 2, 1], [1.0, 2, 7, 8, 6, 5, 4, 3]
    found = pruning.agreement(table([ties, ("mlp", importance, general, [True] * 4 + [False] * 4)]))
    heads, mlp = found.to_dicts()
    assert heads["correlation"] == pytest.approx((1.5 - 0.75 - 0.5 + 0.75) / (5 * 4.5) ** 0.5)
    assert heads["differing"] == 0.5
    squares = sum((one - other) ** 2 for one, other in zip(importance, general, strict=True))
    assert mlp["correlation"] == pytest.approx(1 - 6 * squares / (8 * 63))
    assert mlp["differing"] == 0.5


def test_one_group_and_equal_groups_have_no_correlation() -> None:
    found = pruning.agreement(table([("heads", [1.0], [2.0], [True]), ("mlp", [1.0, 1.0], [1.0, 2.0], [True, False])]))
    assert found["correlation"].to_list() == [None, None]
    assert found["differing"].to_list() == [0.0, 1.0]


def test_channels_of_experts_are_chosen_within_their_expert() -> None:
    experts = ("experts", [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [True, True, False])
    # One of two channels of each: the first expert's would be the same, the second's the other; the third left as a whole.
    channels = ("mlp", [1.0, 0.0, 9.0, 8.0, 5.0, 4.0], [9.0, 8.0, 0.0, 1.0, 1.0, 2.0], [True, False, True, False, False, False])
    found = {row["kind"]: row["differing"] for row in pruning.agreement(table([experts, channels])).to_dicts()}
    assert found == {"experts": 0.0, "mlp": 0.5}


def test_importance_map_puts_the_kept_and_important_first() -> None:
    found = pruning.importance_map(IMPORTANCE, "mlp", 2)
    assert found.rows() == [(1, 0, 3.5, True), (1, 1, 1.5, False)]
    # Where there is a cell for each group it stands at its index.
    assert pruning.importance_map(IMPORTANCE, "mlp", 4)["importance"].to_list() == [4.0, 1.0, 3.0, 2.0]
    assert pruning.importance_map(IMPORTANCE, "heads", 2).height == 0


def test_a_heads_latents_are_those_that_rise_with_it() -> None:
    rows = [(2, 0, 7, 0.1), (2, 0, 8, 0.9), (2, 0, 9, -0.95), (1, 3, 7, 0.2)]
    latents = pl.LazyFrame(rows, schema=["layer", "group_index", "latent", "correlation"], orient="row")
    assert pruning.head_latents(latents, 2).rows() == [(1, 3, 7, 0.2), (2, 0, 8, 0.9), (2, 0, 7, 0.1)]


def test_a_table_from_before_there_was_a_general_importance_is_read(tmp_path: Path) -> None:
    rows = IMPORTANCE.drop("general").collect().to_arrow().cast(pa.schema(list(schemas.IMPORTANCE)[:-1]))

    def old(step):
        size = storage.put_parquet(storage.join(step.uri, "importance/part-000000.parquet"), rows)
        return Outcome(tables={"importance": (TableFile(path="importance/part-000000.parquet", rows=4, bytes=size),)})

    manifest = run(Step("prune", {}), str(tmp_path), old)
    assert frame_of(manifest, "importance").collect()["general"].to_list() == [None] * 4
    section = pruning_section(manifest, [])
    assert section["layers"][0]["importance_removed"] == 0.3
    assert not section["correlation"]
    assert section["heads"] == []


def test_the_section_has_a_line_a_kind_and_the_first_latents_of_each_head(tmp_path: Path) -> None:
    section = pruning_section(build_run(str(tmp_path), until="prune")["prune"], [])
    assert section["correlation"].count('aria-roledescription="line mark"') == 2
    heads = [(head["layer"], head["group_index"], [row["latent"] for row in head["latents"]]) for head in section["heads"]]
    assert heads == [(2, 1, [7, 11, 101, 102, 103]), (5, 1, [7, 11, 101, 102, 103])]
