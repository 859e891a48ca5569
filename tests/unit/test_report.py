import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedllm.errors import CheckpointError
from fedllm.runs import RunFolder, read_metrics
from server_app.events import parse_event
from server_app.report import build_report
from server_app.report.material import Material
from server_app.report.summary import headline
from server_app.results import Results, Row, natural, perplexity
from tests.sample_runs import SITES, sample_events, write_sample

KINDS = {
    "finished": {},
    "one round": {"num_rounds": 1},
    "failed": {"num_rounds": 2, "status": "failed", "reason": "QuorumError: round 3 had no quorum"},
    "stopped": {"num_rounds": 1, "status": "stopped", "reason": "the server was stopped"},
    "unfinished": {"num_rounds": 3, "status": ""},
    "base only": {"num_rounds": 0, "status": ""},
    "one site": {"sites": {"alone": 3.3}},
    "many": {"sites": {f"site-{number}": 3.0 + number / 50 for number in range(60)}, "num_rounds": 80},
}


@pytest.fixture(params=KINDS)
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return build_report(write_sample(tmp_path, **KINDS[request.param])).read_text()


class Tags(HTMLParser):
    """Collects tags with their attributes, and complains of what is not closed in order."""

    VOID = ("meta", "br", "col")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def close(self) -> None:
        super().close()
        assert self._open == []


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    return tags


def drawings(page: str) -> Iterator[ElementTree.Element]:
    for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        yield ElementTree.fromstring(text)


def drawing_of(page: str, title: str) -> ElementTree.Element:
    (chart,) = [one for one in drawings(page) if one.find("title") is not None and one[0].text == title]
    return chart


def test_every_kind_of_run_gives_a_well_formed_page_that_asks_for_nothing(page: str) -> None:
    found = parse(page)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?://|@import|url\(", page)
    assert not {"src", "href", "onload", "onclick"} & {name for _, attributes in found.tags for name in attributes}
    policies = [attributes for _, attributes in found.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in (policies[0]["content"] or "")
    identifiers = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))


def test_every_drawing_has_words_for_those_who_cannot_see_it_and_finite_places(page: str) -> None:
    for drawing in drawings(page):
        if drawing.get("aria-hidden") != "true":
            assert drawing.get("role") == "img"
            label = drawing.get("aria-label") or "".join(
                part.text or "" for part in drawing if part.get("id") in (drawing.get("aria-labelledby") or "").split()
            )
            assert label
        for part in drawing.iter():
            assert not re.search(
                "nan|inf", " ".join(part.attrib.get(name, "") for name in ("x", "y", "points", "height"))
            )


def test_equal_files_give_equal_bytes_in_another_process_and_folder_too(tmp_path: Path) -> None:
    first = build_report(write_sample(tmp_path / "a")).read_bytes()
    assert build_report(RunFolder(tmp_path / "a" / "runs" / "sample")).read_bytes() == first
    write_sample(tmp_path / "b")
    program = (
        "import sys; from pathlib import Path; from fedllm.runs import RunFolder\n"
        "from server_app.report import build_report; build_report(RunFolder(Path(sys.argv[1])))"
    )
    folder = tmp_path / "b" / "runs" / "sample"
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, env=environment)
    assert (folder / "report.html").read_bytes() == first


def test_the_table_holds_the_numbers_of_the_metrics(tmp_path: Path) -> None:
    folder = write_sample(tmp_path)
    page = build_report(folder).read_text()
    events = {event["event"]: event for event in read_metrics(folder.metrics)}  # the last of each kind
    for site, part in events["evaluation"]["sites"].items():
        row = re.search(rf'<tr><td class="name">{site}</td>.*?</tr>', page)
        assert row
        losses = re.findall(r">(\d\.\d{3})</span>", row[0])
        measured = (SITES[site], events["local_only"]["sites"][site]["loss"], part["loss"])
        assert losses == [f"{loss:.3f}" for loss in measured]


def test_bars_are_as_high_as_the_bytes_they_stand_for(tmp_path: Path) -> None:
    folder = write_sample(tmp_path)
    page = build_report(folder).read_text()
    chart = drawing_of(page, "Bytes per round")
    heights: dict[int, float] = {}
    for bar in chart.iter("rect"):
        tip = re.fullmatch(r"round (\d+), to the server: .*", bar[0].text or "")
        if tip:
            heights[int(tip[1])] = float(bar.attrib["height"])
    sent: dict[int, int] = {}
    for event in read_metrics(folder.metrics):
        if event["event"] in ("round", "attempt"):
            sent[event["round"]] = sent.get(event["round"], 0) + event["bytes_up"]
    scale = heights[1] / sent[1]
    assert heights == pytest.approx({round_: count * scale for round_, count in sent.items()}, abs=0.02)


def test_a_curve_passes_through_the_losses_it_stands_for(tmp_path: Path) -> None:
    folder = write_sample(tmp_path)
    page = build_report(folder).read_text()
    (chart,) = [
        one for one in drawings(page) if (one.find("title") is not None and one[0].text == "Held-out loss, all sites")
    ]
    (line,) = chart.iter("polyline")
    places = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    losses = [event["loss"] for event in read_metrics(folder.metrics) if event["event"] == "evaluation"]
    slope = (places[-1] - places[0]) / (losses[-1] - losses[0])
    assert slope < 0  # a lower loss is further down
    assert places == pytest.approx([places[0] + slope * (loss - losses[0]) for loss in losses], abs=0.02)


def test_losses_that_are_not_finite_leave_gaps_and_are_named(tmp_path: Path) -> None:
    folder = write_sample(tmp_path, num_rounds=4)
    text = folder.metrics.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith('{"event":"evaluation"') and '"round":2,' in line]
    folder.metrics.write_text(text.replace(line, re.sub(r'"loss":\d\.\d+', '"loss":"NaN"', line)))
    page = build_report(folder).read_text()
    parse(page)
    (chart,) = [
        one for one in drawings(page) if (one.find("title") is not None and one[0].text == "Held-out loss, all sites")
    ]
    assert len(list(chart.iter("polyline"))) == 2


@pytest.mark.parametrize("manifest", [None, "not json"])
def test_a_run_without_a_readable_manifest_has_a_report(tmp_path: Path, manifest: str | None) -> None:
    folder = write_sample(tmp_path)
    folder.manifest.unlink()
    if manifest:
        folder.manifest.write_text(manifest)
    page = build_report(folder).read_text()
    parse(page)
    assert "manifest is missing or cannot be read" in page


def test_a_run_of_which_nothing_is_known_has_a_report(tmp_path: Path) -> None:
    page = build_report(RunFolder.create(tmp_path, "new")).read_text()
    parse(page)
    assert "before its first round was done" in page


def test_metrics_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    folder = write_sample(tmp_path)
    folder.metrics.write_text("nonsense\n" + folder.metrics.read_text())
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1"):
        build_report(folder)


def material(**kind: object) -> Material:
    return Material("run", None, Results.of(parse_event(event) for event in sample_events(**kind)))  # type: ignore[arg-type]


def test_the_headline_says_what_came_out() -> None:
    assert headline(material()).startswith("Federated training over 7 sites lowered held-out loss from 3.578 to 2.894")
    assert "At 6 of 7 sites it does better than training alone." in headline(material())
    failed = headline(material(status="failed", num_rounds=2))
    assert failed.startswith("This run failed after round 2. Federated training over 7 sites lowered")
    assert "interrupted after round 3" in headline(material(status="", num_rounds=3))
    assert "no held-out loss" in headline(material(status="", num_rounds=0))


def test_the_headline_hides_no_failure_of_training() -> None:
    events = sample_events(2, {"a": 3.0, "b": 3.0})
    worse = [
        event | {"loss": 3.5} if event["event"] == "evaluation" and event["round"] == 2 else event for event in events
    ]
    results = Results.of(parse_event(event) for event in worse)
    assert "raised held-out loss from 3.000 to 3.500" in headline(Material("run", None, results))


def test_the_winner_of_a_row_is_the_lowest_and_none_where_two_are_equal_or_alone() -> None:
    assert Row("a", 3.0, 2.0, 2.5).winner == "local_only"
    assert Row("a", 3.0, None, 2.5).winner == "federated"
    assert Row("a", 3.0, 2.5, 2.5).winner == ""
    assert Row("a", 3.0, None, None).winner == ""
    assert Row("a", 3.0, float("nan"), 3.5).winner == "base"


def test_an_end_that_was_gone_on_from_is_no_end() -> None:
    events = [parse_event(event) for event in [{"event": "end", "status": "failed"}, *sample_events(1, status="")]]
    assert Results.of(events).end is None


def test_the_best_round_is_the_first_with_the_lowest_finite_loss() -> None:
    losses = {0: 1.0, 1: float("nan"), 2: 3.0, 3: 2.0, 4: 2.0}
    rounds = [{"event": "evaluation", "round": r, "sites": {}, "loss": loss} for r, loss in losses.items()]
    assert Results.of(parse_event(event) for event in rounds).best_round == 3


def test_names_are_in_the_order_of_their_numbers() -> None:
    names = ["site-10", "site-2", "Site-1", "a007b", "a07b", "a7", "", "1", "b\u00b2", "9" * 5000]
    assert sorted(["site-10", "site-2", "Site-1"], key=natural) == ["Site-1", "site-2", "site-10"]
    assert len(sorted(names, key=natural)) == len(names)


def test_a_loss_too_large_for_a_perplexity_is_infinite() -> None:
    assert perplexity(1e6) == float("inf")
    assert perplexity(0.0) == 1.0
    assert perplexity(float("nan")) != perplexity(float("nan"))
