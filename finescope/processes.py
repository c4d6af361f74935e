"""What this machine says of processes: which are there, and what memory another could take."""

import os
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of that number, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that a new process could take on this machine; None where the system does not tell.

    Of a container's use the file cache that the kernel would drop first is not counted: a run that has just read its
    corpus would fill the container with it.
    """
    found = []
    information = root / "proc/meminfo"
    if information.exists():
        lines = dict(line.split(":", 1) for line in information.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = root / "sys/fs/cgroup"
    limit, used, details = group / "memory.max", group / "memory.current", group / "memory.stat"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        counts = dict(line.split() for line in details.read_text().splitlines()) if details.exists() else {}
        found.append(int(limit.read_text()) - int(used.read_text()) + int(counts.get("inactive_file", 0)))
    return min(found, default=None)
