"""The device that trains: is it there, does torch see it, and does a quantized product come out right on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from client_app.doctor.case import Case
from client_app.doctor.finding import Finding, failure, ok, warning
from fedllm.model.quantize import quantized_linear
from fedllm.model.spec import BaseSpec
from fedllm.text import human_bytes

DRIVER = Path("/proc/driver/nvidia/version")

MAX_ERROR = 0.25
"""Largest error of a product with a quantized weight, relative to its norm. NF4 gives 0.1 on normal weights, a broken
kernel 1 or more."""


def examine_hardware(case: Case) -> Iterator[Finding]:
    """Look at the device that the site's file names, and compute on it."""
    wanted = case.owner.hardware.device
    found = examine_device(wanted)
    yield found
    device = device_of(wanted)
    if device.startswith("cuda") and not is_there(device):
        return
    yield examine_product(case.run.model, device)


def device_of(wanted: str) -> str:
    """Return the torch device that a site's setting means."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def is_there(device: str) -> bool:
    """Say whether torch sees a CUDA device."""
    index = int(device.partition(":")[2] or 0)
    return torch.cuda.is_available() and index < torch.cuda.device_count()


def examine_device(wanted: str) -> Finding:
    """Say whether the device of a site's setting is there."""
    device = device_of(wanted)
    if device == "cpu":
        return _cpu(is_chosen=wanted == "cpu")
    if not is_there(device):
        message = f"hardware.device is {wanted!r}, and torch sees {torch.cuda.device_count()} CUDA devices"
        return failure("device", message, _why_no_cuda() or "Correct hardware.device, or CUDA_VISIBLE_DEVICES.")
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    bindings: Any = torch._C
    driver = bindings._cuda_getDriverVersion()
    message = (
        f"{properties.name}, {human_bytes(total)} of which {human_bytes(free)} free; driver for CUDA "
        f"{driver // 1000}.{driver % 1000 // 10}, torch built for CUDA {torch.version.cuda}"
    )
    return ok("device", message, name=properties.name, total_bytes=total, free_bytes=free, driver=driver)


def examine_product(spec: BaseSpec, device: str) -> Finding:
    """Multiply by a quantized weight on a device, there and back, and compare with the dense weight's products."""
    kind = spec.quantization
    if kind == "none":
        return ok("quantization", "not used by this run")
    try:
        error = product_error(spec, device)
    except (RuntimeError, AssertionError, ImportError, OSError, AttributeError) as problem:
        found = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        fix = "Install bitsandbytes and torch for this machine's CUDA: python -m bitsandbytes says what is missing."
        return failure("quantization", f"a {kind} product fails on {device}: {found}", fix)
    return judge_product(error, kind, device)


def judge_product(error: float, kind: str, device: str) -> Finding:
    """Say whether a relative error is what quantization gives, or that of a broken kernel."""
    message = f"a {kind} product on {device} is within {100 * error:.1f} % of the exact one, forward and backward"
    if not error <= MAX_ERROR:
        fix = "Install another release of bitsandbytes, torch or the driver: this one computes wrong."
        return failure("quantization", message, fix, error=min(error, 1e9) if math.isfinite(error) else 1e9)
    return ok("quantization", message, error=round(error, 4))


def product_error(spec: BaseSpec, device: str) -> float:
    """Return the larger relative error of a quantized layer's product and of its gradient."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=draw) / 16  # [O, I]
    x, upstream = torch.randn(32, 512, generator=draw), torch.randn(32, 256, generator=draw)
    layer = quantized_linear(weight, spec, device)
    given = x.clone().to(device).requires_grad_(True)
    product = layer(given)
    product.backward(upstream.to(device))
    assert given.grad is not None, "autograd fills it in"
    pairs = ((product.detach(), x @ weight.T), (given.grad.detach(), upstream @ weight))
    return max(float((found.float().cpu() - exact).norm() / exact.norm()) for found, exact in pairs)


def _cpu(*, is_chosen: bool) -> Finding:
    if is_chosen:
        return ok("device", "the CPU, as hardware.device says")
    why = _why_no_cuda()
    fix = why or "Give the site a GPU; for small models a CPU will do, and hardware.device = 'cpu' ends this warning."
    return warning("device", "torch sees no CUDA device, so the CPU trains, many times slower", fix)


def _why_no_cuda() -> str:
    if torch.version.cuda is None and DRIVER.exists():
        return "There is a GPU driver, but this torch is built without CUDA: install torch from a CUDA index."
    if torch.version.cuda is not None and not DRIVER.exists():
        return "This torch is built for CUDA, but there is no NVIDIA driver (in a container: start it with GPUs)."
    return ""
