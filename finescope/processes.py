"""Whether a process of this machine is still there."""

import os


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of that number, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
