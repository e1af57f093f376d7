"""Two machines far apart on a bad wire, as the kernel sees it: network namespaces, and packets that are lost and late.

Each namespace has a TUN device, and a program passes packets from one to the other: after a while, and some never, as
a seed says. Above it everything is the kernel's own: TCP sends again, slows down, and gives up. Where there are no TUN
devices the two are one namespace whose loopback has ``netem``.

    python -m tests.net.ether '{"delay_s": 0.1, "loss": 0.2, "seed": 5}'     # as root: until its input ends
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

NEAR, FAR = "10.77.0.1", "10.77.0.2"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_SET_DEVICE, _PLAIN_PACKETS = 0x400454CA, 0x0001 | 0x1000  # TUNSETIFF; IFF_TUN, IFF_NO_PI


class Ether(NamedTuple):
    """Where commands run.

    Attributes:
        near, far: the words that go before a command at each end; the near end's address is ``NEAR``.
        packets, lost: so far.
    """

    near: list[str]
    far: list[str]
    process: subprocess.Popen[str]

    def seen(self) -> dict[str, int]:
        """Packets in all, and those that were lost."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


class NotPermitted(Exception):
    """Neither way to make a bad wire may be gone here."""


@contextmanager
def opened(*, delay_s: float, loss: float, seed: int) -> Iterator[Ether]:
    """A wire, until the block ends."""
    told = json.dumps({"delay_s": delay_s, "loss": loss, "seed": seed})
    command = [sys.executable, str(Path(__file__)), told]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = json.loads(process.stdout.readline())
        if "no" in said:
            raise NotPermitted(said["no"])
        near, far = (["nsenter", f"--net=/proc/{process.pid}/fd/{fd}"] for fd in said["ends"])
        yield Ether(near, far, process)
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


def _own_network() -> int:
    """This process moves into a network namespace of its own, which stays while the file is open."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "no network namespace may be made")
    _ip("link set lo up")
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def _ip(words: str, command: str = "ip") -> str:
    done = subprocess.run([command, *words.split()], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"{command} {words}: {done.stderr.strip()}")
    return done.stdout


def _device(name: str, address: str) -> int:
    """A TUN device in the present namespace: what the kernel sends to it can be read, and what is written arrives."""
    found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(found, _SET_DEVICE, struct.pack("16sH22x", name.encode(), _PLAIN_PACKETS))
    Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    _ip(f"addr add {address}/24 dev {name}")
    _ip(f"link set {name} up")
    return found


class Wire:
    """Between two devices: packets that are under way."""

    def __init__(self, ends: tuple[int, int], delay_s: float, loss: float, seed: int) -> None:
        self.other = dict(zip(ends, reversed(ends), strict=True))
        self.delay_s, self.loss, self.draw = delay_s, loss, random.Random(seed)
        self.seen = {"packets": 0, "lost": 0}
        self._under_way: list[tuple[float, int, int, bytes]] = []

    def take(self, end: int) -> None:
        """A packet that was sent at one end."""
        packet = os.read(end, 1 << 16)
        self.seen["packets"] += 1
        if self.draw.random() < self.loss:
            self.seen["lost"] += 1
        else:
            due = time.monotonic() + self.delay_s
            heapq.heappush(self._under_way, (due, self.seen["packets"], self.other[end], packet))

    def deliver(self) -> float | None:
        """Whatever is due; seconds until something is."""
        while self._under_way:
            wait = self._under_way[0][0] - time.monotonic()
            if wait > 0:
                return wait
            *_, end, packet = heapq.heappop(self._under_way)
            os.write(end, packet)
        return None


def _by_tun(delay_s: float, loss: float, seed: int) -> None:
    near = _own_network()
    one = _device("near0", NEAR)
    far = _own_network()
    two = _device("far0", FAR)
    wire = Wire((one, two), delay_s, loss, seed)
    print(json.dumps({"ends": [near, far]}), flush=True)
    while True:
        ready, _, _ = select.select([one, two, sys.stdin], [], [], wire.deliver())
        if sys.stdin in ready:
            if not sys.stdin.readline():
                return
            print(json.dumps(wire.seen), flush=True)
        for end in (one, two):
            if end in ready:
                wire.take(end)


def _by_netem(delay_s: float, loss: float) -> None:
    both = _own_network()
    _ip(f"addr add {NEAR}/32 dev lo")
    _ip(f"qdisc add dev lo root netem delay {delay_s * 1000:.0f}ms loss {loss * 100:.0f}%", "tc")
    print(json.dumps({"ends": [both, both]}), flush=True)
    while sys.stdin.readline():
        (found,) = [q for q in json.loads(_ip("-s -j qdisc show dev lo", "tc")) if q["kind"] == "netem"]
        print(json.dumps({"packets": found["packets"] + found["drops"], "lost": found["drops"]}), flush=True)


def main() -> None:
    told = json.loads(sys.argv[1])
    refused = []
    for way, given in ((_by_tun, told), (_by_netem, {k: v for k, v in told.items() if k != "seed"})):
        try:
            way(**given)  # type: ignore[operator]
            return
        except (OSError, AttributeError) as error:
            refused.append(f"{way.__name__[1:]}: {error}")
    print(json.dumps({"no": "; ".join(refused)}), flush=True)


if __name__ == "__main__":
    main()
