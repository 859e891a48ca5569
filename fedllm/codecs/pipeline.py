"""A codec pipeline: parsed from one line of text, checked for order, written back canonically.

Grammar::

    pipeline = branch *( ";" branch )
    branch   = [ role "=" ] stage *( "|" stage )
    stage    = name [ "@" version ] *( ":" parameter )

``fp32`` applies to every tensor; ``delta|nf4:64;lora_B=delta|int8:256`` gives tensors of role ``lora_B`` their own
branch. Blanks mean nothing. Without ``@version`` the newest version is meant. On the wire every version is written out
(:attr:`Pipeline.wire_text`), so that a new release reads what an old one wrote.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from fedllm.codecs.registry import STAGES, known_names, latest_version
from fedllm.codecs.stage import BytesStage, IndexStage, Kind, Selector, Stage, ValuesStage
from fedllm.errors import ConfigError, explain
from fedllm.update import Layout

MAX_TEXT = 4096
_ROLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_STAGE = re.compile(r"([a-z][a-z0-9]*)(?:@([1-9][0-9]{0,3}))?((?::[A-Za-z0-9.+-]+)*)")
_ORDER = list(Kind)
_SELECTING = (Kind.SEGMENT, Kind.MASK, Kind.SPARSE)


@dataclass(frozen=True)
class Branch:
    """The stages of one role, in the order in which the encoder applies them.

    Raises:
        ConfigError: The stages cannot follow each other.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        _check_order(self.stages)

    def of_kind(self, kind: Kind) -> tuple[Stage, ...]:
        """Return the stages of one kind, in order."""
        return tuple(stage for stage in self.stages if stage.kind is kind)

    @cached_property
    def selectors(self) -> tuple[Selector, ...]:
        """The stages that pick coordinates, in order."""
        return cast(tuple[Selector, ...], tuple(stage for stage in self.stages if stage.kind in _SELECTING))

    @cached_property
    def values(self) -> ValuesStage:
        """The one stage that turns numbers into bytes."""
        return cast(ValuesStage, self.of_kind(Kind.VALUES)[0])

    @cached_property
    def index(self) -> IndexStage | None:
        """The coder of positions that travel."""
        found = self.of_kind(Kind.INDEX)
        return cast(IndexStage, found[0]) if found else None

    @cached_property
    def compressors(self) -> tuple[BytesStage, ...]:
        """The stages from bytes to bytes, in order."""
        return cast(tuple[BytesStage, ...], self.of_kind(Kind.BYTES))

    def text(self, write: Callable[[Stage], str]) -> str:
        """Return the branch's text, each stage written by ``write``."""
        return "|".join(write(stage) for stage in self.stages)


@dataclass(frozen=True)
class Pipeline:
    """A branch for each role, and one for all other roles under the empty name.

    Attributes:
        branches: Pairs of role and branch, sorted by role; the empty role comes first.
    """

    branches: tuple[tuple[str, Branch], ...]

    def __post_init__(self) -> None:
        roles = [role for role, _ in self.branches]
        if len(set(roles)) != len(roles):
            raise ConfigError(explain("a pipeline names a role twice", found=", ".join(sorted(roles))))
        if len({bool(branch.of_kind(Kind.DIFFERENCE)) for _, branch in self.branches}) > 1:
            raise ConfigError(explain("a pipeline takes the difference for some roles only", found=str(self)))

    def __str__(self) -> str:
        return self._text(_short)

    @property
    def wire_text(self) -> str:
        """The canonical text with every version written out."""
        return self._text(_versioned)

    def _text(self, write: Callable[[Stage], str]) -> str:
        return ";".join((f"{role}=" if role else "") + branch.text(write) for role, branch in self.branches)

    def branch(self, role: str) -> Branch:
        """Return the branch for tensors of a role.

        Raises:
            ConfigError: No branch covers the role.
        """
        known = dict(self.branches)
        branch = known.get(role) or known.get("")
        if branch is None:
            raise ConfigError(
                explain(
                    f"no branch of the pipeline covers role {role!r}", expected=f"one of {sorted(known)}", where=self
                )
            )
        return branch

    def check(self, layout: Layout) -> None:
        """Refuse a layout with a role that no branch covers, with :class:`ConfigError`."""
        for role in {spec.role for spec in layout.tensors}:
            self.branch(role)

    def has(self, kind: Kind) -> bool:
        """Whether a stage of this kind occurs."""
        return any(branch.of_kind(kind) for _, branch in self.branches)

    @property
    def needs_reference(self) -> bool:
        """Whether encoding needs the arrays of a reference state (``delta`` only if it has not been subtracted yet)."""
        return self.has(Kind.DIFFERENCE) or self.has(Kind.MASK)

    @property
    def decoding_needs_reference(self) -> bool:
        """Whether the receiver needs the reference's arrays to tell which coordinates the values belong to."""
        return self.has(Kind.MASK)

    @property
    def is_partial(self) -> bool:
        """Whether a payload says nothing about some coordinates, which an average has to know."""
        return self.has(Kind.SEGMENT) or self.has(Kind.MASK)

    @property
    def carries_seed(self) -> bool:
        """Whether the receiver needs the run's seed to tell which coordinates the values belong to."""
        return any(stage.name == "randk" for _, branch in self.branches for stage in branch.stages)

    @property
    def is_linear(self) -> bool:
        """Whether the decoded sum equals the sum of the decoded, as secure aggregation needs."""
        return all(stage.is_linear for _, branch in self.branches for stage in branch.stages)

    @property
    def is_lossless(self) -> bool:
        """Whether decoding gives back the same float32 bits."""
        return all(stage.is_lossless for _, branch in self.branches for stage in branch.stages)


def parse(text: str) -> Pipeline:
    """Read a pipeline's text.

    Raises:
        ConfigError: The text is malformed, a stage or its version is unknown (the known ones are listed), or the order
            is impossible.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError(explain("a pipeline's text is too long", expected=f"at most {MAX_TEXT}", found=len(text)))
    branches = [_parse_branch(part) for part in "".join(text.split()).split(";")]
    return Pipeline(tuple(sorted(branches, key=lambda pair: pair[0])))


def _parse_branch(text: str) -> tuple[str, Branch]:
    role, separator, stages = text.rpartition("=")
    if separator and not _ROLE.fullmatch(role):
        raise ConfigError(explain("a pipeline's role is malformed", expected="role=stage|stage", found=text[:100]))
    return role, Branch(tuple(_parse_stage(part) for part in stages.split("|")))


def _parse_stage(text: str) -> Stage:
    match = _STAGE.fullmatch(text)
    if match is None:
        raise ConfigError(
            explain("a codec stage is malformed", expected="name[@version][:parameter]*", found=text[:100])
        )
    name, version, params = match[1], match[2], match[3].split(":")[1:]
    newest = latest_version(name)
    if not newest:
        raise ConfigError(explain(f"unknown codec stage {name!r}", expected=f"one of {', '.join(known_names())}"))
    number = int(version) if version else newest
    if (name, number) not in STAGES:
        raise ConfigError(
            explain(f"codec stage {name!r} has no such version here", expected=f"at most {newest}", found=number)
        )
    return STAGES[name, number](params)


def _versioned(stage: Stage) -> str:
    return ":".join((f"{stage.name}@{stage.version}", *stage.params))


def _short(stage: Stage) -> str:
    return _versioned(stage) if stage.version != latest_version(stage.name) else ":".join((stage.name, *stage.params))


def _check_order(stages: tuple[Stage, ...]) -> None:
    text = "|".join(_short(stage) for stage in stages)
    for first, second in itertools.pairwise(stages):
        if _ORDER.index(first.kind) > _ORDER.index(second.kind):
            reason = f"{second.name!r} ({second.kind.value}) cannot follow {first.name!r} ({first.kind.value})"
            raise ConfigError(explain(f"impossible pipeline: {reason}", where=text))
    for kind in Kind:
        names = [stage.name for stage in stages if stage.kind is kind]
        if len(names) > len(set(names)) or (len(names) > 1 and kind is not Kind.BYTES):
            raise ConfigError(
                explain(
                    "a pipeline holds two stages of one kind", expected=f"one ({kind.value})", found=names, where=text
                )
            )
    _check_partners({stage.kind for stage in stages}, any(_positions_travel(stage) for stage in stages), text)


def _check_partners(kinds: set[Kind], positions_travel: bool, text: str) -> None:
    if Kind.VALUES not in kinds:
        fix = "Add a number format such as fp32, bf16 or nf4."
        raise ConfigError(explain("a pipeline has no stage from array to bytes", where=text, fix=fix))
    if positions_travel and Kind.INDEX not in kinds:
        fix = "Add rice behind the number format."
        raise ConfigError(explain("the positions of topk travel and need an index coder", where=text, fix=fix))
    if Kind.INDEX in kinds and not positions_travel:
        raise ConfigError(explain("an index coder has no positions to code", expected="topk before it", where=text))


def _positions_travel(stage: Stage) -> bool:
    return stage.kind in _SELECTING and cast(Selector, stage).positions_travel
