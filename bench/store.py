"""A fast store of one bucket on loopback: the files of a folder, by ranges, straight from the system's cache.

    python bench/store.py FOLDER

Prints its address and serves until standard input ends: as much of S3 as reading takes. Bytes go from files to sockets
by `sendfile`, in two processes of threads, so that what is measured is the client. tests/bucket.py, which errs when it
is told to, hashes objects at every request.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "models"
_NUM_PROCESSES = 2
_DATE = formatdate(0, usegmt=True)


def main() -> None:
    """Serves the folder given as argument."""
    folder = Path(sys.argv[1])
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    children = [_child(listener, folder) for _ in range(_NUM_PROCESSES)]
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    sys.stdin.read()
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)


def _child(listener: socket.socket, folder: Path) -> int:
    if child := os.fork():
        return child
    files = {path.name: (path, path.stat().st_size) for path in folder.iterdir()}
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer_all, args=(connection, folder.name, files), daemon=True).start()


def _answer_all(connection: socket.socket, prefix: str, files: dict[str, tuple[Path, int]]) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, opened = b"", {}
    try:
        while True:
            while b"\r\n\r\n" not in data:
                if not (more := connection.recv(65536)):
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            url = urlsplit(target)
            name = unquote(url.path).removeprefix(f"/{BUCKET}/{prefix}/")
            if "list-type" in parse_qs(url.query):
                body = _listing(prefix, files)
                connection.sendall(_head("200 OK", len(body), {"Content-Type": "application/xml"}) + body)
            elif name not in files:
                connection.sendall(_head("404 Not Found", 0, {}))
            else:
                path, size = files[name]
                if name not in opened:
                    opened[name] = path.open("rb")
                file = opened[name]
                found = re.search(rb"(?i)\r\nrange: bytes=(\d+)-(\d+)", head)
                start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, size)
                said = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if found else {}
                status = "206 Partial Content" if found else "200 OK"
                connection.sendall(_head(status, stop - start, {"ETag": f'"{name}"', "Last-Modified": _DATE, **said}))
                while method == "GET" and start < stop:
                    start += os.sendfile(connection.fileno(), file.fileno(), start, stop - start)
    except OSError:
        return
    finally:
        connection.close()
        for file in opened.values():
            file.close()


def _head(status: str, length: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length}", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def _listing(prefix: str, files: dict[str, tuple[Path, int]]) -> bytes:
    entries = "".join(
        f"<Contents><Key>{escape(f'{prefix}/{name}')}</Key><LastModified>1970-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"{escape(name)}"</ETag><Size>{size}</Size></Contents>'
        for name, (_, size) in sorted(files.items())
    )
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return f'<ListBucketResult xmlns="{space}"><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>'.encode()


if __name__ == "__main__":
    main()
