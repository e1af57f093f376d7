"""How to serve, as opposed to what: frozen values with defaults.

Not here: what is learned (``served.py``), the server (``serve.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from foedus.core.checks import check_number, check_whole
from foedus.core.examples import Examples
from foedus.core.population import Pair
from foedus.errors import ConfigurationError
from foedus.net.served import Keeping, Rounds
from foedus.privacy.ledger import Budget

PORT = 8765


class Role(StrEnum):
    """What a process does for a federation that has a broker (``roles.py``)."""

    ALL = "all"
    GATEWAY = "gateway"
    AGGREGATOR = "aggregator"
    COORDINATOR = "coordinator"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server runs; everything has a default.

    Attributes:
        folder: the server's own: its identity, its database, models, and a run folder for each run under ``runs/``. A
            server that is started again with it goes on.
        name: of the run; clients may ask for it by name.
        host, port: where it listens; port 0 lets the operating system choose.
        names: host names and addresses by which clients reach it, for its certificate and the join command.
        broker: ``"kafka://host:9092"`` where gateways and aggregation workers are processes of their own.
        role: of this process, where there is a broker.
        database: ``"postgresql://..."`` where several servers share one; by default SQLite in the folder.
        blobs: where models lie, e.g. ``"s3://bucket/path"``; by default in the folder.
        rounds: how rounds come about: minimum, windows, deadlines; see :class:`foedus.net.served.Rounds`.
        keeping: what of a round under way may lie on a disk; see :class:`foedus.net.served.Keeping`.
        test: examples that the server evaluates on.
        start: first weights, as for ``Settings(start=...)``.
        budget: of privacy.
        source: the file or folder of Python source that clients get to train with.
        target: the object in it, ``"module:object"``, which has ``task`` and ``algorithm``.
        uploads: bytes of memory for uploads under way.
        insecure_loopback: plain HTTP, on this machine only, for trying things out.
        behind_proxy: a reverse proxy ends TLS; the server itself speaks plain HTTP to it.
        stay: go on serving when the run is over, so that clients that come later get the model, too; until
            interrupted.
        farewell: if not, this long at most, until all clients that took part have it.
        device: for evaluation, e.g. ``"cuda"``.
        progress: say what happens.

    Example:
        >>> Serving(folder="heart", rounds=Rounds(minimum=3)).port
        8765
    """

    folder: str | Path = "foedus-server"
    name: str = "run"
    host: str = "127.0.0.1"
    port: int = PORT
    names: Sequence[str] = ("localhost", "127.0.0.1")
    broker: str | None = None
    role: Role = Role.ALL
    database: str | None = None
    blobs: str | None = None
    rounds: Rounds = field(default_factory=Rounds)
    keeping: Keeping = Keeping.EPHEMERAL
    test: Examples | Pair | None = None
    start: Any = None
    budget: Budget | None = None
    source: str | Path | None = None
    target: str = ""
    uploads: int = 1 << 30
    insecure_loopback: bool = False
    behind_proxy: bool = False
    stay: bool = False
    farewell: float = 60.0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_whole("Serving(port=...)", self.port, least=0)
        check_whole("Serving(uploads=...)", self.uploads, least=1, also=" byte")
        check_number("Serving(farewell=...)", self.farewell)
        if not isinstance(self.role, Role):
            raise ConfigurationError(f"Serving(role=...) takes a foedus.net.serving.Role, and was given {self.role!r}")
        if self.role is not Role.ALL and self.broker is None:
            raise ConfigurationError(
                f"a {self.role} works with processes on other machines, by way of a broker, and none is named. Write "
                "broker='kafka://host:9092' (--broker), or leave out the role: one server does it all"
            )
        if isinstance(self.names, str):
            raise ConfigurationError(f"names is a list; write names=[{self.names!r}]")
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum() or len(self.name) > 64:
            raise ConfigurationError(
                f"the name of a run is of letters, digits, '-' and '_', at most 64; not {self.name!r}"
            )
        for name, kind in (("rounds", Rounds), ("keeping", Keeping)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigurationError(
                    f"Serving({name}=...) takes a foedus.{kind.__name__}, and was given {getattr(self, name)!r}"
                )
        if self.insecure_loopback and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigurationError(
                f"insecure_loopback speaks plain HTTP, and {self.host} can be reached from other machines. Listen on "
                "127.0.0.1, or leave it out: TLS needs nothing else"
            )
