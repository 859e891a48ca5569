"""The spool against a plain model: whatever order senders, crashes and closings come in, a payload is whole or absent."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedllm.errors import CorruptPayloadError, TransportError
from fedllm.wire.digest import digest_bytes
from fedllm.wire.part import Part, Receipt
from fedllm.wire.spool import Spool

PAYLOADS = [random.Random(seed).randbytes(size) for seed, size in enumerate([0, 1, 900, 901, 3000])]
SITES = ["a", "b", "a/b"]

sites = st.sampled_from(SITES)
payloads = st.sampled_from(PAYLOADS)


def receipt_of(data: bytes) -> Receipt:
    return Receipt(len(data), digest_bytes(data))


class SpoolMachine(RuleBasedStateMachine):
    """Drives one round of a spool; remembers in plain dictionaries what must be true of it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="spool-"))
        self.spool = Spool(self.folder)
        self.writers: dict[str, tuple[Part, bytes]] = {}
        self.delivered: dict[str, bytes] = {}
        self.taken: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(site=sites, data=payloads)
    def begin(self, site: str, data: bytes) -> None:
        known = self.delivered.get(site)
        try:
            part = self.spool.begin(1, site, receipt_of(data))
        except TransportError:
            assert known is not None
            assert known != data
            return
        assert (part is None) == (known == data)
        if part is not None:
            self.writers[site] = (part, data)

    @rule(site=sites, length=st.integers(1, 2000))
    def send(self, site: str, length: int) -> None:
        if site in self.writers:
            part, data = self.writers[site]
            part.append(data[part.size : part.size + length])

    @rule(site=sites)
    def send_bad_bytes_and_finish(self, site: str) -> None:
        if site not in self.writers:
            return
        part, data = self.writers.pop(site)
        if part.missing:
            part.append(bytes(byte ^ 1 for byte in data[part.size :]))
            try:
                part.finish()
            except CorruptPayloadError:
                assert self.spool.held(1, site, receipt_of(data)) == 0
            else:
                raise AssertionError("bad bytes were accepted")

    @rule(site=sites)
    def finish(self, site: str) -> None:
        if site in self.writers and not self.writers[site][0].missing:
            part, data = self.writers.pop(site)
            part.finish()
            self.delivered[site] = data

    @rule(site=sites)
    def lose_the_connection(self, site: str) -> None:
        if site in self.writers:
            part, data = self.writers.pop(site)
            assert self.spool.held(1, site, receipt_of(data)) == part.size
            assert part.closed

    @rule()
    def restart(self) -> None:
        self.writers.clear()
        self.spool = Spool(self.folder)

    @rule()
    def lose_a_receipt_in_a_crash(self) -> None:
        for site in set(self.delivered) - self.taken:
            self.spool.payload_path(1, site).with_suffix(".receipt").unlink()

    @rule(site=sites)
    def take(self, site: str) -> None:
        if site in self.delivered:
            data = self.delivered[site]
            assert self.spool.take(1, site, receipt_of(data)).read_bytes() == data
            self.taken.add(site)

    @rule()
    def discard(self) -> None:
        for part, _ in self.writers.values():
            part.close()
        self.spool.discard_round(1)
        self.writers.clear()
        self.delivered.clear()
        self.taken.clear()

    @invariant()
    def what_is_complete_is_whole_and_nothing_else_is(self) -> None:
        lying = set((self.folder / "complete").rglob("*.payload"))
        expected = {self.spool.payload_path(1, site) for site in set(self.delivered) - self.taken}
        assert lying == expected
        for site, data in self.delivered.items():
            assert self.spool.receipt(1, site) == receipt_of(data)
            if site not in self.taken:
                assert self.spool.payload_path(1, site).read_bytes() == data


SpoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_the_spool_behaves_like_its_model = SpoolMachine.TestCase
