"""Ports for servers that tests start."""

import random
import socket
from contextlib import ExitStack

_BELOW_EPHEMERAL = range(20_000, 32_000)
"""Above those of Ray's workers, and no outgoing connection is given one of them meanwhile."""


def free_ports(count: int) -> list[int]:
    """So many different ports of 127.0.0.1 that were free a moment ago."""
    with ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = random.choice(_BELOW_EPHEMERAL)
            listener = held.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        return ports
