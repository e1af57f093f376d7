"""Algorithms: values made of values.

An :class:`Algorithm` says what a client does (local training), how updates become one (an aggregator), and what
the server does with it (a server optimiser). Named variants are one-line compositions; a new one needs no class.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from foedus.core.aggregate import Aggregator, mean
from foedus.core.client import Client, LocalSGD, LocalTraining, Schedule, local_sgd
from foedus.core.gate import Gate, check_maskable
from foedus.core.method import Method, Personal, averaging
from foedus.core.server import ServerOptimiser, sgd
from foedus.core.stage import Stage
from foedus.core.timing import Buffered, Hierarchical, Timing
from foedus.errors import ConfigurationError, IncompatibleStages, NoGuarantee


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What happens in a round, from the received model to the next global model.

    Attributes:
        client: local training.
        aggregator: how the clients' updates become one update.
        server: what the server does with that update.
        buffers: how non-trainable buffers (BatchNorm statistics) are combined, if the task averages them.
        method: what clients and server do beyond training and averaging; ``None`` for nothing.
        timing: when updates are aggregated, see :mod:`foedus.core.timing`; ``None``: round by round.
        gate: what every update has to pass before anything is done with it.
        downlink: how the model travels to clients, e.g. ``chain(rotate(), quantise(8), mean())``: they start from what
            is left of it, while the server keeps the model as it is; ``None`` sends it as it is. (Caldas et al. 2018,
            "Expanding the reach of federated learning by reducing client resource requirements", section 3.)

    Example:
        >>> Algorithm(client=local_sgd(lr=0.1), server=sgd(lr=0.5)).label
        'local_sgd(lr=0.1, epochs=1, batch_size=32), mean(), server sgd(lr=0.5)'
    """

    client: Client
    aggregator: Aggregator = field(default_factory=mean)
    server: ServerOptimiser = field(default_factory=sgd)
    buffers: Aggregator = field(default_factory=mean)
    method: Method | None = None
    gate: Gate = field(default_factory=Gate)
    timing: Timing | None = None
    downlink: Aggregator | None = None

    def __post_init__(self) -> None:
        self._check_parts()
        if self.method is not None:
            _check_method(self.method, self.client)
        if isinstance(self.timing, Buffered):
            self._check_buffered(self.timing)
        if isinstance(self.timing, Hierarchical) and self.timing.rounds > 1:
            self._check_edges(self.timing)
        if self.aggregator.hidden:
            self._check_hidden()
        if self.downlink is not None:
            self._check_downlink(self.downlink)

    def _check_parts(self) -> None:
        """Refuse what is not of its kind."""
        if not isinstance(self.client, LocalSGD | LocalTraining):
            raise ConfigurationError(
                f"the client's part must be local training, e.g. foedus.local_sgd(lr=0.1); not {_told(self.client)}"
            )
        for name in ("aggregator", "buffers"):
            if not isinstance(value := getattr(self, name), Aggregator):
                hint = f", which is a stage before one: write foedus.chain({_told(value)}, foedus.mean())"
                raise ConfigurationError(
                    f"{name} must be an Aggregator, e.g. foedus.mean(); not {_told(value)}"
                    f"{hint if isinstance(value, Stage) else ''}"
                )
        if self.method is not None and not isinstance(self.method, Method):
            raise ConfigurationError(
                f"method must be a Method, e.g. foedus.lazy(share=0.01); not {_told(self.method)}. A model of each "
                "client's own is given as fedavg(local, personal=...)"
            )
        if not isinstance(self.gate, Gate):
            raise ConfigurationError(f"gate must be a Gate, e.g. foedus.Gate(max_norm=10.0); not {_told(self.gate)}")
        if self.timing is not None and not isinstance(self.timing, Buffered | Hierarchical):
            raise ConfigurationError(f"timing must be a timing, e.g. foedus.buffered(10); not {_told(self.timing)}")
        if not isinstance(self.server, ServerOptimiser):
            raise ConfigurationError(
                f"server must be a server optimiser, e.g. foedus.adam(lr=0.01); not {_told(self.server)}"
            )

    def _check_edges(self, timing: Hierarchical) -> None:
        """Whether edges may average more than once before the server does."""
        if self.method is not None:
            raise ConfigurationError(
                f"{self.method.label} gathers at the server, between whose rounds the edges would average "
                f"{timing.rounds} times without it. Write hierarchical(..., rounds=1), or leave out the method"
            )
        if self.aggregator.event is not None:
            raise IncompatibleStages(
                f"with {timing.label} edges average {timing.rounds} times before the server does, and "
                f"{self.aggregator.label} bounds what one client changes in one sum. Write hierarchical(..., rounds=1)"
            )

    def _check_hidden(self) -> None:
        """Refuse what would need single updates, or show them beside those that are masked or encrypted."""
        check_maskable(self.aggregator, self.gate)
        if isinstance(self.timing, Buffered) and self.aggregator.masking is not None:
            raise IncompatibleStages(
                f"{self.timing.label} takes updates as they come, and masks cancel only among clients who agree on "
                f"them for one round: {self.aggregator.label} needs rounds. Leave out the timing, or take mean()"
            )
        if isinstance(self.timing, Hierarchical) and self.timing.rounds > 1:
            raise IncompatibleStages(
                f"with {self.timing.label} edges average {self.timing.rounds} times among few clients, and "
                f"{self.aggregator.label} shows sums of at least {self._least()}. Write hierarchical(..., rounds=1)"
            )
        for name, rule in self.sides.items():
            if not rule.hidden:
                raise IncompatibleStages(
                    f"{self.method and self.method.label} sends {name!r} beside the update, by {rule.label}, which the "
                    f"server sees of every client, while {self.aggregator.label} hides the update. Give that channel "
                    "masked(...) or encrypted(...), too, or use a method that sends updates only"
                )

    def _least(self) -> int:
        hiding = self.aggregator.masking or self.aggregator.sealed
        assert hiding is not None
        return hiding.least

    def _check_buffered(self, timing: Buffered) -> None:
        """Whether a step has the updates that the rule needs, where that is known beforehand, and they may be stale."""
        for rule in (self.aggregator, self.buffers):
            if timing.size is not None and timing.size < rule.least:
                raise ConfigurationError(
                    f"{rule.label} needs at least {rule.least} updates, and a step of {timing.label} has "
                    f"{timing.size}: write timing=foedus.buffered({rule.least}), or take another aggregator"
                )
        scales = timing.mixing is not None or timing.staleness.weight(1) != 1.0
        if self.method is not None and self.method.unscaled and scales:
            raise ConfigurationError(
                f"{self.method.label} keeps sums of updates as clients send them, and {timing.label} scales stale "
                "ones down. Use foedus.buffered(..., staleness=foedus.core.timing.constant()), or scaffold or fednova"
            )

    def _check_downlink(self, downlink: Any) -> None:
        if not isinstance(downlink, Aggregator):
            raise ConfigurationError(
                f"downlink is a chain that ends with a mean, e.g. foedus.chain({_told(downlink)}, foedus.mean()); not "
                f"{_told(downlink)}"
            )
        if downlink.remember is not None or not downlink.additive:
            raise ConfigurationError(
                f"downlink={downlink.label} keeps something of a sender's, or compares many; the model is one message "
                "to all. Write stages and a mean: foedus.chain(foedus.rotate(), foedus.quantise(8), foedus.mean())"
            )
        if downlink.event is not None or downlink.tell is not None or downlink.hidden:
            raise ConfigurationError(
                f"downlink={downlink.label} adds noise for privacy, or masks, or tells clients something; the model "
                "was made private, if at all, before it is sent. Write stages and a mean: "
                "foedus.chain(foedus.rotate(), foedus.quantise(8), foedus.mean())"
            )
        if self.method is not None and self.method.home is not None:
            raise ConfigurationError(
                f"downlink={downlink.label} compresses whole models, and with {self.method.label} parts of the model "
                "stay with the clients. Leave out one of them"
            )

    def with_(
        self, *, timing: Timing | None = None, gate: Gate | None = None, downlink: Aggregator | None = None,
        buffers: Aggregator | None = None, aggregator: Aggregator | None = None,
        sides: Mapping[str, Aggregator] | None = None,
    ) -> Algorithm:  # fmt: skip
        """The same algorithm with another timing, gate, downlink, or other rules; what is not given stays.

        Args:
            timing, gate, downlink: as for ``fedavg``.
            aggregator, buffers: how updates and buffers are aggregated.
            sides: how what the method sends beside the update is, by channel.

        Raises:
            ConfigurationError: they do not go together, or the method has no such channel.

        Example:
            >>> from foedus.core.timing import buffered
            >>> Algorithm(client=local_sgd(lr=0.1)).with_(timing=buffered(10)).timing.size
            10
        """
        return replace(
            self, timing=timing or self.timing, gate=gate or self.gate, downlink=downlink or self.downlink,
            buffers=buffers or self.buffers, aggregator=aggregator or self.aggregator,
            method=self.method if not sides else self._gathering(sides),
        )  # fmt: skip

    def _gathering(self, sides: Mapping[str, Aggregator]) -> Method:
        """The method with other rules for its channels."""
        for name in sides:
            if name in ("update", "buffers"):
                raise ConfigurationError(f"{name!r} is no channel of a method's own: write with_({_RULES[name]}=...)")
            self.aggregator_of(name)
        assert self.method is not None
        told = ", ".join(f"{name} by {_told(rule)}" for name, rule in sorted(sides.items()))
        return self.method._replace(sides={**self.method.sides, **sides}, label=f"{self.method.label} [{told}]")

    @property
    def sides(self) -> Mapping[str, Aggregator]:
        """The rules of what a method gathers beside the update, by channel; none without a method."""
        return {} if self.method is None else self.method.sides

    def channels(self, *, buffers: bool) -> Iterator[tuple[str, Aggregator]]:
        """What travels, and by which rule: the update, buffers where they are averaged, and a method's own."""
        yield "update", self.aggregator
        if buffers:
            yield "buffers", self.buffers
        yield from sorted(self.sides.items())

    def aggregator_of(self, channel: str) -> Aggregator:
        """The aggregator of what travels in a channel: "update", "buffers", or one of the method's own.

        Raises:
            ConfigurationError: the method has no such channel.
        """
        if channel in ("update", "buffers"):
            return self.aggregator if channel == "update" else self.buffers
        if channel not in self.sides:
            told = ", ".join(map(repr, self.sides)) or "none"
            raise ConfigurationError(
                f"the method {self.method and self.method.label} contributed to the channel {channel!r}, which has no "
                f"aggregator in its sides (there: {told})"
            )
        return self.sides[channel]

    @property
    def label(self) -> str:
        method = "" if self.method is None else f"{self.method.label}: "
        buffers = "" if self.buffers.label == mean().label else f", buffers {self.buffers.label}"
        gate = "" if self.gate == Gate() else f", {self.gate.label}"
        timing = "" if self.timing is None else f", {self.timing.label}"
        downlink = "" if self.downlink is None else f", downlink {self.downlink.label}"
        return (
            f"{method}{self.client.label}, {self.aggregator.label}, server {self.server.label}{buffers}{gate}{timing}"
            f"{downlink}"
        )


_RULES = {"update": "aggregator", "buffers": "buffers"}  # what with_ calls them


def _check_method(method: Method, client: Client) -> None:
    """Refuse a method whose channels cannot be aggregated, or that local training does not fit."""
    sides: Mapping[str, Any] = method.sides
    for name, value in sides.items():
        if name in ("update", "buffers"):
            raise ConfigurationError(
                f"{method.label} has a channel {name!r} of its own, which is the name of the model's: call it otherwise"
            )
        if not isinstance(value, Aggregator):
            hint = f": write foedus.chain({_told(value)}, foedus.mean())" if isinstance(value, Stage) else ""
            raise ConfigurationError(
                f"{method.label} aggregates {name!r} by {_told(value)}, which is no Aggregator such as "
                f"foedus.mean(){hint}"
            )
    if strange := sorted(method.updates - method.sides.keys()):
        raise ConfigurationError(f"{method.label} names {strange} among its updates, which are none of its sides")
    method.fits(client)
    if method.looks and isinstance(client, LocalTraining) and client.private:
        raise NoGuarantee(
            f"what clients of {method.label} send also comes from looking at their data without noise (a loss that "
            "they measure, say), and the noise in their training does not cover that. Write fedavg(dp_sgd(...)), or a "
            "method that makes use of the data by training only"
        )


def _told(value: Any) -> str:
    """A value in a message, shortly; a function that should have been called is told so."""
    if inspect.isfunction(value):
        return f"the function {value.__name__} itself: write {value.__name__}(...)"
    return getattr(value, "label", None) or f"{reprlib.repr(value)} (of type {type(value).__name__})"


def fedavg(
    client: Client, *, aggregator: Aggregator | None = None, server: ServerOptimiser | None = None,
    gate: Gate | None = None, timing: Timing | None = None, personal: Personal | None = None,
    downlink: Aggregator | None = None,
) -> Algorithm:  # fmt: skip
    """Federated averaging (McMahan et al. 2017): clients train for a while, the server averages.

    Args:
        client: local training, e.g. ``local_sgd(lr=0.1, epochs=1, batch_size=10)``.
        aggregator: by default the mean weighted by numbers of examples.
        server: by default the average becomes the model; ``server=adam(lr=0.01)`` makes it FedAdam.
        gate: by default every update must be finite and of the right form.
        timing: by default round by round; ``buffered(10)`` takes updates as they come, ``hierarchical(4)`` by edges.
        personal: gives clients models of their own: ``fine_tune()``, ``local_parts("head")``, ``ditto(0.1)``, ...
        downlink: by default the model travels to clients as it is; ``chain(rotate(), quantise(8), mean())`` takes a
            quarter of the bytes.

    Example:
        >>> fedavg(local_sgd(lr=0.1)).server.label
        'sgd(lr=1.0)'
    """
    own = None if personal is None else averaging()
    made = composed(client, own, aggregator=aggregator, server=server, personal=personal)
    return replace(made, gate=gate or Gate(), timing=timing, downlink=downlink)


def composed(
    client: Client, method: Method | None, *, aggregator: Aggregator | None = None,
    server: ServerOptimiser | None = None, personal: Personal | None = None,
) -> Algorithm:  # fmt: skip
    """The algorithm of a method, for those who write one: what is not given is as in federated averaging.

    Args:
        client: local training.
        method: what clients and server do beyond it; ``None`` for nothing.
        aggregator, server: as for :func:`fedavg`.
        personal: wraps the method.

    Example:
        >>> from foedus.core.method import averaging
        >>> composed(local_sgd(lr=0.1), averaging()).method.label
        'plain()'
    """
    if method is not None and personal is not None:
        if not callable(personal):
            raise ConfigurationError(f"personal is a value such as foedus.fine_tune(); not {_told(personal)}")
        method = personal(method)
    return Algorithm(client=client, aggregator=aggregator or mean(), server=server or sgd(), method=method)


def fedsgd(lr: float | Schedule, *, aggregator: Aggregator | None = None) -> Algorithm:
    """Federated SGD, the naive baseline: one gradient over all of a client's data per round, averaged
    (McMahan et al. 2017, section 2). With every client in the cohort this is gradient descent on the pooled data.

    Example:
        >>> fedsgd(lr=0.1).client.batch_size is None
        True
    """
    return fedavg(local_sgd(lr, steps=1, batch_size=None), aggregator=aggregator)
