"""The ServerApp, behind its entry point :mod:`server_app.entry`.

It reads the run config, opens the run's folder, puts the parts together, and hands over to :mod:`server_app.loop`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid

from fedllm.config import RunConfig, Scalar, flatten, read_run_config
from fedllm.errors import ConfigError, explain
from fedllm.logs import about, set_up_logging
from fedllm.manifest import Manifest
from fedllm.messages import Hello
from fedllm.runs import RunFolder, calling_app, git_revision, resolve_home
from server_app.broadcast import Broadcaster
from server_app.checkpoint import RunState, load_latest
from server_app.exchange import Exchange
from server_app.federation import Federation
from server_app.loop import Loop
from server_app.observability.figures import RunFigures
from server_app.observability.serve import shown
from server_app.recorder import Recorder
from server_app.roster import Roster
from server_app.transports import SPOOL, build_transport
from strategies.compatibility import check_compatibility, without_effect
from strategies.registry import build_strategy
from strategies.slots import Strategy

log = logging.getLogger(__name__)


def serve(grid: Grid, context: Context, *, fixed_sites: bool) -> None:
    """Run or resume one federation.

    Args:
        grid: Flower's grid.
        context: Flower's context, with the run config.
        fixed_sites: No further sites will come up, as in simulation.
    """
    set_up_logging()
    given = read_run_config(context.run_config)
    if given.simulation.attack != "none" and not fixed_sites:
        raise ConfigError(explain("attacks are for simulation; deployed sites know none", where="simulation.attack"))
    folder, config, state = open_run(given)
    run_federation(grid, folder, config, state, run_id=context.run_id, fixed_sites=fixed_sites)


def open_run(given: RunConfig) -> tuple[RunFolder, RunConfig, RunState | None]:
    """Make a new run's folder, or open the one to resume.

    Returns:
        The folder, the effective config, and the state to go on from, None for a new run.

    Raises:
        ConfigError: The config names something that there is not, or combines what cannot work together.
        CheckpointError: The folder exists already, or there is none to resume.
    """
    home = resolve_home(given.home)
    folder, config, state = _resume(home, given) if given.resume else _start(home, given)
    for key in without_effect(config):
        log.warning("%s has no effect with these settings", key)
    return folder, config, state


def run_federation(
    grid: Grid, folder: RunFolder, config: RunConfig, state: RunState | None, *, run_id: int, fixed_sites: bool
) -> None:
    """Drive a federation over Flower's grid to its end.

    Args:
        grid: Flower's grid.
        folder: The run's folder.
        config: The effective config.
        state: The state to go on from, None for a new run.
        run_id: Flower's id of the run.
        fixed_sites: No further sites will come up, as in simulation.
    """
    with folder.held(), about(run=folder.name, node="server"):
        _note_run(folder, config, run_id)
        figures = RunFigures(config, folder.path / SPOOL)
        recorder = Recorder(folder, [figures])
        if state is not None:
            recorder.rewind(state.round)
        with shown(figures, folder.name, config.observability):
            Loop(_federation(grid, folder, config, state, recorder, fixed_sites), state).run()


def _start(home: Path, config: RunConfig) -> tuple[RunFolder, RunConfig, None]:
    check_compatibility(config)
    config = with_needs(config, build_strategy(config))
    folder = RunFolder.create(home, config.name or _new_name(config))
    return folder, config, None


def with_needs(config: RunConfig, strategy: Strategy) -> RunConfig:
    """Return the config with what the strategy needs of the adapter, side factors or heads, which sites read there.

    Raises:
        ConfigError: Something is asked for that the strategy does not have.
    """
    needs = {"side_rank": strategy.side_rank, "num_heads": strategy.num_heads}
    for key, needed in needs.items():
        given = getattr(config.adapter, key)
        if given not in (0, needed):
            fix = "Remove it, or choose another strategy."
            problem = f"adapter.{key} has no effect with strategy {strategy.name!r}"
            raise ConfigError(explain(problem, expected=needed, found=given, fix=fix))
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=needs)})


def _new_name(config: RunConfig) -> str:
    return f"{config.strategy.name}-{datetime.now():%Y%m%d-%H%M%S}"


def _resume(home: Path, given: RunConfig) -> tuple[RunFolder, RunConfig, RunState | None]:
    """Open an earlier run with its own config; the new one says how it is watched, and may ask for more rounds."""
    folder = RunFolder.open(home, given.resume)
    stored = Manifest.read(folder.manifest).run_config
    num_rounds = max(stored.num_rounds, given.num_rounds)
    _warn_of_ignored(flatten(given), flatten(stored))
    config = stored.model_copy(update={"num_rounds": num_rounds, "observability": given.observability})
    state = load_latest(folder.checkpoints)
    log.info("resuming %s after round %d of %d", folder.name, state.round if state else 0, num_rounds)
    return folder, config, state


def _warn_of_ignored(given: Mapping[str, Scalar], stored: Mapping[str, Scalar]) -> None:
    """Say which settings of this call have no effect, because a resumed run keeps its own."""
    defaults = flatten(RunConfig())
    for key, value in given.items():
        if key.startswith("observability.") or key in ("resume", "home", "name", "num_rounds"):
            continue
        if value not in (defaults[key], stored[key]):
            log.warning("%s = %r has no effect: the resumed run keeps %r", key, value, stored[key])


def _note_run(folder: RunFolder, config: RunConfig, run_id: int) -> None:
    """Write the manifest of a new run, or note in it that the run goes on."""
    if folder.manifest.exists():
        manifest = Manifest.read(folder.manifest)
    else:
        source = calling_app() or Path(__file__).parent
        manifest = Manifest.of(folder.name, config, git_revision=git_revision(source))
    ids = (*manifest.flower_run_ids, run_id)
    manifest.model_copy(update={"config": flatten(config), "flower_run_ids": ids}).write(folder.manifest)


def _federation(
    grid: Grid,
    folder: RunFolder,
    config: RunConfig,
    state: RunState | None,
    recorder: Recorder,
    fixed_sites: bool,
) -> Federation:
    transport = build_transport(config, folder, is_simulation=fixed_sites)
    exchange = Exchange(grid)
    hello = Hello(run=folder.name, run_folder=str(folder.path), config=flatten(config))

    def left_out(site: str, reason: str) -> None:
        recorder.record({"event": "left_out", "site": site, "reason": reason})

    return Federation(
        config=config,
        folder=folder,
        recorder=recorder,
        exchange=exchange,
        roster=Roster(
            exchange,
            hello,
            left_out,
            fixed_sites=fixed_sites,
            agreement=state.agreement if state else None,
        ),
        strategy=build_strategy(config),
        transport=transport,
        broadcaster=Broadcaster(config, transport, folder.path / SPOOL),
    )
