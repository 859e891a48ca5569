"""Memory: what training needs by estimate, against what the device has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, failure, ok, warning
from client_app.doctor.hardware import device_of, is_there
from fedllm.model.footprint import Footprint
from fedllm.text import human_bytes

CGROUP = Path("/sys/fs/cgroup")

TIGHT = 0.8
"""Share of the free memory from which on there is a warning."""

FIX = (
    "Use a device with more memory, or ask the operator for a smaller train.batch_size or data.max_length, for "
    "model.gradient_checkpointing, or for model.quantization='nf4'."
)


def examine_memory(case: Case) -> Iterator[Finding]:
    """Compare the estimate for the run with the site's device."""
    need, device = case.footprint, device_of(case.owner.hardware.device)
    if isinstance(need, str):
        fix = "Fetch the base first; if it is here, watch the first round's use of memory."
        yield warning("memory", f"not estimated: {need}", fix)
    elif device == "cpu":
        yield judge(need, *main_memory())
    elif is_there(device):  # else the device's own line says so
        yield judge(need, *torch.cuda.mem_get_info(device))


def judge(need: Footprint, free: int, total: int) -> Finding:
    """Compare a need with what is free now, and with all there is."""
    parts = {"base": need.base, "adapter": need.adapter, "optimizer": need.optimizer, "step": need.step}
    listed = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())
    message = (
        f"training needs about {human_bytes(need.peak)} ({listed}); {human_bytes(free)} of {human_bytes(total)} free"
    )
    facts = {f"{name}_bytes": size for name, size in parts.items()}
    facts |= {"needed_bytes": need.peak, "free_bytes": free, "total_bytes": total}
    if need.peak > total:
        return failure("memory", message, FIX, **facts)
    if need.peak > TIGHT * free:
        return warning("memory", message, f"End what else uses the device. {FIX}", **facts)
    return ok("memory", message, **facts)


def main_memory(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Return free and all bytes of main memory, within what a container may use."""
    memory = psutil.virtual_memory()
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or "max"
        return memory.available, memory.total
    return min(memory.available, max(0, limit - used)), min(memory.total, limit)
