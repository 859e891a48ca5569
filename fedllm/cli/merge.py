"""``fedllm merge``: write a run's adapter and its base as one dense model."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedllm.cli.command import Command, add_home, find_run
from fedllm.cli.generate import adapter_folder, check_base
from fedllm.errors import ConfigError, explain
from fedllm.manifest import Manifest
from fedllm.model.spec import LoraSpec

DTYPES = ("bfloat16", "float16", "float32")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to write the model, a new or empty folder")
    parser.add_argument("--run", default="", metavar="RUN", help="name or folder of a run (default: the newest)")
    parser.add_argument("--best", action="store_true", help="the best round's adapter in place of the last one's")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="dtype of the weights (default: %(default)s)"
    )
    add_home(parser)


def _run(arguments: argparse.Namespace) -> int:
    target: Path = arguments.folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(explain("there is something already", where=target, fix="Name a new or empty folder."))
    folder = find_run(arguments.run, arguments.home)
    manifest = Manifest.read(folder.manifest)
    trained = manifest.run_config.spec.adapter
    if not isinstance(trained, LoraSpec):
        fix = "Use the adapter's folder with PEFT."
        raise ConfigError(explain("a soft prompt cannot be merged into weights", found=trained.kind, fix=fix))
    source = adapter_folder(folder, best=arguments.best)
    # Imported here because torch takes seconds.
    from fedllm.home import default_cache_dir
    from fedllm.model.build import attach_adapter, layout_of, load_base
    from fedllm.model.export import load_peft_adapter, served_as
    from fedllm.model.merge import save_merged

    spec = served_as(trained, source)
    assert isinstance(spec, LoraSpec), "LoRA is served as LoRA"
    base = load_base(
        manifest.run_config.model, home=folder.path.parents[1], cache_dir=default_cache_dir(), device="cpu"
    )
    check_base(manifest, base.fingerprint)
    save_merged(target, base, spec, layout_of(attach_adapter(base, spec)), load_peft_adapter(source), arguments.dtype)
    print(target)
    return 0


COMMAND = Command("merge", "write a run's adapter and its base as one dense model", _configure, _run)
