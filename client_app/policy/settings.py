"""What a data owner can decide about runs: the sections `[policy]` and `[sharing]` of the site's file.

Evolution: keys are only added, with a default that means what was done before.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from client_app.policy.hours import DAYS, Day, parse_hours
from fedllm.model.spec import AdapterKind, Section

Protection = Literal["differential-privacy", "secure-aggregation"]
Pattern = Annotated[str, Field(min_length=1, max_length=500)]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _checked_hours(text: str) -> str:
    parse_hours(text)
    return text


class PolicySection(Section):
    """What may be asked of the site. Whatever is not allowed is refused before anything is trained.

    Patterns are those of a shell: `*` stands for anything, `?` for one character; upper and lower case differ.
    """

    runs: tuple[Pattern, ...] = ("*",)
    """Names of runs that the site takes part in, as patterns."""

    apps: tuple[Pattern, ...] = ("*",)
    """Apps that may run, as patterns of `publisher/name`, as the app states itself. This keeps out a wrong app, not a
    dishonest one, which would leave this check out."""

    base_sources: tuple[Pattern, ...] = ("*",)
    """Base models, as patterns of the run's `model.source`, such as `hf:org/*`. Nothing is read from another source."""

    base_fingerprints: tuple[Fingerprint, ...] = ()
    """Fingerprints of base models, as a run's manifest and the audit log name them; empty for any. They hold whatever the
    source is called."""

    adapter_kinds: tuple[AdapterKind, ...] = get_args(AdapterKind)
    """Kinds of adapters that may be trained. The more an adapter can hold, the more of the data it can remember."""

    max_rank: int = Field(256, ge=0)
    """Largest rank of a LoRA adapter that the site trains, 0 for no bound."""

    max_virtual_tokens: int = Field(1024, ge=0)
    """Longest soft prompt that the site trains, in virtual tokens, those of its own included; 0 for no bound."""

    min_sites: int = Field(2, ge=1)
    """Fewest sites: of a run's quorum (`rounds.min_sites`), and of those asked in a round, as the server states them."""

    min_examples: int = Field(1, ge=1)
    """Fewest training examples of the site's own: with few of them an update says much about each."""

    protections: tuple[Protection, ...] = ()
    """What a run must offer, all of it: `differential-privacy`, `secure-aggregation`."""

    max_rounds_per_run: int = Field(0, ge=0)
    """Most rounds in which the site trains for one run, 0 for no bound. A round that is trained anew counts again."""

    max_rounds_per_day: int = Field(0, ge=0)
    """Most rounds in which the site trains in one day of its local time, for all runs together, 0 for no bound."""

    hours: Annotated[str, AfterValidator(_checked_hours)] = "00:00-24:00"
    """Times of the local day at which work may begin, such as `20:00-06:00` or `00:00-06:00, 20:00-24:00`. Work that has
    begun is done to its end, at most one round."""

    days: tuple[Day, ...] = Field(DAYS, min_length=1)
    """Days on which those times begin: `mon`, `tue`, `wed`, `thu`, `fri`, `sat`, `sun`."""

    @model_validator(mode="after")
    def _refuse_what_allows_nothing(self) -> PolicySection:
        for name in ("runs", "apps", "base_sources", "adapter_kinds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, so nothing is allowed; stop the SuperNode to take part in nothing")
        return self


class SharingSection(Section):
    """Which numbers and words leave the site beside the update, and how exact they are."""

    losses: bool = True
    """Send losses, accuracies and gradient norms. Without, training is reported without them and evaluation is refused."""

    decimals: int = Field(4, ge=0, le=17)
    """Decimals to which losses, accuracies and gradient norms are rounded."""

    count_multiple: int = Field(1, ge=1)
    """Counts of examples and tokens are rounded to multiples of this, a count above zero to at least one multiple. They
    decide the site's weight in the average."""

    topics: bool = False
    """Send how many examples each topic has, with the topics' names."""

    answers: bool = True
    """Answer the operator's prompt (`evaluation.prompt`) with the trained model, in words."""
