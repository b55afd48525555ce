"""Passes TCP connections on to another host, and hides it when that host goes away.

JAX aborts a process the moment its connection to process 0 breaks, before anything can say whose fault it was. Behind
this relay the connection stays open, and `jaxllama.hosts.group` names the process that is gone. It runs as a script
of its own (`python relay.py HOST PORT`), because JAX may hold the interpreter while it waits for an answer. It prints
the port it listens on, and ends when its standard input closes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading


def main(host: str, port: int) -> None:
    """Relays for as long as standard input is open."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_relay_all, args=(listener, host, port), daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


def _relay_all(listener: socket.socket, host: str, port: int) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection((host, port), timeout=5.0)
        except OSError:
            near.close()
            continue
        far.settimeout(None)
        threading.Thread(target=_pump, args=(near, far), daemon=True).start()
        threading.Thread(target=_pump, args=(far, near, near), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, held: socket.socket | None = None) -> None:
    """Copies until `source` ends, then closes `sink`, unless that is the one `held` open."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    if sink is not held:
        sink.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
