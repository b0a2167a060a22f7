"""How much memory the machine has left for a pool in host memory, and giving back what is not needed."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

logger = logging.getLogger("pagedllm.model")


def available_memory() -> int:
    """Bytes that can be used without swapping: the machine's, or less where a container's limit is lower.

    Where the system does not tell (macOS, Windows), half of its memory, else 4 GiB.
    """
    return min(_machine_available(), _container_available(Path("/sys/fs/cgroup")))


def _machine_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def _container_available(folder: Path) -> int:
    """What a cgroup (version 2) still allows; page cache in it counts as used, so this is on the safe side."""
    try:
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text().strip()
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no cgroup, or limit "max"
        return 1 << 62


def give_back_memory() -> None:
    """Hand freed memory back to the system: after loading, glibc keeps hundreds of megabytes that nobody will use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        logger.debug("freed memory stays with the allocator here")
