"""What this machine is: versions, processor, memory, GPUs."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..kernels.machine import processor_field, processor_name

PACKAGES = (
    "gossamer", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "numpy",
    "datasets", "peft", "bitsandbytes", "triton", "lm_eval",
)  # fmt: skip
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vbmi2", "avx512_bf16", "amx_bf16", "amx_int8", "neon", "sve")


def describe_environment() -> dict[str, Any]:
    """Plain data, for `gossamer env`: nothing in it is needed to run."""
    import torch

    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "packages": {name: package_version(name) or "absent" for name in PACKAGES},
        "processor": processor_name(),
        "processor features": processor_features(),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "GPUs": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("GOSSAMER_")},
    }


def package_version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor_features() -> list[str]:
    """The features that decide which kernel runs; empty where the system does not list them."""
    found = set(processor_field("flags", "Features").replace("asimd", "neon").split())
    return [feature for feature in _FEATURES if feature in found]


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory, or the limit of the container where that is smaller. 0 when the system does not say."""
    if sys.platform == "win32" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
