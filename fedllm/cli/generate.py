"""``fedllm generate``: ask a run's adapter something, or the bare base for comparison."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from fedllm.cli.command import Command, add_home, add_json, find_run
from fedllm.errors import AgreementError, CheckpointError, ConfigError, explain
from fedllm.manifest import Manifest
from fedllm.runs import RunFolder

Answer = Callable[[str], str]


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", default="", metavar="RUN", help="name or folder of a run (default: the newest)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the best round's adapter in place of the last one's")
    which.add_argument("--base", action="store_true", help="the base alone, without an adapter")
    parser.add_argument("--prompt", help="what to ask (default: every line of standard input)")
    text = "length of an answer in tokens (default: the run's evaluation.max_new_tokens)"
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=text)
    parser.add_argument("--device", default="auto", help="torch's name of a device (default: a GPU if there is one)")
    add_home(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ConfigError(
            explain("--max-new-tokens is too small", expected="1 or more", found=arguments.max_new_tokens)
        )
    folder = find_run(arguments.run, arguments.home)
    manifest = Manifest.read(folder.manifest)
    adapter = None if arguments.base else adapter_folder(folder, best=arguments.best)
    limit = arguments.max_new_tokens or manifest.run_config.evaluation.max_new_tokens
    answer = _load(folder, manifest, adapter, limit, arguments.device)
    for prompt in _prompts(arguments.prompt):
        text = answer(prompt)
        print(
            json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) if arguments.json else text, flush=True
        )
    return 0


def adapter_folder(folder: RunFolder, *, best: bool) -> Path:
    """Return where a run's final or best adapter is.

    Raises:
        CheckpointError: There is none yet.
    """
    path = folder.best if best else folder.adapter
    if not path.is_dir():
        known = [f"--{other.name}" for other in (folder.best,) if other.is_dir() and not best]
        fix = (
            f"Try {known[0]}." if known else "It is written when a round was evaluated, the last one at the run's end."
        )
        raise CheckpointError(explain("the run has no such adapter yet", expected=path, fix=fix))
    return path


def _load(folder: RunFolder, manifest: Manifest, adapter: Path | None, limit: int, device: str) -> Answer:
    """Load base and adapter and return what answers a prompt."""
    # Imported here because torch takes seconds, and no other subcommand needs it.
    from fedllm.home import default_cache_dir
    from fedllm.model.build import attach_adapter, layout_of, load_base, write_adapter
    from fedllm.model.export import load_peft_adapter, served_as
    from fedllm.model.generate import answer, without_adapter
    from fedllm.model.prompts.tensors import imported

    spec = manifest.run_config.spec
    if sys.stderr.isatty():
        print("loading the base; quantizing it the first time takes a minute ...", file=sys.stderr)
    base = load_base(spec.base, home=folder.path.parents[1], cache_dir=default_cache_dir(), device=device)
    check_base(manifest, base.fingerprint)
    model = attach_adapter(base, served_as(spec.adapter, adapter))
    if adapter is not None:
        layout = layout_of(model)
        write_adapter(model, layout, imported(load_peft_adapter(adapter), layout))

    def ask(prompt: str) -> str:
        with without_adapter(model) if adapter is None else nullcontext():
            text: str = answer(model, base.tokenizer, prompt, limit)
            return text

    return ask


def check_base(manifest: Manifest, found: str) -> None:
    """Refuse a base that is not the one of the run.

    Raises:
        AgreementError: Its fingerprint is another one.
    """
    if manifest.base_fingerprint and found != manifest.base_fingerprint:
        fix = "Point the run's base to the files that it was trained on."
        expected = manifest.base_fingerprint
        raise AgreementError(explain("the run was trained on another base", expected=expected, found=found, fix=fix))


def _prompts(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ask something; an empty line ends.", file=sys.stderr)
    while line := _read_line(interactive):
        yield line


def _read_line(interactive: bool) -> str:
    """Return the next line; empty at the end of input, and where a person enters nothing."""
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip()
    return next((text for line in sys.stdin if (text := line.strip())), "")


COMMAND = Command("generate", "ask a run's adapter, or its base, for answers", _configure, _run)
