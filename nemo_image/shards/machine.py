"""This machine and its processes, as told in file names and leases that other machines may see."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path


@functools.cache
def machine_id() -> str:
    """Return 16 hexadecimal digits that stand for this machine since it started, and this container on it.

    Process ids mean something only together with them.
    """
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux has these
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def is_running(pid: int) -> bool:
    """Tell whether a process of this machine runs. Its number may be another's by now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
