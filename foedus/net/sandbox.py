"""The walls around training: no network, and limits on memory, processor time, files.

Code that trains was approved by the owner of the data, and is still not trusted with more than it needs. A process that
calls :func:`enter` before it imports any of it has, from then on and for its children,

* no network: a network namespace of its own with nothing in it, and a filter that refuses to make sockets at all
  (seccomp), each where the kernel permits it; everywhere an audit hook, which makes Python's own sockets fail with a
  clear message, but does not hold against code that calls the system by itself;
* no writing but in its own folder, where the kernel has Landlock;
* limits on memory, on the size and number of files, and on processor time; lower priority; and it dies with the
  process that started it.

:func:`enter` answers what holds here, in plain words; ``foedus join --check`` shows it. Time and memory are also
watched from outside (``training.py``), which holds on every system.

Not here: which code may run (``owner/approvals.py``); a virtual machine: code in here can still read what its user can
read. Give the agent a user of its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from foedus.core.checks import check_number, check_whole

__all__ = ["Limits", "Walls", "allow_seconds", "enter"]

_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_SET_DEATH_SIGNAL, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38
_FILTER = 2

# seccomp: architecture → its number, and the numbers of the calls that are refused: socket and io_uring_setup, by which
# sockets can be made without asking for one.
_CALLS = {"x86_64": (0xC000003E, (41, 425)), "aarch64": (0xC00000B7, (198, 425))}
_X32 = 0x40000000  # calls of another convention, on the same processor, that would pass unseen


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What training on this machine may take.

    Attributes:
        memory_mb: of memory; more, and the training is ended.
        seconds: of time for one round; more, and the training is ended.
        cores: of the processor; 0 for all.
        file_mb: the largest file that it may write.
        files: how many it may have open.
        nice: how much lower its priority is, 0 to 19.

    Example:
        >>> Limits(memory_mb=2000, seconds=600).nice
        10
    """

    memory_mb: int = 8192
    seconds: float = 3600.0
    cores: int = 0
    file_mb: int = 1024
    files: int = 256
    nice: int = 10

    def __post_init__(self) -> None:
        for name in ("memory_mb", "file_mb", "files"):
            check_whole(name, getattr(self, name))
        check_whole("cores", self.cores, least=0, also=" (0 for all)")
        check_whole("nice", self.nice, least=0, most=19)
        check_number("seconds", self.seconds, above=True)


class Walls(NamedTuple):
    """What holds, in plain words; ``strict`` where the kernel itself refuses the network."""

    network: str
    strict: bool
    limits: tuple[str, ...]  # those of writing among them


def enter(limits: Limits) -> Walls:
    """Put up the walls, for good. To be called while there is only one thread."""
    _die_with_parent()
    namespace = _own_network()
    filtered = _refuse_sockets()
    sys.addaudithook(_refuse_in_python)
    told = [
        t
        for t, holds in (("an empty network namespace", namespace), ("a filter that refuses sockets", filtered))
        if holds
    ]
    if told:
        network = f"none: {' and '.join(told)}, held by the kernel"
    else:
        network = (
            "none for Python's own sockets, held by an audit hook; this system offers nothing that holds against code "
            "that calls it by itself. Approve tasks accordingly, or block the agent's user in the firewall"
        )
    limited = _limit(limits)
    writes = "writes in its own folder only, held by the kernel" if _write_only_in(Path.cwd()) else "may write files"
    return Walls(network, bool(told), (*limited, writes))


# --- network ------------------------------------------------------------------------------------------------


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _own_network() -> bool:
    """Leave the machine's network for an empty one."""
    if sys.platform != "linux":
        return False
    user, group, libc = os.getuid(), os.getgid(), _libc()
    if libc.unshare(_NEWUSER | _NEWNET) == 0:
        for name, told in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            try:
                with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                    file.write(told)
            except OSError:  # then files are as before, only names of users are not known
                pass
        return True
    return bool(libc.unshare(_NEWNET) == 0)


def _refuse_sockets() -> bool:
    """Have the kernel refuse to make sockets: ``EACCES``."""
    if sys.platform != "linux" or platform.machine() not in _CALLS or struct.calcsize("P") != 8:
        return False
    program = _program(*_CALLS[platform.machine()])
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc = _libc()
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    told = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    return bool(libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(told), 0, 0) == 0)


def _program(architecture: int, calls: tuple[int, ...]) -> bytes:
    """The filter in the kernel's own little language: refuse these calls, and whatever is of another convention."""
    load, equal, least, answer = 0x20, 0x15, 0x35, 0x06
    refuse, allow = 0x00050000 | 13, 0x7FFF0000  # EACCES; let pass
    count = len(calls)
    steps = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, count + 3, architecture),  # another one: refuse
        (load, 0, 0, 0),  # the call's number
        (least, count + 1, 0, _X32),  # of another convention: refuse
        *((equal, count - i, 0, call) for i, call in enumerate(calls)),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _refuse_in_python(event: str, arguments: tuple[Any, ...]) -> None:
    """Fail early, and say why, where Python itself is asked for the network."""
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        raise PermissionError(
            "training has no network (foedus). Data that comes over a network is read outside: give join() a function, "
            "which the agent itself calls"
        )


# --- files --------------------------------------------------------------------------------------------------

_RULESET, _RULE, _RESTRICT = 444, 445, 446  # Landlock's calls, the same on all architectures
_BENEATH = 1  # a rule about a folder and all in it
# Rights, each with the version of Landlock that has it: to write, remove, make; to link between folders; to truncate.
_WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
_LATER = ((2, 1 << 13), (3, 1 << 14))
_DEVICES = ("/dev/null", "/dev/shm")
_FILE_RIGHTS = (1 << 1) | (1 << 14)  # those that a single file can have


def _write_only_in(folder: Path) -> bool:
    """Have the kernel refuse to write, make, rename or remove anything but in a folder."""
    if sys.platform != "linux":
        return False
    libc = _libc()
    version = libc.syscall(_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = _WRITES | sum(bit for since, bit in _LATER if version >= since)
    told = ctypes.create_string_buffer(struct.pack("Q", rights), 8)
    ruleset = libc.syscall(_RULESET, told, ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    try:
        for path in (str(folder), *_DEVICES):
            _allow_writing(libc, ruleset, path, rights)
        return bool(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.syscall(_RESTRICT, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _allow_writing(libc: Any, ruleset: int, path: str, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return
    try:
        given = rights if os.path.isdir(path) else rights & _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", given, handle), 12)
        libc.syscall(_RULE, ruleset, _BENEATH, rule, 0)
    finally:
        os.close(handle)


# --- limits -------------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _libc().prctl(_SET_DEATH_SIGNAL, 9, 0, 0, 0)


def _limit(limits: Limits) -> tuple[str, ...]:
    """Set what the system can hold; what holds, in plain words."""
    told = [f"memory {limits.memory_mb} MB", f"{limits.seconds:g} s a round"]
    if sys.platform == "win32":
        return (*told, "both watched from outside")
    import resource

    mega = 1 << 20
    wanted = [
        (resource.RLIMIT_DATA, limits.memory_mb * mega, ""),
        (resource.RLIMIT_FSIZE, limits.file_mb * mega, f"files of at most {limits.file_mb} MB"),
        (resource.RLIMIT_NOFILE, limits.files, f"at most {limits.files} open files"),
        (resource.RLIMIT_CORE, 0, "no core dumps"),
    ]
    for what, most, words in wanted:
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
        told += [words] if words else []
    os.nice(limits.nice)
    if limits.cores and sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: limits.cores])
        told.append(f"{limits.cores} cores")
    return (*told, f"priority lowered by {limits.nice}")


def allow_seconds(seconds: float, cores: int) -> None:
    """Allow this process so many more seconds of processor time, on each of its cores, from now on."""
    if sys.platform == "win32":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    from foedus.backends.cores import cores as there  # late: whoever enters a sandbox has imported little

    count = cores or there()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds * count) + 2, hard))
