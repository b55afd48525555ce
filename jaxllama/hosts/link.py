"""A connection between two processes of a group: messages of a kind, each with its length."""

from __future__ import annotations

import errno
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

from jaxllama.errors import LockstepError

_HEAD = struct.Struct("!BI")
HELLO, START, BEAT, MESSAGE, STOP, FAILED, QUESTION, ANSWER = range(1, 9)
_MAX_MESSAGE_BYTES = 1 << 28


@dataclass(eq=False)
class Link:
    """A connection to another process. `heard` is when anything last came from it."""

    sock: socket.socket
    process_id: int
    name: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    heard: float = field(default_factory=time.monotonic)
    is_done: bool = False

    def send(self, kind: int, payload: bytes = b"") -> None:
        with self.lock:
            self.sock.sendall(_HEAD.pack(kind, len(payload)) + payload)

    def try_send(self, kind: int, payload: bytes = b"") -> None:
        """Sends a short message unless that would block: whoever reads nothing must not hold up the others."""
        if self.lock.acquire(blocking=False):
            try:
                # Not `select`, which knows no descriptor past 1,023: a server of many connections has those.
                poll = select.poll()
                poll.register(self.sock, select.POLLOUT)
                if any(event & select.POLLOUT for _, event in poll.poll(0)):
                    self.sock.sendall(_HEAD.pack(kind, len(payload)) + payload)
            except (OSError, ValueError):
                pass  # The reader of this link sees it too, and says so.
            finally:
                self.lock.release()

    def is_open(self) -> bool:
        """Whether the other end still holds the connection."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def receive(self, max_bytes: int = _MAX_MESSAGE_BYTES) -> tuple[int, bytes]:
        """The next message. Raises: OSError or EOFError when the connection is gone, ValueError for nonsense."""
        kind, size = _HEAD.unpack(self._read(_HEAD.size))
        if not HELLO <= kind <= ANSWER or size > max_bytes:
            raise ValueError(f"a message of kind {kind} and {size} bytes")
        return kind, self._read(size)

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self.sock.recv_into(view)
            if not count:
                raise EOFError
            self.heard = time.monotonic()
            view = view[count:]
        return bytes(data)


def listen(host: str, port: int) -> socket.socket:
    """Listens at `host` alone if that is an address of this machine, else everywhere.

    Raises: LockstepError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        raise LockstepError(f"the coordinator's host {host!r} is not known: {error}") from None
    # Many systems give their own name a loopback address, where no other machine finds it.
    is_own_name = str(address).startswith("127.") and host != "localhost" and not host.startswith("127.")
    try:
        return socket.create_server(("" if is_own_name else host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise LockstepError(f"process 0 cannot listen at {host}:{port}: {error}") from None
    return socket.create_server(("", port), family=family, backlog=128)


def set_up(sock: socket.socket) -> None:
    """No timeout, and no waiting to send a small message with the next."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def free_port(host: str) -> int:
    """A port of this machine that nobody has at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])
