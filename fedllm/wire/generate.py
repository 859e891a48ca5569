"""Write ``updates_pb2.py`` and ``updates_pb2.pyi`` anew from ``updates.proto``.

    python -m fedllm.wire.generate

Needs grpcio-tools. The compiler's check of its own version is left out: it would refuse every protobuf runtime older
than the compiler at hand, while the rest of what it writes is the same for all compilers and runs on protobuf 5 to 7.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROTO = HERE / "updates.proto"
GENERATED = (HERE / "updates_pb2.py", HERE / "updates_pb2.pyi")

_VERSION_CHECK = re.compile(
    r"^(# Protobuf Python Version: .*|from google\.protobuf import runtime_version .*"
    r"|_runtime_version\.ValidateProtobufRuntimeVersion\((?:\n .*)*\n\))\n",
    re.MULTILINE,
)


def generate() -> dict[Path, str]:
    """Return the text of each generated file."""
    from grpc_tools import protoc  # needed by developers alone

    with tempfile.TemporaryDirectory() as folder:
        root = HERE.parents[1]
        outputs = [f"--python_out={folder}", f"--pyi_out={folder}"]
        status = protoc.main(["protoc", f"-I{root}", *outputs, str(PROTO)])
        if status != 0:
            sys.exit(status)
        return {path: _portable((Path(folder) / path.relative_to(root)).read_text()) for path in GENERATED}


def _portable(text: str) -> str:
    return _VERSION_CHECK.sub("", text)


if __name__ == "__main__":
    for path, text in generate().items():
        path.write_text(text)
