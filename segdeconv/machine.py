"""What the last digits of a run depend on beside its recipe and data."""

from __future__ import annotations

import torch


def machine(device: torch.device) -> dict[str, str]:
    """Runs with equal answers repeat each other to the bit; others agree but for rounding."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"torch": str(torch.__version__), "threads": str(torch.get_num_threads()), "device": f"{device.type} {name}"}
