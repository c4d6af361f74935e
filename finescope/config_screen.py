"""The section `screen`: a cheap first pass over the corpus, so that only what may be among the best is embedded."""

import math

from pydantic import Field, model_validator

from finescope.section import Section, Seed, Share


class ScreenSection(Section):
    """Which documents are worth embedding: a linear model of word n-grams, fitted to the scores of a sample."""

    share: Share | None = Field(
        default=None, gt=0.0, description="of the corpus that passes for each domain, about; null: as much as `recall` takes"
    )
    recall: float = Field(
        default=0.99, gt=0.0, lt=1.0, description="of the best `top` of the corpus, at least so much is to pass, on the average"
    )
    top: Share = Field(
        default=0.05, gt=0.0, description="share of the corpus that counts as the best: more than curate keeps of it"
    )
    sample: int = Field(default=4096, ge=100, description="documents drawn from the whole corpus, embedded and learned from")
    audit: int = Field(
        default=4096, ge=1, description="more of them: those that did not pass are embedded all the same, to measure the recall"
    )
    seed: Seed = 0

    @model_validator(mode="after")
    def _sample_can_promise_the_recall(self) -> "ScreenSection":
        least = math.ceil(1 / (1 - self.recall) / self.top)
        if self.share is None and self.sample < least:
            raise ValueError(f"a recall of {self.recall} of the best {self.top} takes a sample of at least {least:,} documents")
        return self
