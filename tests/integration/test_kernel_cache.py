"""Machine code of the kernels is kept once for a machine, and never taken from where somebody else could have put it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.codecs.kernel_cache import private_cache_dir

PACKAGE = Path(__file__).parents[2] / "fedllm"
COMPILE = """
import numpy as np
from fedllm.codecs.dense import to_bf16_bits
print(to_bf16_bits(np.ones(3, np.float32))[0])
"""


def compile_one(app: Path, home: Path, **environment: str) -> None:
    """Compile a kernel in a new process, in a copy of the package below a folder, as Flower makes one."""
    if not app.exists():
        shutil.copytree(PACKAGE, app / "fedllm", ignore=shutil.ignore_patterns("__pycache__"))
    given = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "FEDLLM_"))}
    variables = {**given, "PYTHONPATH": str(app), "HOME": str(home), **environment}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True, env=variables, cwd=app
    )
    assert run.stdout.strip() == str(0x3F80)


def code_in(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("dense.*.nb?")}


def test_a_second_copy_of_the_app_compiles_nothing(tmp_path: Path) -> None:
    compile_one(tmp_path / "one", tmp_path / "home")
    kept = code_in(tmp_path / "home/.cache/fedllm/kernels")
    assert len(kept) == 2, "an index and one kernel's code"
    compile_one(tmp_path / "two", tmp_path / "home")
    assert code_in(tmp_path) == {f"home/.cache/fedllm/kernels/{name}": time for name, time in kept.items()}


def test_a_changed_source_is_compiled_again_wherever_in_the_package_the_change_is(tmp_path: Path) -> None:
    compile_one(tmp_path / "one", tmp_path / "home")
    kept = code_in(tmp_path / "home")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with (tmp_path / "two/fedllm/codecs/params.py").open("a") as source:
        source.write("# changed\n")
    compile_one(tmp_path / "two", tmp_path / "home")
    assert len(code_in(tmp_path / "home")) == 2 * len(kept)


def test_the_cache_may_be_elsewhere(tmp_path: Path) -> None:
    compile_one(tmp_path / "one", tmp_path / "home", FEDLLM_CACHE=str(tmp_path / "cache"))
    assert code_in(tmp_path / "cache/kernels")
    compile_one(tmp_path / "one", tmp_path / "home", NUMBA_CACHE_DIR=str(tmp_path / "numba"))
    assert code_in(tmp_path / "numba")
    assert not code_in(tmp_path / "home")


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made here, not even by root")
    compile_one(tmp_path / "one", tmp_path / "home", NUMBA_CACHE_DIR=str(tmp_path / "file/numba"))
    assert code_in(tmp_path / "one/fedllm/codecs/__pycache__"), "numba's own place"


def test_a_read_only_installation_keeps_code_in_the_temporary_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made here, not even by root")
    compile_one(tmp_path / "one", tmp_path, FEDLLM_CACHE=str(tmp_path / "file/cache"), TMPDIR=str(tmp_path))
    assert code_in(tmp_path / f"fedllm-kernels-{os.getuid()}")


def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    places = [tmp_path / "cache/kernels", tmp_path / f"fedllm-kernels-{os.getuid()}"]
    for folder in places:
        assert private_cache_dir() == folder
        assert folder.stat().st_mode & 0o077 == 0
        assert private_cache_dir() == folder
        folder.chmod(0o777)  # somebody else could have planted machine code there
    new = private_cache_dir()
    assert new not in places
    assert os.access(new, os.W_OK)


def test_a_link_to_somewhere_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/kernels").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert private_cache_dir() == tmp_path / f"fedllm-kernels-{os.getuid()}"
