"""Nothing that sites or people send changes the report's structure, and nothing of it is lost."""

from html.parser import HTMLParser
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config import RunConfig
from fedllm.manifest import Manifest, SiteCounts
from fedllm.runs import Event
from fedllm.text import clean
from server_app.events import parse_event
from server_app.report.build import render
from server_app.report.material import Material
from server_app.report.scales import inner_ticks, round_ticks, spread, tick_labels, whole_ticks
from server_app.results import Results
from tests.sample_runs import sample_events

TRICKS = [
    "<script>alert(1)</script>",
    "</style><b>",
    "\"'>&lt;x onload=y",
    "<!--",
    "]]>",
    "&amp;&#x41;",
    "\u202eabc",
    "</title></svg><svg onload=a>",
    "a\x00b\x1b[31m",
]
TEXT = (st.text(min_size=1, max_size=30) | st.sampled_from(TRICKS)).filter(
    lambda text: text.strip() != "" and text.splitlines() == [text]
)


class Structure(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []
        self.style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment got into the page: {data}")


def structure(page: str) -> Structure:
    found = Structure()
    found.feed(page)
    found.close()
    return found


def page_with(site: str, reason: str, prompt: str, answer: str, run: str) -> str:
    events: list[Event] = sample_events(3, {site: 3.1, f"{site}2": 3.3}, status="failed", reason=reason)
    events.insert(0, {"event": "left_out", "time": 1.0, "site": site, "reason": reason})
    rejected = {"rejected": [{"site": site, "reason": reason}], "phases": {reason: 1.0, "train": 2.0}}
    events = [event | rejected if event["event"] == "round" else event for event in events]
    events.insert(
        -1, {"event": "answer", "time": 1.0, "prompt": prompt, "site": site, "base": answer, "federated": answer}
    )
    config = RunConfig(name="x")
    manifest = Manifest.of(
        run, config, sites={site: SiteCounts(train_examples=1)}, versions={"fedllm": reason}, created=run
    )
    manifest = manifest.model_copy(update={"config": manifest.config | {"evaluation.prompt": prompt}})
    return render(Material(run, manifest, Results.of(parse_event(event) for event in events)))


BENIGN = structure(page_with("site", "why", "what", "so", "run"))


@settings(max_examples=50, deadline=None)
@given(site=TEXT, reason=TEXT, prompt=TEXT, answer=TEXT, run=TEXT)
def test_no_text_changes_the_structure_of_the_page_and_all_of_it_is_there(
    site: str, reason: str, prompt: str, answer: str, run: str
) -> None:
    found = structure(page_with(site, reason, prompt, answer, run))
    assert found.tags == BENIGN.tags
    words = "".join(found.words)
    for text in (site, reason, prompt, answer, run):
        assert clean(text) in words


@given(low=st.floats(-1e9, 1e9), size=st.just(0.0) | st.floats(1e-3, 1e9), wanted=st.integers(2, 12))
def test_ticks_are_round_even_few_and_enclose_the_values(low: float, size: float, wanted: int) -> None:
    high = low + size
    ticks = round_ticks(low, high, wanted)
    assert 2 <= len(ticks) <= 2 * wanted + 4
    tolerance = 1e-6 * max(abs(low), abs(high), 1.0)
    assert ticks[0] <= low + tolerance
    assert ticks[-1] >= high - tolerance
    assert len(set(tick_labels(ticks))) == len(ticks) or size < tolerance


@given(low=st.floats(0, 100), size=st.floats(0.001, 100), wanted=st.integers(3, 8))
def test_inner_ticks_lie_inside_a_range_that_encloses_the_values(low: float, size: float, wanted: int) -> None:
    ticks, bottom, top = inner_ticks(low, low + size, wanted)
    assert ticks
    assert bottom <= low
    assert low + size <= top
    assert all(bottom <= tick <= top for tick in ticks)


@given(low=st.integers(0, 50), size=st.integers(0, 5000), wanted=st.integers(1, 12))
def test_whole_ticks_are_few_and_inside(low: int, size: int, wanted: int) -> None:
    ticks = whole_ticks(low, low + size, wanted)
    assert 1 <= len(ticks) <= wanted + 1
    assert all(low <= tick <= low + size for tick in ticks)


@given(places=st.lists(st.floats(0, 100), max_size=5))
def test_labels_spread_apart_keep_their_order_and_stay_inside(places: list[float]) -> None:
    moved = spread(places, 20, 0, 100)
    pairs = sorted(zip(places, moved, strict=True))
    gaps = [after - before for (_, before), (_, after) in pairwise(pairs)]
    assert all(gap >= 20 - 1e-9 for gap in gaps)
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in moved)
