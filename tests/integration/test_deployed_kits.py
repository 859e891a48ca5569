"""A federation as institutions run it, from provisioned kits, through all that goes wrong in a deployment.

Real processes with TLS and node authentication, every computer in a network namespace of its own, SmolLM2 as the base. One
run goes through everything; what each part of it left behind is looked at by a test of its own:

1. Seven sites start. Two cannot connect (a key that the server does not know, a kit of another federation). Of the others
   one holds another base.
2. In round 1 a site is killed with all its processes and started again, and the SuperLink is killed and started again.
3. In round 2 the ServerApp is killed. Before the run is resumed, one site's owner forbids it, another's certificate ends.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from client_app.service.status import Status
from fedllm.home import default_cache_dir
from fedllm.model.fingerprint import base_fingerprint
from fedllm.model.source import resolve
from fedllm.model.spec import BaseSpec
from fedllm.provision.authority import Authority, write_certificate
from fedllm.provision.keys import new_key, read_key, write_node_key
from tests.bases import SMOLLM
from tests.flower_process import wait_for
from tests.provisioned import NGINX, Provisioned, make_kits, provisioned
from tests.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)"),
    pytest.mark.timeout(900),
]

GOOD = ("north", "east", "south")
OTHER_BASE, WRONG_KEY, FOREIGN = "west", "wrong-key", "foreign"
RUN = "deployed"
SETTINGS = {
    "name": RUN,
    "num_rounds": 2,
    "model.source": "path:base.gguf",
    "rounds.min_sites": 2,
    "adapter.rank": 4,
    "data.max_length": 64,
    "train.local_steps": 1,
    "train.batch_size": 1,
    "evaluation.every": 2,
    "evaluation.local_only": False,
    "evaluation.prompt": "",
}
"""As little work as there can be: what is looked at is what happens around it."""


@dataclass(frozen=True)
class Course:
    """What the run left behind.

    Attributes:
        folder: The run's folder.
        events: Its events.
        logs: What was printed, by program: the two calls of `flwr run`, and every site's service.
        statuses: What the sites that could not connect said of themselves.
    """

    folder: Path
    events: list[dict[str, object]]
    logs: Mapping[str, str]
    statuses: Mapping[str, Status]

    def rounds(self) -> list[dict[str, object]]:
        return [event for event in self.events if event["event"] == "round"]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    folder = tmp_path_factory.mktemp("kits")
    sites = (*GOOD, OTHER_BASE, WRONG_KEY, FOREIGN)
    with provisioned(folder, sites) as federation:
        for site in sites:
            make_ready(federation, site)
        statuses = begin(federation, sites)
        first = federation.submit("first", SETTINGS)
        disturb_round_1(federation)
        disturb_round_2(federation)
        with suppress(psutil.NoSuchProcess):
            first.kill()
        forbid(federation.kit("south"))
        end_certificate(federation, OTHER_BASE)
        give_base(federation.kit(OTHER_BASE))
        second = {"resume": RUN, "num_rounds": SETTINGS["num_rounds"]}
        assert federation.submit("second", second).wait(300) == 0, federation.log("second")
        logs = {name: federation.log(name) for name in ("first", "second")}
        logs |= {site: federation.service_log(site) for site in sites}
        yield Course(folder / "runs" / RUN, federation.events(RUN), logs, statuses)


def make_ready(federation: Provisioned, site: str) -> None:
    """Do what a site's people do with their kit, and what some of them do wrong."""
    kit = federation.kit(site)
    text = (kit / "site.toml").read_text()
    text = re.sub(r"(?m)^source = .*$", 'source = "file:train.jsonl"', text)
    (kit / "site.toml").write_text(re.sub(r"(?m)^cache_dir = .*$", f'cache_dir = "{default_cache_dir()}"', text))
    rows = [{"prompt": f"Who is number {i}?", "completion": f"Number {i} of {site}."} for i in range(12)]
    (kit / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if site == OTHER_BASE:
        make_tiny_model(kit / "base.gguf")
    else:
        give_base(kit)
    if site == WRONG_KEY:
        write_node_key(kit / "node.key", new_key())
    if site == FOREIGN:
        elsewhere = federation.folder / "elsewhere"
        elsewhere.mkdir()
        make_kits(elsewhere, federation, [site])
        for name in ("ca.crt", "site.crt", "site.key"):
            shutil.copy(elsewhere / "local-deployment" / "kits" / site / name, kit)


def give_base(kit: Path) -> None:
    """Put SmolLM2 where the run looks for the base."""
    if (kit / "base.gguf").is_dir():
        shutil.rmtree(kit / "base.gguf")
    (kit / "base.gguf").symlink_to(real_base())


def real_base() -> Path:
    return resolve(SMOLLM, Path()).weights[0]


def begin(federation: Provisioned, sites: tuple[str, ...]) -> dict[str, Status]:
    """Start all sites; return what those say that cannot connect, and stop them."""
    for site in sites:
        federation.start_site(site)
    refused = (WRONG_KEY, FOREIGN)
    wait_for(lambda: all(federation.status(site).note for site in refused), timeout_s=300, poll_s=0.2)
    statuses = {site: federation.status(site) for site in refused}
    for site in refused:
        federation.processes[site].terminate()
    for site in (*GOOD, OTHER_BASE):
        wait_for(lambda site=site: "libraries are loaded" in federation.service_log(site), timeout_s=300, poll_s=0.2)
        assert federation.status(site).phase == "connected"
    return statuses


def disturb_round_1(federation: Provisioned) -> None:
    """Kill a site and the SuperLink while sites train, and start both again."""
    wait_for_training(federation, "north", 1)
    federation.kill("north")
    federation.start_site("north")
    wait_for_training(federation, "east", 1)
    federation.kill("superlink")
    federation.start_superlink()
    wait_for(lambda: has(federation, "round", 1), timeout_s=300, poll_s=0.2)


def disturb_round_2(federation: Provisioned) -> None:
    """Kill the ServerApp while sites train."""
    wait_for_training(federation, "east", 2)
    below = psutil.Process(federation.processes["superexec"].pid).children(recursive=True)
    [server] = [process for process in below if any("flwr-serverapp" in part for part in process.cmdline())]
    server.kill()
    assert not has(federation, "round", 2)


def wait_for_training(federation: Provisioned, site: str, times: int) -> None:
    """Wait until a site was asked to train so many times."""
    words = "Receiving: train message"
    wait_for(lambda: federation.service_log(site).count(words) >= times, timeout_s=300, poll_s=0.1)


def has(federation: Provisioned, kind: str, round_: int) -> bool:
    return any(event["event"] == kind and event.get("round") == round_ for event in federation.events(RUN))


def forbid(kit: Path) -> None:
    """Let a data owner allow other runs only."""
    text = (kit / "site.toml").read_text()
    (kit / "site.toml").write_text(text.replace('runs = ["*"]', 'runs = ["diabetes-*"]'))


def end_certificate(federation: Provisioned, site: str) -> None:
    """Give a site a certificate of a moment."""
    authority = Authority.read(federation.folder / "local-deployment" / "authority")
    kit = federation.kit(site)
    certificate = authority.site_certificate(read_key(kit / "site.key").public_key(), site, days=0)
    write_certificate(kit / "site.crt", certificate)


def test_a_killed_site_a_killed_superlink_and_a_killed_serverapp_do_not_end_the_run(course: Course) -> None:
    assert course.events[-1]["event"] == "end"
    assert course.events[-1]["status"] == "finished", course.logs["second"]
    assert [event["round"] for event in course.rounds()] == [1, 2]
    assert (course.folder / "adapter" / "adapter_model.safetensors").is_file()
    evaluations = {event["round"]: event["loss"] for event in course.events if event["event"] == "evaluation"}
    assert sorted(evaluations) == [0, 2]
    assert evaluations[2] < evaluations[0]


def test_a_site_killed_in_the_middle_of_a_round_is_asked_again(course: Course) -> None:
    first, second = course.rounds()
    assert first["participants"] == sorted(GOOD), first["rejected"]
    assert "asking north again" in course.logs["first"] + (course.folder / "log.txt").read_text()
    assert "north" in second["participants"]


def test_sites_train_on_the_real_base(course: Course) -> None:
    manifest = json.loads((course.folder / "manifest.json").read_text())
    assert manifest["base_fingerprint"] == base_fingerprint(resolve(SMOLLM, Path()), BaseSpec())
    assert manifest["num_parameters"] > 100_000


def test_a_site_with_a_wrong_key_or_of_another_federation_says_why_it_is_not_let_in(course: Course) -> None:
    assert "not admitted" in course.statuses[WRONG_KEY].sentence()
    assert "a new site must be registered by the operator" in course.statuses[WRONG_KEY].sentence()
    assert "the server's certificate is not of this federation" in course.statuses[FOREIGN].sentence()
    assert not any(course.statuses[site].node_id for site in course.statuses)


def test_a_site_with_another_base_is_left_out_with_both_fingerprints(course: Course) -> None:
    [reason] = [line for line in course.logs["first"].splitlines() if "left out" in line and OTHER_BASE in line]
    real = json.loads((course.folder / "manifest.json").read_text())["base_fingerprint"]
    assert f"base: the federation has {real}, the site has " in reason


def test_a_site_that_forbids_the_run_and_one_whose_certificate_ended_are_left_out_and_the_others_finish(
    course: Course,
) -> None:
    text = course.logs["second"]
    assert "left out south: PolicyError: " in text
    assert "expected diabetes-* (policy.runs); found deployed; in site.toml of south" in text
    assert re.search(
        rf"left out {OTHER_BASE}: ConfigError: the site's certificate ended on .* UTC; in .*site\.crt", text
    )
    assert "the site's certificate ended on" in course.logs[OTHER_BASE], "the site's people read it too"
    assert course.rounds()[1]["participants"] == ["east", "north"]
