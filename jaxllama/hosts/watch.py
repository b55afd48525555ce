"""A device that hangs, told from one that is busy, slow or waiting for a compilation.

A program that has begun cannot be asked how far it is, and another one would wait behind it. So nothing is sent to a
device that answers: whoever waits for one says so (`waiting`), and only when a wait is longer than any program takes
are the devices asked for a few bytes, which do not go through their programs' queue, with a deadline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllama.errors import LockstepError
from jaxllama.hosts.group import Group

logger = logging.getLogger("jaxllama.hosts")

TIMEOUT_S = 20.0
"""With the answers' deadline and a tick, a device that hangs is named within 30 s."""
_DEVICES = "devices"
_FIRST_TIMEOUT_S = 600.0
_LONGEST = 4.0
_ANSWER_S = 5.0
_TICK_S = 0.5
_BUSY_SHARE = 0.1


class DeviceWatch:
    """Watches the waits of one thread for those of `mesh`'s devices that are this process's.

    A wait counts as a hang after `timeout_s`, or four times the longest that has ended; the first one, which may have
    to bring a program onto the device, after ten minutes. Time in which this process was stopped does not count. Nor is
    a wait a hang in which this process works, where that may be what it waits for: a compilation, and on CPUs all.

    Of a `group`, process 0 watches, and asks the others about their devices (`answer_process_0`) before it judges.
    """

    def __init__(self, mesh: Mesh, timeout_s: float = TIMEOUT_S, group: Group | None = None) -> None:
        self._devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        self._timeout_s = timeout_s
        self._group = group
        self._is_host = all(device.platform == "cpu" for device in self._devices)
        self._changed = threading.Condition()
        self._num_waits = 0
        self._is_waiting = False
        self._may_work = False
        self._is_closed = False
        self._longest_s: float | None = None
        self._hang: str | None = None
        self._thread: threading.Thread | None = None

    @property
    def hang(self) -> str | None:
        """Which device hangs, and where; None if none does. A wait that ends after all makes it None again."""
        return self._hang

    @contextlib.contextmanager
    def waiting(self, *, may_work: bool = False) -> Iterator[None]:
        """The body waits for the devices, or with `may_work` gives them work, which may take a compilation. Not for two
        threads at a time, and not within another such body."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="jaxllama-device-watch", daemon=True)
                self._thread.start()
            self._num_waits += 1
            self._is_waiting, self._may_work = True, may_work or self._is_host
        started = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._is_waiting = False
                self._longest_s = max(self._longest_s or 0.0, time.monotonic() - started)
                if self._hang is not None:
                    logger.warning("the device answers again: %s", self._hang)
                    self._hang = None

    def close(self) -> None:
        """Ends the watching."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def answer_process_0(self) -> None:
        """What every process but 0 does: says on a thread of its own how its devices are, when it is asked."""
        assert self._group is not None
        self._group.answer_with(_DEVICES, lambda _: answers(self._devices).encode())

    def patience_s(self) -> float:
        """How long the wait at hand may take."""
        if self._longest_s is None:
            return max(_FIRST_TIMEOUT_S, self._timeout_s)
        return max(self._timeout_s, _LONGEST * self._longest_s)

    def _watch(self) -> None:
        watched, waited_s, worked_s = 0, 0.0, time.process_time()
        last = time.monotonic()
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._is_closed, _TICK_S):
                    return
                now = time.monotonic()
                # Longer than a tick: this process itself was stopped, or the machine is so busy that all waits.
                passed_s, last = min(now - last, 2 * _TICK_S), now
                if not self._is_waiting or self._num_waits != watched:
                    watched, waited_s, worked_s = self._num_waits, 0.0, time.process_time()
                    continue
                waited_s += passed_s
                if waited_s < self.patience_s() or self._hang is not None:
                    continue
                if self._may_work and time.process_time() - worked_s > _BUSY_SHARE * waited_s:
                    waited_s, worked_s = 0.0, time.process_time()
                    continue
            self._judge(watched, waited_s)
            last = time.monotonic()

    def _judge(self, watched: int, waited_s: float) -> None:
        """Asks all devices, and says which hang, unless the wait has ended meanwhile."""
        found = [text for text in [answers(self._devices), *self._answers_of_others()] if text]
        who = "; ".join(found)
        if not found:
            who = f"{_named(self._devices)} {'has' if len(self._devices) == 1 else 'have'} not finished a program"
            who += f" but still {'answers' if len(self._devices) == 1 else 'answer'}, on {_here()}"
        text = f"{who}; the engine has waited for a program for {waited_s:.0f} s."
        with self._changed:
            if self._num_waits != watched or not self._is_waiting:
                return
            self._hang = text
        logger.error("a device hangs: %s", text)

    def _answers_of_others(self) -> list[str]:
        group = self._group
        found: list[str] = []
        if group is None:
            return []

        def ask() -> None:
            with contextlib.suppress(LockstepError):  # The group itself names who is lost.
                found.extend(answer.decode(errors="replace") for answer in group.ask(_DEVICES))

        asking = threading.Thread(target=ask, name="jaxllama-ask-devices", daemon=True)
        asking.start()
        asking.join(_ANSWER_S + 1)
        return [*found]


def answers(devices: Sequence[jax.Device], timeout_s: float | None = None) -> str:
    """Which of `devices` do not give back, in time, four bytes that they are sent; "" if all do."""
    done: dict[int, bool] = {}

    def ask(number: int, device: jax.Device) -> None:
        try:
            done[number] = echo(device, number) == number
        except Exception:  # Whatever a broken runtime makes of it: it is no answer.
            logger.exception("device %s cannot be asked", device)

    threads = [
        threading.Thread(target=ask, args=(number, device), name="jaxllama-ask-device", daemon=True)
        for number, device in enumerate(devices)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + (_ANSWER_S if timeout_s is None else timeout_s)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = [device for number, device in enumerate(devices) if not done.get(number)]
    if not silent:
        return ""
    return f"{_named(silent)} {'does' if len(silent) == 1 else 'do'} not answer, on {_here()}"


def echo(device: jax.Device, number: int) -> int:
    """Sends `number` to the device, and returns what comes back."""
    return int(np.asarray(jax.device_put(np.int32(number), device)))


def _named(devices: Sequence[jax.Device]) -> str:
    """E.g. "device 3 (TPU v5 lite)", or all their numbers."""
    ids = ", ".join(str(device.id) for device in devices)
    return f"device{'' if len(devices) == 1 else 's'} {ids} ({devices[0].device_kind})"


def _here() -> str:
    return f"host {socket.gethostname()}, process {jax.process_index()} (pid {os.getpid()})"
