"""The section `seeds`: the examples of one domain, or of several by name."""

import difflib
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from finescope.section import Section

# A domain's name is part of directory names, after a dash.
Domain = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Path = Annotated[str, Field(min_length=1)]


class SeedFile(NamedTuple):
    """The seeds of one domain."""

    path: str
    domain: str = ""  # empty in a run of one domain

    @property
    def key(self) -> str:
        """Where the recipe names it."""
        return f"seeds.{self.domain or 'path'}"


class SeedsSection(Section):
    """The examples that say what the domain is: a path, or a path a domain (`{math: math.jsonl, law: law.jsonl}`)."""

    path: Path | dict[Domain, Path] = Field(description="JSONL; rows like the corpus's, or rows with `text` alone")

    @model_validator(mode="before")
    @classmethod
    def _domains_are_paths_by_name(cls, value: Any) -> Any:
        # One key that is nearly `path` is a slip and no domain.
        slip = isinstance(value, dict) and len(value) == 1 and difflib.get_close_matches("path", map(str, value), cutoff=0.8)
        return value if not isinstance(value, dict) or not value or "path" in value or slip else {"path": value}

    @property
    def files(self) -> tuple[SeedFile, ...]:
        """The seeds of each domain, in the recipe's order."""
        if isinstance(self.path, str):
            return (SeedFile(self.path),)
        return tuple(SeedFile(path, domain) for domain, path in self.path.items())
