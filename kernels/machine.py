"""What the processor says of itself: its name, and how much it keeps in its caches."""

from __future__ import annotations

import platform
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def processor_name() -> str:
    """The processor's own name where the system tells it, else the architecture."""
    return processor_field("model name", "Model") or platform.processor() or platform.machine()


def processor_field(*names: str) -> str:
    """The first line of /proc/cpuinfo with one of these names, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return ""


def last_cache_bytes() -> int:
    """Size of the largest cache that core 0 reads through; 0 where the system does not say."""
    found = [0]
    for file in _CACHES.glob("index*/size"):
        try:
            text = file.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text[:-1].isdigit() and text[-1:] in _UNITS:
            found.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(found)
