"""Whether the process that writes a run's events is still there: a killed one can no longer say that it ended."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_NAMESPACE = Path("/proc/self/ns/pid")  # of Linux: containers count their processes each for itself


def this_process() -> dict[str, Any]:
    """What tells this process from others for as long as it lives: `place`, where its number counts, and `pid`."""
    namespace = os.readlink(_NAMESPACE) if _NAMESPACE.is_symlink() else ""
    return {"place": f"{socket.gethostname()} {namespace}".strip(), "pid": os.getpid()}


def is_gone(process: Mapping[str, Any], last_seen: float) -> bool:
    """Whether a process has ended; False where that cannot be known from here.

    Args:
        process: what `this_process` said there.
        last_seen: when it was alive, in seconds since 1970. A process of its number that began later is another one.
    """
    if process.get("place") != this_process()["place"]:
        return False
    try:
        found = psutil.Process(int(process["pid"]))
        return found.status() == psutil.STATUS_ZOMBIE or found.create_time() > last_seen
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
