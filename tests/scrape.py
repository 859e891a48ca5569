"""Asks an endpoint as Prometheus does, and reads the answer with the parser of Prometheus' own library."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Values by name and labels."""


def read(text: str) -> Figures:
    """Read the text format; a figure that is there twice is an error."""
    figures: Figures = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation or not family.name.startswith("fedllm_"), f"{family.name} has no help"
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in figures, key
            figures[key] = sample.value
    return figures


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def value(figures: Figures, name: str, /, **labels: str) -> float:
    """Return the one figure of a name that has these labels among its own."""
    [found] = [value for (found, own), value in figures.items() if found == name and own >= labels.items()]
    return found


class Scraper:
    """Asks again and again while it is open, as Prometheus would; the last answer is kept."""

    def __init__(self, port: int, pause_s: float = 0.02) -> None:
        self.text, self.num_answers = "", 0
        self._port, self._pause_s = port, pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.text = scrape(self._port)
                self.num_answers += 1
            except (OSError, urllib.error.URLError):
                pass
            time.sleep(self._pause_s)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
