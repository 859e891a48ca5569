"""The ``fedllm`` command.

Exit status: 0 for success, 1 where what was asked for failed on its way, 2 where the request itself is wrong. An error of
ours is one line on standard error; ``--debug`` shows where it came from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fedllm.cli import config, generate, merge, report, runs
from fedllm.cli.command import Command, Group, add_commands
from fedllm.cli.provision import group as provision
from fedllm.cli.site import group as site
from fedllm.errors import AuditError, CancelledError, FedLLMError, QuorumError, TrainingError, TransportError
from fedllm.provenance import versions

COMMANDS: tuple[Command | Group, ...] = (
    runs.COMMAND,
    report.COMMAND,
    config.COMMAND,
    generate.COMMAND,
    merge.COMMAND,
    provision.GROUP,
    site.GROUP,
)
"""The subcommands, in the order of the help."""

FAILED, WRONG, INTERRUPTED = 1, 2, 130
_FAILURES = (AuditError, TransportError, TrainingError, QuorumError, CancelledError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status.

    Args:
        arguments: What follows the program's name, None for the process's own.
    """
    parsed = _parser().parse_args(arguments)
    try:
        command: Command = parsed.command
        status = command.run(parsed)
        sys.stdout.flush()
    except FedLLMError as error:
        if parsed.debug:
            raise
        print(f"fedllm {parsed.command_name}: {error}", file=sys.stderr)
        return FAILED if isinstance(error, _FAILURES) else WRONG
    except BrokenPipeError:  # the reader has seen enough, as in `fedllm config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    about = "Federated training of large language models: look at runs, explain settings, try adapters, serve a site."
    parser = argparse.ArgumentParser(prog="fedllm", description=about)
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the release of fedllm and of what it runs on"
    )
    add_commands(parser, COMMANDS)
    return parser


class _Version(argparse.Action):
    """Prints releases only when asked, because looking them up takes a moment."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 - argparse decides the signature
        values: object,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        found = versions()
        others = ", ".join(f"{name} {release}" for name, release in found.items() if name != "fedllm")
        print(f"fedllm {found['fedllm']} ({others})")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
