"""Devices, the precision they are fast at, and what the last digits of a run depend on."""

import torch

from segdeconv.errors import UsageError


def best_device() -> torch.device:
    """An accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def fast_precision() -> str:
    """`bf16-mixed` where this machine multiplies bfloat16 faster than float32, else `32-true`."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16-mixed" if fast else "32-true"


def resolve_precision(wanted: str, trained: str | None = None) -> str:
    """What `precision=auto` means here: the one trained with if it is fast on this machine, else float32."""
    if wanted not in ("auto", *PRECISIONS):
        raise UsageError(f"precision={wanted} is unknown - it is auto, {', '.join(PRECISIONS)}")
    if wanted != "auto":
        return wanted
    fast = fast_precision()
    return fast if trained in (None, fast) else "32-true"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network of this precision runs."""
    return torch.autocast(device.type, dtype=half_dtype(precision), enabled=precision.endswith("mixed"))


def half_dtype(precision: str) -> torch.dtype:
    """The dtype in which a mixed precision computes."""
    return torch.float16 if precision == "16-mixed" else torch.bfloat16


def machine(device: torch.device) -> dict[str, str]:
    """Runs with equal answers repeat each other to the bit; others agree but for rounding."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "threads": str(torch.get_num_threads()), "device": f"{device.type} {name}"}
