"""The closing table: what pruning took and what training gave back, as data that a page and a terminal both draw."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finescope.manifest import Manifest

Kind = Literal["count", "bytes", "rate", "perplexity", "ratio"]
# In the order of the columns. `control` was trained on random documents.
MODELS = ("base", "pruned", "recovered", "control")
_ROWS: tuple[tuple[str, tuple[str, ...], Kind], ...] = (
    ("parameters", ("parameters",), "count"),
    ("file size", ("file_bytes",), "bytes"),
    ("memory of the weights", ("memory_bytes",), "bytes"),
    ("peak memory", ("peak_memory_bytes",), "bytes"),
    ("FLOPs a token", ("flops_per_token",), "count"),
    ("prefill, tokens/s", ("prefill_tokens_per_second",), "rate"),
    ("prefill gain of FLOPs saved", ("prefill_gain_over_flops",), "ratio"),
    ("decode, tokens/s", ("decode_tokens_per_second",), "rate"),
    ("perplexity, target", ("perplexity", "target"), "perplexity"),
    ("perplexity, general", ("perplexity", "general"), "perplexity"),
)


@dataclass(frozen=True)
class Row:
    """One measured quantity over the models."""

    label: str
    kind: Kind
    values: tuple[float | None, ...]  # one a column; None where it was not measured

    @property
    def cells(self) -> tuple[str, ...]:
        """The values as a person reads them; a dash where there is none."""
        return tuple(shown(value, self.kind) for value in self.values)

    @property
    def relative(self) -> tuple[str, ...]:
        """Each value against the first column's, such as `-21 %`; empty where there is nothing to compare."""
        base = self.values[0] if self.values else None
        return ("", *(_against(value, base) for value in self.values[1:]))


@dataclass(frozen=True)
class Grid:
    """Rows of quantities, columns of models; no row where nothing was measured."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def value(self, label: str, column: str) -> float | None:
        """One figure; None where it was not measured."""
        rows = {row.label: row.values for row in self.rows}
        return rows[label][self.columns.index(column)] if label in rows and column in self.columns else None

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """Label -> model -> value, for JSON."""
        return {row.label: dict(zip(self.columns, row.values, strict=True)) for row in self.rows}


def closing_grid(manifests: Mapping[str, Manifest]) -> Grid:
    """The closing table of a run; without rows where `evaluate` is not done."""
    measured = manifests["evaluate"].facts.get("models", {}) if "evaluate" in manifests else {}
    columns = tuple(name for name in MODELS if name in measured)
    rows = (Row(label, kind, tuple(_at(measured[name], path) for name in columns)) for label, path, kind in _ROWS)
    return Grid(columns, tuple(row for row in rows if any(value is not None for value in row.values)))


def shown(value: float | None, kind: Kind) -> str:
    """A figure as a person reads it."""
    if value is None:
        return "-"
    if kind == "bytes":
        return f"{value / 1e6:,.1f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"
    if kind == "count":
        return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"
    if kind == "ratio":
        return f"{value:.2f}"
    if kind == "perplexity":
        return f"{value:,.2f}" if value < 1e5 else f"{value:.2e}"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _at(facts: Mapping[str, object], path: tuple[str, ...]) -> float | None:
    found: object = facts
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else None


def _against(value: float | None, base: float | None) -> str:
    if value is None or not base:
        return ""
    ratio = value / base
    return f"{ratio:,.1f} times" if ratio >= 2 else f"{100 * (ratio - 1):+.0f} %"
