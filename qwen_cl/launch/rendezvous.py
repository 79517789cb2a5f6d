"""Set up the store at which the ranks of a run meet and report to their supervisor (qwen_cl/launch/heartbeat.py)."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def open_store() -> TCPStore:
    """Open the store for the ranks' rendezvous and their reports to this process.

    Without MASTER_PORT the system chooses the port, so it cannot be taken.

    Raises:
        RuntimeError: MASTER_PORT is taken.
    """
    from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

    port = int(os.environ.get("MASTER_PORT", "0"))
    try:
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    except DistNetworkError as error:
        raise RuntimeError(
            f"MASTER_PORT ({port}) is not available (in use?); set another, or unset it to use a free one"
        ) from error


def free_port() -> int:
    """Return a port to use without a store that would hold it: free now, and likely still free when the ranks need it.

    Chosen at random outside the system's range for outgoing connections (``ip_local_port_range``).

    Raises:
        OSError: all ports that were tried are taken.
    """
    first, last = map(int, EPHEMERAL.read_text(encoding="ascii").split())
    others = [port for port in range(20_000, 65_536) if not first <= port <= last]
    *tries, final = random.sample(others, min(100, len(others))) or [0]
    for port in tries:
        with suppress(OSError), socket.create_server(("", port)):
            return port
    with socket.create_server(("", final)) as server:
        return int(server.getsockname()[1])


def rendezvous_variables(address: str, port: int) -> dict[str, str]:
    """Return the variables that make torch in a rank use the existing store (torch/distributed/rendezvous.py)."""
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
