"""Every exception that foedus raises on purpose, in one tree.

    FoedusError
    ├── ConfigurationError (ValueError)      a value written by the user cannot work
    │   ├── IncompatibleStages               two parts of an algorithm that make no sense together
    │   ├── NoGuarantee                      a privacy guarantee was asked for that would not hold
    │   └── MissingExtra (ImportError)       an optional dependency is not installed
    ├── DataError (ValueError)               the data cannot be trained on as it is
    │   ├── DataNotFound (FileNotFoundError) a data file is nowhere to be found
    │   └── DataCorrupt                      a data file is not what it should be
    ├── TrainingError (RuntimeError)         local training failed; says client, round and step
    │   └── NothingToAggregate               no client's update survived the round
    ├── UnsupportedOperator                  a fast path does not know an operator; names it
    ├── LoweringMismatch                     a compiled step differs from eager torch; it must not be used
    ├── BudgetSpent                          a release would exceed the privacy budget; it was not made
    ├── SumOverflow (OverflowError)          an exact sum would leave its range; nothing was added
    ├── UpdateRefused                        a client's update failed a check; it never entered an aggregate
    ├── NotTrusted                           who or what is at the other end could not be made certain
    │   ├── SignatureInvalid                 a signature is not of this key over these bytes
    │   ├── PinMismatch                      the server is not the one that was pinned
    │   └── BundleRefused                    a source bundle is unsafe, damaged, or not approved
    ├── SecureAggregationFailed              an attempt at a masked sum ended without one; nothing was revealed
    │   ├── ForgedMessage                    a key, share or signature is not what it must be
    │   └── NotEnoughShares                  fewer shares than a secret takes, or shares that do not fit together
    ├── CheckpointError                      a checkpoint is damaged or belongs to another run
    ├── StorageError (OSError)               the run folder cannot be written (disk full, no permission)
    ├── StaleEpoch                           another server process has taken over; nothing was written
    ├── CommitFailed                         a task's or algorithm's code failed while the next model was made
    ├── CountedTwice                         a client is in the model of this round already; nothing was written
    ├── ProtocolError                        what another machine said cannot be served; carries a code
    │   ├── MalformedMessage (ValueError)    bytes that are no message or blob of this protocol
    │   ├── TooLarge                         more bytes, entries or depth than is let in
    │   ├── WrongVersion                     the two sides speak versions that do not go together
    │   ├── NotAllowed (PermissionError)     the other side does not let this caller do this
    │   │   ├── Unauthenticated              a request does not say who asks, or no longer may say so
    │   │   └── EnrolmentRefused             a join token is unknown, used, expired, or for another
    │   ├── NotNow                           not at this moment: too many requests, or another server leads
    │   │   └── TooFast                      more was asked than the limits let through
    │   └── UploadRefused                    an upload that the server does not take
    ├── WorkerDied (RuntimeError)            a worker process ended by itself
    ├── Unreachable (ConnectionError)        the server cannot be reached, or the connection was lost
    ├── OwnerRefuses                         the rules of the data's owner do not allow it; says which
    └── LedgerBroken                         the ledger of what left was changed or cut off

Messages say what happened, why, and what to write instead.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class FoedusError(Exception):
    """Root of all errors that foedus raises on purpose."""


class ConfigurationError(FoedusError, ValueError):
    """A value that the user wrote cannot work."""


class IncompatibleStages(ConfigurationError):
    """Two parts of an algorithm make no sense together; raised when the algorithm is built."""


class NoGuarantee(ConfigurationError):
    """A privacy guarantee was asked for that would not hold."""


class MissingExtra(ConfigurationError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'foedus[{extra}]'"
        )
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.package, self.extra, self.purpose)


class DataError(FoedusError, ValueError):
    """The data cannot be trained on as it is."""


class DataNotFound(DataError, FileNotFoundError):
    """A data file was neither found locally nor could it be downloaded."""


class DataCorrupt(DataError):
    """A data file is damaged or is not the file it should be."""


class TrainingError(FoedusError, RuntimeError):
    """Local training of one client failed.

    Attributes:
        client: the client's id.
        round: the round, counted from 1.
        step: the local step within the round, counted from 0; ``None`` if not known.
        batch: the inputs and targets of that step as numpy arrays; ``None`` if not known.
    """

    def __init__(
        self,
        message: str,
        *,
        client: object = None,
        round: int = 0,
        step: int | None = None,
        batch: Any = None,
    ) -> None:
        super().__init__(message)
        self.client, self.round, self.step, self.batch = client, round, step, batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _training_error, (type(self), str(self), self.client, self.round, self.step, self.batch)


def _training_error(kind: type[TrainingError], *fields: Any) -> TrainingError:
    """Rebuild a TrainingError that crossed a process border."""
    message, client, round, step, batch = fields
    return kind(message, client=client, round=round, step=step, batch=batch)


class NothingToAggregate(TrainingError):
    """No client of the round returned an update that could be used."""


class UnsupportedOperator(FoedusError):
    """A fast path does not know an operator of the model.

    Attributes:
        operators: the operators' names, e.g. ``("aten.grid_sampler_2d.default",)``.
    """

    def __init__(self, *operators: str) -> None:
        super().__init__(f"no fast path for {', '.join(operators)}")
        self.operators = operators

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.operators


class LoweringMismatch(FoedusError):
    """A compiled training step gives something else than eager torch, so it must not be used.

    Attributes:
        what: what differs, e.g. ``"the gradient of 'head.weight'"``.
        difference, tolerance: how much, relative to its norm, and how much would have been let pass.
    """

    def __init__(self, what: str, difference: float, tolerance: float) -> None:
        super().__init__(
            f"the compiled step differs from eager torch in {what} by {difference:.2g} (relative), where "
            f"{tolerance:.0e} is let pass. Models whose rows influence each other beyond batch normalisation "
            "need batches without padding; otherwise use another executor, and report this"
        )
        self.what, self.difference, self.tolerance = what, difference, tolerance

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.difference, self.tolerance)


class BudgetSpent(FoedusError):
    """A release, or a visit of a client, would exceed a privacy budget; it was not made, and nothing was counted."""


class SumOverflow(FoedusError, OverflowError):
    """An exact sum would leave its range; it was refused before anything was added."""


class Reason(StrEnum):
    """Why an update was refused."""

    SHAPE = "shape"
    DTYPE = "dtype"
    NOT_FINITE = "not finite"
    WEIGHT = "weight"
    NORM = "norm"
    RANGE = "range"
    REPLAY = "replay"
    QUARANTINE = "quarantine"


class UpdateRefused(FoedusError):
    """A client's update failed a check, so that it was left out before it could change anything.

    Attributes:
        client: position in the population.
        reason: which check it failed.
    """

    def __init__(self, message: str, *, client: int = -1, reason: Reason = Reason.SHAPE) -> None:
        super().__init__(message)
        self.client, self.reason = client, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _update_refused, (str(self), self.client, self.reason)


def _update_refused(message: str, client: int, reason: Reason) -> UpdateRefused:
    """Rebuild an UpdateRefused that crossed a process border."""
    return UpdateRefused(message, client=client, reason=reason)


class NotTrusted(FoedusError):
    """Who or what is at the other end of a connection could not be made certain."""


class SignatureInvalid(NotTrusted):
    """A signature is not one of this key over these bytes, for this purpose."""


class PinMismatch(NotTrusted):
    """The server shows another authority than the one that was pinned."""


class BundleRefused(NotTrusted):
    """A source bundle is unsafe, damaged, not signed by the server that was pinned, or not approved."""


class SecureAggregationFailed(FoedusError):
    """An attempt at a masked sum ended without one. A new attempt has fresh keys."""


class ForgedMessage(SecureAggregationFailed):
    """A key, a sealed share or a signature is not what it must be: somebody changed, replayed or made it up."""


class NotEnoughShares(SecureAggregationFailed):
    """There are fewer shares than it takes to put a secret together, or they do not fit together."""


class CheckpointError(FoedusError):
    """A checkpoint is damaged, or belongs to another run."""


class StorageError(FoedusError, OSError):
    """The run folder cannot be written."""


class StaleEpoch(FoedusError):
    """Another server process has taken over the lease; nothing was written."""


class CommitFailed(FoedusError):
    """The code of a task or an algorithm failed while a server made the next model; it says with what."""


class CountedTwice(FoedusError):
    """A client is in the model of this round already; nothing was written."""


class Code(StrEnum):
    """Why a request cannot be served: the one list that messages, metrics and errors share.

    A code that a later version added reads as ``OTHER``.
    """

    MALFORMED = "malformed"
    TOO_LARGE = "too-large"
    WRONG_VERSION = "wrong-version"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    BAD_SIGNATURE = "bad-signature"
    RATE = "rate"
    OVERLOADED = "overloaded"
    NOT_LEADER = "not-leader"
    STORAGE = "storage"
    UNKNOWN_RUN = "unknown-run"
    UNKNOWN_KEY = "unknown-key"
    UNKNOWN_UPLOAD = "unknown-upload"
    UNKNOWN_BLOB = "unknown-blob"
    WRONG_OFFSET = "wrong-offset"
    WRONG_DIGEST = "wrong-digest"
    WRONG_SHAPE = "wrong-shape"
    WRONG_DTYPE = "wrong-dtype"
    NOT_FINITE = "not-finite"
    WEIGHT = "weight"
    NORM = "norm"
    RANGE = "range"
    REPLAY = "replay"
    QUARANTINE = "quarantine"
    OTHER = "other"

    @classmethod
    def _missing_(cls, value: object) -> Code | None:
        return cls.OTHER if isinstance(value, str) else None

    @staticmethod
    def of(reason: Reason) -> Code:
        """The code of what the gate says."""
        return _CODES[reason]


_CODES = {
    Reason.SHAPE: Code.WRONG_SHAPE, Reason.DTYPE: Code.WRONG_DTYPE, Reason.NOT_FINITE: Code.NOT_FINITE,
    Reason.WEIGHT: Code.WEIGHT, Reason.NORM: Code.NORM, Reason.RANGE: Code.RANGE, Reason.REPLAY: Code.REPLAY,
    Reason.QUARANTINE: Code.QUARANTINE,
}  # fmt: skip


class ProtocolError(FoedusError):
    """What another machine said cannot be served, or a server said so of us.

    Attributes:
        code: which of the listed reasons it is.
        fatal: whether to ask again is no use.
    """

    usual: Code = Code.OTHER

    def __init__(self, message: str, *, code: Code | None = None, fatal: bool = False) -> None:
        super().__init__(message)
        self.code, self.fatal = code or self.usual, fatal

    def __reduce__(self) -> tuple[Any, ...]:
        return _protocol_error, (type(self), str(self), self.code, self.fatal)

    @staticmethod
    def of(code: Code, message: str, *, fatal: bool = False) -> ProtocolError:
        """The error of a code's own class, as a client raises it when a server answers with a problem."""
        return _KINDS.get(code, ProtocolError)(message, code=code, fatal=fatal)


def _protocol_error(kind: type[ProtocolError], message: str, code: Code, fatal: bool) -> ProtocolError:
    """Rebuild a ProtocolError that crossed a process border."""
    return kind(message, code=code, fatal=fatal)


class MalformedMessage(ProtocolError, ValueError):
    """Bytes that are no message or blob of this protocol; nothing of them was used."""

    usual = Code.MALFORMED


class TooLarge(ProtocolError):
    """More bytes, entries or depth than is let in; refused before it was read."""

    usual = Code.TOO_LARGE


class WrongVersion(ProtocolError):
    """The two sides speak versions that do not go together."""

    usual = Code.WRONG_VERSION


class NotAllowed(ProtocolError, PermissionError):
    """The other side does not know this caller, or does not let it do this."""

    usual = Code.FORBIDDEN


class Unauthenticated(NotAllowed):
    """A request does not say who asks, or what it says is expired, withdrawn or made up."""

    usual = Code.UNAUTHENTICATED


class EnrolmentRefused(NotAllowed):
    """A join token does not let this client in: unknown, used up, expired, or for another name."""


class NotNow(ProtocolError):
    """Not at this moment; the same request may be served later.

    Attributes:
        after_s: seconds after which it may be.
    """

    usual = Code.OVERLOADED

    def __init__(self, message: str, *, code: Code | None = None, fatal: bool = False, after_s: float = 2.0) -> None:
        super().__init__(message, code=code, fatal=fatal)
        self.after_s = after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _not_now, (type(self), str(self), self.code, self.fatal, self.after_s)


class TooFast(NotNow):
    """More was asked than the limits let through; nothing was done."""

    usual = Code.RATE


def _not_now(kind: type[NotNow], message: str, code: Code, fatal: bool, after_s: float) -> NotNow:
    """Rebuild a NotNow that crossed a process border."""
    return kind(message, code=code, fatal=fatal, after_s=after_s)


class UploadRefused(ProtocolError):
    """An upload that the server does not take."""

    usual = Code.WRONG_SHAPE


_KINDS: dict[Code, type[ProtocolError]] = {
    Code.MALFORMED: MalformedMessage,
    Code.TOO_LARGE: TooLarge,
    Code.WRONG_VERSION: WrongVersion,
    Code.UNAUTHENTICATED: Unauthenticated,
    Code.RATE: TooFast,
    **dict.fromkeys((Code.FORBIDDEN, Code.BAD_SIGNATURE), NotAllowed),
    **dict.fromkeys((Code.OVERLOADED, Code.NOT_LEADER, Code.STORAGE), NotNow),
    **dict.fromkeys((Code.WRONG_OFFSET, Code.WRONG_DIGEST, *_CODES.values()), UploadRefused),
}


class WorkerDied(FoedusError, RuntimeError):
    """A worker process ended by itself (killed, or out of memory)."""


class Unreachable(FoedusError, ConnectionError):
    """The server cannot be reached, or the connection to it was lost; nothing is lost with it."""


class OwnerRefuses(FoedusError):
    """The rules of the owner of the data do not allow it.

    Attributes:
        reasons: in plain words, each with what would change it.
    """

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.reasons


class LedgerBroken(FoedusError):
    """The ledger of what left this machine was changed, or lines of it were cut off."""
