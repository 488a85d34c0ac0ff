"""Messages between this process and its own children: pickles with their length before them, over a socket."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(channel: socket.socket, value: Any, descriptor: int | None = None) -> None:
    """Send a value, and an open file with it.

    Raises
    ------
    OSError
        If the other side is gone.
    """
    data = pickle.dumps(value, protocol=5)
    header = _LENGTH.pack(len(data))
    socket.send_fds(channel, [header], [] if descriptor is None else [descriptor])
    channel.sendall(data)


def receive(channel: socket.socket) -> Any:
    """Return the next value.

    Raises
    ------
    EOFError, ConnectionError
        If the other side is gone.
    TimeoutError
        If the channel has a time limit, and nothing comes within it.
    """
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    return pickle.loads(_exactly(channel, length))


def receive_with_descriptor(channel: socket.socket) -> tuple[Any, int]:
    """Return the next value and the open file that comes with it; raises as `receive` does."""
    header, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, 1)
    if not header:
        raise EOFError("the other side has closed the channel")
    header += _exactly(channel, _LENGTH.size - len(header))
    (length,) = _LENGTH.unpack(header)
    return pickle.loads(_exactly(channel, length)), descriptors[0]


def _exactly(channel: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count:
        received = channel.recv_into(view[filled:])
        if not received:
            raise EOFError("the other side has closed the channel")
        filled += received
    return data
