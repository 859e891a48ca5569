"""Count the bytes of tensors that are alive, while code runs on tensors without memory.

Under :class:`LiveBytes` every storage that an operation makes counts from its birth to its death, as autograd and Python
decide them. On the ``meta`` device nothing is computed and nothing is allocated, so the course of a training step's memory
is found on a machine that could never hold the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside it.

    Args:
        known: Tensors that were there before; views of them cost nothing.

    Attributes:
        now: Bytes alive.
        peak: The most that were alive at one time.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.now: int = 0
        self.peak: int = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity, num_bytes = storage._cdata, storage.nbytes()
        if identity in self._known:
            return
        self._known.add(identity)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, identity, num_bytes)

    def _forget(self, identity: int, num_bytes: int) -> None:
        self._known.discard(identity)
        self.now -= num_bytes
