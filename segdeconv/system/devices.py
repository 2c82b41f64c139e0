"""Devices, the precision that suits them, and the machine properties that affect rounding."""

import torch

from segdeconv.errors import UsageError, first_line, warn


def best_device() -> torch.device:
    """Return CUDA or MPS if available, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def named_device(name: str | torch.device) -> torch.device:
    """Return the device of a name such as `cpu` or `cuda:1`.

    Raises:
        UsageError: There is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch without CUDA
        raise UsageError(
            f"device={name} is not available here ({first_line(error)}) - leave it out for {best_device()}, or give cpu"
        ) from error
    return device


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def fast_precision(device: torch.device | None = None) -> str:
    """Return `bf16-mixed` where a device, by default the best, is faster with bfloat16 than float32, else `32-true`."""
    if (device or best_device()).type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16-mixed" if fast else "32-true"


def resolve_precision(precision: str, trained: str | None = None, device: torch.device | None = None) -> str:
    """Return the precision to use, resolving `auto` for this machine.

    Args:
        precision: `auto` or one of PRECISIONS.
        trained: The precision that the network was trained with. `auto` uses it if it is fast here, else `32-true`.
            None resolves `auto` to the fast precision of this machine.
        device: The device of the network; None for the best one.

    Raises:
        UsageError: The precision is unknown.
    """
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(f"precision={precision} is unknown - use auto, {', '.join(PRECISIONS)}")
    fast = fast_precision(device)
    if precision != "auto":
        if (precision, fast, (device or best_device()).type) == ("bf16-mixed", "32-true", "cpu"):
            warn(
                "precision=bf16-mixed: this CPU has no instructions for bfloat16; converting to float32 and back takes "
                "many times longer than 32-true, and twice the memory that is estimated - leave precision out"
            )
        return precision
    return fast if trained in (None, fast) else "32-true"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for a precision, disabled for `32-true`."""
    return torch.autocast(device.type, dtype=half_dtype(precision), enabled=precision.endswith("mixed"))


def half_dtype(precision: str) -> torch.dtype:
    """Return the dtype in which a mixed precision computes."""
    return torch.float16 if precision == "16-mixed" else torch.bfloat16


def machine(device: torch.device) -> dict[str, str]:
    """Return the properties of the machine that affect rounding.

    Runs on machines with equal properties are bit-identical; others agree up to rounding.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "threads": str(torch.get_num_threads()), "device": f"{device.type} {name}"}
