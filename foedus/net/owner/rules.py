"""The owner's rules: what this machine may do for others, in one file that the owner can read.

The file is TOML (``rules.toml`` in the agent's folder), and :data:`TEMPLATE` is how a new one looks, with a comment for
every line. It is read before every check-in, so that a change holds at once. Reading is strict: a misspelt rule would
be a rule that does not hold, so it is an error, with its line.

Deciding is pure: functions of the rules and of what is known give :class:`Finding`s, one a rule, each with whether it
lets the thing pass and why, in plain words. What cannot be found out (is the network metered?) does not pass a rule
that asks for it.

Not here: how a machine's surroundings are found out (``surroundings.py``), the checks that data must pass
(``checks.py``), approvals by hand (``approvals.py``), consent (``consent.py``).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from pathlib import Path
from typing import Any, NamedTuple

from foedus.errors import ConfigurationError

__all__ = ["Checks", "Finding", "Protections", "Rules", "ServerRule", "Situation", "parse", "read", "refused"]

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

TEMPLATE = """\
# What this machine may do for others. Read before every check-in: a change holds at once.
# A line that begins with # says something or is switched off. Nothing that is not allowed here is done.

# Which servers. Without any [[server]], only the one that `foedus join URL --pin ...` names.
# [[server]]
# address = "https://fl.example.org:8765"
# pin = "3f1c..."                # SHA-256 of its certificate authority, from whoever runs it, not from the server
# jurisdiction = "DE"            # where you know it to be

# [jurisdictions]
# allowed = ["DE", "FR"]         # only servers in these; needs a jurisdiction for each server above

[tasks]
approved = []                    # digests of source bundles that may run; a prefix of 16 digits or more will do
by_hand = true                   # also those approved by `foedus tasks approve`

[data]
# offered = ["heart"]            # names of data sets that may be trained on; without it, the one that is given
least = 1                        # train only with at least so many examples
# most = 100000                  # and at most so many
# tell_examples = true           # say how many there are, not only whether there are any, before anything is trained

[when]
# hours = ["22:00-06:00"]        # local time; without it, at any hour
# days = ["mon", "tue", "wed", "thu", "fri"]
# idle_minutes = 10              # nobody has used the machine for so long
# on_power = true                # not on battery
# unmetered = true               # not on a network that is paid for by volume

[checks]                         # what the data must pass before it may train
finite = true                    # no missing or infinite numbers
# inputs = ["float32[13]"]       # kind and shape of one example's inputs
# target = "int64"
# lowest = 0.0                   # no input below
# highest = 300.0                # no input above
# labels = [0, 1]                # every one of these must be there, and no other

[protections]                    # what a server must promise before anything is sent
least_others = 2                 # an update is summed with at least so many others' before anybody looks at it
# secure_others = 100            # only under secure aggregation, with at least so many others
# encrypted_others = 2           # only under encrypted sums, with at least so many others
# budget = true                  # never without a privacy budget
# most_epsilon = 8.0             # and never with a greater one
# most_client_epsilon = 8.0      # only with noise of this client's own, and no more than this in all runs together
# client_delta = 1e-5            # the δ of that
# most_example_epsilon = 4.0     # only DP-SGD, and of no example more than this, in all runs of all servers together
# example_delta = 1e-5           # the δ of that

[limits]
# upload_megabytes = 5000        # in all, as the ledger counts
# rounds_a_day = 24
# noised_uploads = 200           # updates with noise of this client's own, in all runs of all servers
"""


@dataclass(frozen=True)
class ServerRule:
    """A server that may be joined. ``pin`` is hex; empty only where a public authority vouches for it."""

    address: str
    pin: str = ""
    jurisdiction: str = ""


@dataclass(frozen=True)
class Checks:
    """What data must pass before it may train; ``None`` where nothing is asked."""

    finite: bool = True
    inputs: tuple[str, ...] | None = None
    target: str | None = None
    lowest: float | None = None
    highest: float | None = None
    labels: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Protections:
    """What a server promises for an update, or what an owner asks for.

    Attributes:
        others: with how many other updates it is summed at least, before anybody sees a sum.
        secure: whether the server itself cannot see the single update, because it is masked.
        epsilon: the privacy budget of the whole run; ``None`` without one.
        encrypted: whether the server cannot see it because it is encrypted, under a key that other clients have, too.
    """

    others: int = 0
    secure: bool = False
    epsilon: float | None = None
    encrypted: bool = False

    def told(self) -> tuple[str, ...]:
        """In plain words, for the ledger."""
        found = [f"summed with at least {self.others} others before anybody sees a sum"] if self.others else []
        found += ["under secure aggregation"] if self.secure else []
        found += ["encrypted, under a key that the silos share"] if self.encrypted else []
        found += [] if self.epsilon is None else [f"within a privacy budget of ε = {self.epsilon:g}"]
        return tuple(found) or ("none",)


@dataclass(frozen=True)
class Rules:
    """What the owner allows. The fields are the file's; see :data:`TEMPLATE`.

    Example:
        >>> rules = parse('[when]\\nhours = ["22:00-06:00"]')
        >>> refused(moment(rules, Situation(now=datetime(2030, 1, 7, 12, 0))))
        ('it is 12:00, and work is allowed at 22:00-06:00 only (rules: when.hours)',)
    """

    servers: tuple[ServerRule, ...] = ()
    jurisdictions: tuple[str, ...] = ()
    approved: tuple[str, ...] = ()
    by_hand: bool = True
    offered: tuple[str, ...] = ()
    least: int = 1
    most: int | None = None
    tell_examples: bool = False
    hours: tuple[tuple[time, time], ...] = ()
    days: tuple[str, ...] = ()
    idle_minutes: float = 0.0
    on_power: bool = False
    unmetered: bool = False
    checks: Checks = field(default_factory=Checks)
    least_others: int = 2
    secure_others: int | None = None
    encrypted_others: int | None = None
    budget: bool = False
    most_epsilon: float | None = None
    most_client_epsilon: float | None = None
    client_delta: float = 1e-5
    noised_uploads: int | None = None
    most_example_epsilon: float | None = None
    example_delta: float = 1e-5
    upload_megabytes: float | None = None
    rounds_a_day: int | None = None


class Situation(NamedTuple):
    """What is known of the machine; ``None`` for what cannot be found out.

    Attributes:
        now: local time.
        idle_seconds: for how long nobody has used it.
        on_power: whether it is plugged in.
        metered: whether the network is paid for by volume.
        sent: bytes that left so far, as the ledger counts.
        rounds_today: rounds done since midnight.
    """

    now: datetime
    idle_seconds: float | None = None
    on_power: bool | None = None
    metered: bool | None = None
    sent: int = 0
    rounds_today: int = 0


class Finding(NamedTuple):
    """What one rule says: its name in the file, whether the thing passes, and why or why not."""

    rule: str
    passes: bool
    told: str


def refused(findings: Sequence[Finding]) -> tuple[str, ...]:
    """The reasons of the rules that do not let the thing pass; none, if it is allowed."""
    return tuple(f"{finding.told} (rules: {finding.rule})" for finding in findings if not finding.passes)


# --- deciding -----------------------------------------------------------------------------------------------


def server(rules: Rules, address: str, pin: str) -> list[Finding]:
    """Whether a server may be joined, by its address and the pinned key that its connection was checked with."""
    if not rules.servers:
        found = [Finding("server", True, f"{address} is the server that was named, and no other is listed")]
        listed = None
    else:
        listed = next((s for s in rules.servers if s.address.rstrip("/") == address.rstrip("/")), None)
        told = ", ".join(s.address for s in rules.servers)
        found = [Finding("server", listed is not None, f"{address} is {'' if listed else 'not '}among {told}")]
    if listed is not None and listed.pin:
        same = listed.pin.lower() == pin.lower()
        said = "the key that the rules pin" if same else f"another key ({pin[:16] or 'none'}...) than the rules pin"
        found.append(Finding("server.pin", same, f"{address} has {said}"))
    if rules.jurisdictions:
        where = listed.jurisdiction if listed else ""
        allowed = ", ".join(rules.jurisdictions)
        said = f"{address} is in {where or 'no jurisdiction that the rules name'}; allowed: {allowed}"
        found.append(Finding("jurisdictions.allowed", where in rules.jurisdictions, said))
    return found


def task(rules: Rules, digest: str, *, by_hand: bool) -> list[Finding]:
    """Whether a source bundle may be imported: listed by its digest, or approved by hand."""
    listed = any(digest.startswith(known.lower()) for known in rules.approved)
    if listed:
        return [Finding("tasks.approved", True, f"the task {digest[:16]} is approved by its digest")]
    if rules.by_hand and by_hand:
        return [Finding("tasks.by_hand", True, f"the task {digest[:16]} was approved by hand")]
    said = f"the task {digest[:16]} is not approved; see it with: foedus tasks review {digest[:16]}"
    if by_hand:
        said = f"the task {digest[:16]} was approved by hand, which tasks.by_hand = false does not let count"
    return [Finding("tasks", False, said)]


def data(rules: Rules, name: str, count: int | None) -> list[Finding]:
    """Whether a data set of so many examples may be trained on; ``None`` where the number is not known yet."""
    found = []
    if rules.offered:
        known = ", ".join(rules.offered)
        found.append(Finding("data.offered", name in rules.offered, f"the data set is {name!r}; offered: {known}"))
    if count is not None:
        enough = count >= rules.least
        found.append(
            Finding("data.least", enough, f"there are {count} examples, and at least {rules.least} are wanted")
        )
        if rules.most is not None:
            said = f"there are {count} examples, and at most {rules.most} may be trained on"
            found.append(Finding("data.most", count <= rules.most, said))
    return found


def moment(rules: Rules, now: Situation) -> list[Finding]:
    """Whether the machine may work now."""
    found = []
    clock = now.now.time()
    if rules.hours:
        told = ", ".join(f"{a:%H:%M}-{b:%H:%M}" for a, b in rules.hours)
        inside = any(_within(clock, *span) for span in rules.hours)
        found.append(Finding("when.hours", inside, f"it is {clock:%H:%M}, and work is allowed at {told} only"))
    if rules.days:
        today = DAYS[now.now.weekday()]
        told = ", ".join(rules.days)
        found.append(Finding("when.days", today in rules.days, f"today is {today}, and work is allowed on {told} only"))
    if rules.idle_minutes:
        found.append(_known("when.idle_minutes", _idle(rules, now), "how long the machine was idle"))
    if rules.on_power:
        said = (
            None
            if now.on_power is None
            else (now.on_power, "the machine is " + ("on power" if now.on_power else "on battery"))
        )
        found.append(_known("when.on_power", said, "whether the machine is on power"))
    if rules.unmetered:
        said = (
            None if now.metered is None else (not now.metered, f"the network is {'' if now.metered else 'not '}metered")
        )
        found.append(_known("when.unmetered", said, "whether the network is metered"))
    if rules.rounds_a_day is not None:
        told = f"{now.rounds_today} rounds were done today, and {rules.rounds_a_day} a day are allowed"
        found.append(Finding("limits.rounds_a_day", now.rounds_today < rules.rounds_a_day, told))
    return found


def protections(rules: Rules, given: Protections) -> list[Finding]:
    """Whether what a server promises is enough."""
    told = f"the update would be summed with at least {given.others} others, and {rules.least_others} are wanted"
    found = [Finding("protections.least_others", given.others >= rules.least_others, told)]
    if rules.secure_others is not None:
        enough = given.secure and given.others >= rules.secure_others
        said = f"with at least {given.others} others" if given.secure else "not offered"
        told = f"secure aggregation is {said}; wanted: with at least {rules.secure_others}"
        found.append(Finding("protections.secure_others", enough, told))
    if rules.encrypted_others is not None:
        enough = given.encrypted and given.others >= rules.encrypted_others
        said = f"with at least {given.others} others" if given.encrypted else "not offered"
        told = f"an encrypted sum is {said}; wanted: with at least {rules.encrypted_others}"
        found.append(Finding("protections.encrypted_others", enough, told))
    if rules.budget or rules.most_epsilon is not None:
        said = "none" if given.epsilon is None else f"ε = {given.epsilon:g}"
        found.append(Finding("protections.budget", given.epsilon is not None, f"the run's privacy budget is {said}"))
    if rules.most_epsilon is not None and given.epsilon is not None:
        told = f"the run's privacy budget is ε = {given.epsilon:g}, and at most {rules.most_epsilon:g} is allowed"
        found.append(Finding("protections.most_epsilon", given.epsilon <= rules.most_epsilon, told))
    return found


def upload(rules: Rules, size: int, sent: int) -> list[Finding]:
    """Whether so many more bytes may leave."""
    if rules.upload_megabytes is None:
        return []
    told = f"{sent / 1e6:.1f} MB left so far, {size / 1e6:.1f} MB are to, and {rules.upload_megabytes:g} MB are allowed"
    return [Finding("limits.upload_megabytes", sent + size <= rules.upload_megabytes * 1e6, told)]


def release(rules: Rules, before: int, told: str) -> list[Finding]:
    """Whether one update more may leave that has noise of this client's own.

    Args:
        rules: the owner's.
        before: how many have left.
        told: why, with this one, a server could learn too much of the client; empty if not.
    """
    found = []
    if rules.noised_uploads is not None:
        left = f"{before} updates with noise of this client's own have left, and {rules.noised_uploads} are allowed"
        found.append(Finding("limits.noised_uploads", before < rules.noised_uploads, left))
    if rules.most_client_epsilon is not None:
        found.append(Finding("protections.most_client_epsilon", not told, told or "the update's own noise hides it"))
    return found


def _idle(rules: Rules, now: Situation) -> tuple[bool, str] | None:
    if now.idle_seconds is None:
        return None
    minutes = now.idle_seconds / 60
    return (
        minutes >= rules.idle_minutes,
        f"nobody used the machine for {minutes:.0f} minutes; wanted: {rules.idle_minutes:g}",
    )


def _known(rule: str, found: tuple[bool, str] | None, what: str) -> Finding:
    if found is None:
        return Finding(rule, False, f"it cannot be found out here {what}; leave the rule out, or say how to find out")
    return Finding(rule, *found)


def _within(clock: time, begin: time, end: time) -> bool:
    """Whether a time lies in a span, which may go over midnight; a span that ends where it begins is a whole day."""
    return begin <= clock < end if begin < end else clock >= begin or clock < end


# --- reading ------------------------------------------------------------------------------------------------


def read(path: Path) -> Rules:
    """The rules in a file.

    Raises:
        ConfigurationError: there is none, or it says something that is no rule; with the line.
    """
    try:
        return parse(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise ConfigurationError(f"the rules {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"the rules {path} are not text in UTF-8; save them so") from None


def parse(text: str, name: str = "rules.toml") -> Rules:
    """The rules in a text.

    Args:
        text: TOML, see :data:`TEMPLATE`.
        name: of the file, for messages.

    Example:
        >>> parse("[data]\\nlest = 5")
        Traceback (most recent call last):
        foedus.errors.ConfigurationError: rules.toml, line 2: there is no rule data.lest; did you mean data.least?
    """
    try:
        told = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{name} is no TOML: {error}. A rule is written: least = 50") from None
    return _Reader(text, name).rules(told)


class _Key(NamedTuple):
    """A key of the file: the field of :class:`Rules` that it fills, how it is read, and what is wanted."""

    field: str
    read: Callable[[Any], Any]
    wanted: str


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError
    return float(value)


def _positive(value: Any) -> float:
    if (found := _number(value)) < 0:
        raise ValueError
    return found


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError
    return value


def _share(value: Any) -> float:
    if not 0 < _positive(value) < 1:
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _many(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def many(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError
        return tuple(read(each) for each in value)

    return many


def _digest(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{16,64}", _text(value)):
        raise ValueError
    return str(value).lower()


def _pin(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", _text(value)):
        raise ValueError
    return str(value).lower()


def _day(value: Any) -> str:
    if value not in DAYS:
        raise ValueError
    return str(value)


def _hours(value: Any) -> tuple[time, time]:
    found = re.fullmatch(r"(\d\d:\d\d)-(\d\d:\d\d)", _text(value))
    if not found:
        raise ValueError
    return time.fromisoformat(found[1]), time.fromisoformat(found[2])


_KEYS: Mapping[str, Mapping[str, _Key]] = {
    "server": {
        "address": _Key("address", _text, 'an address, e.g. "https://fl.example.org:8765"'),
        "pin": _Key("pin", _pin, "the 64 hexadecimal digits of a SHA-256"),
        "jurisdiction": _Key("jurisdiction", _text, 'a short name, e.g. "DE"'),
    },
    "jurisdictions": {"allowed": _Key("jurisdictions", _many(_text), 'short names, e.g. ["DE", "FR"]')},
    "tasks": {
        "approved": _Key("approved", _many(_digest), "digests of 16 to 64 hexadecimal digits, in a list"),
        "by_hand": _Key("by_hand", _bool, "true or false"),
    },
    "data": {
        "offered": _Key("offered", _many(_text), 'names of data sets, e.g. ["heart"]'),
        "least": _Key("least", _count, "a whole number of at least 0"),
        "most": _Key("most", _count, "a whole number of at least 0"),
        "tell_examples": _Key("tell_examples", _bool, "true or false"),
    },
    "when": {
        "hours": _Key("hours", _many(_hours), 'spans of local time, e.g. ["22:00-06:00"]'),
        "days": _Key("days", _many(_day), f"days, of {', '.join(DAYS)}"),
        "idle_minutes": _Key("idle_minutes", _positive, "a number of minutes"),
        "on_power": _Key("on_power", _bool, "true or false"),
        "unmetered": _Key("unmetered", _bool, "true or false"),
    },
    "checks": {
        "finite": _Key("finite", _bool, "true or false"),
        "inputs": _Key("inputs", _many(_text), 'kinds of inputs, e.g. ["float32[13]"]'),
        "target": _Key("target", _text, 'the kind of a target, e.g. "int64"'),
        "lowest": _Key("lowest", _number, "a number"),
        "highest": _Key("highest", _number, "a number"),
        "labels": _Key("labels", _many(_number), "numbers, e.g. [0, 1]"),
    },
    "protections": {
        "least_others": _Key("least_others", _count, "a whole number of at least 0"),
        "secure_others": _Key("secure_others", _count, "a whole number of at least 0"),
        "encrypted_others": _Key("encrypted_others", _count, "a whole number of at least 0"),
        "budget": _Key("budget", _bool, "true or false"),
        "most_epsilon": _Key("most_epsilon", _positive, "a number of at least 0"),
        "most_client_epsilon": _Key("most_client_epsilon", _positive, "a number of at least 0"),
        "client_delta": _Key("client_delta", _share, "a number between 0 and 1"),
        "most_example_epsilon": _Key("most_example_epsilon", _positive, "a number of at least 0"),
        "example_delta": _Key("example_delta", _share, "a number between 0 and 1"),
    },
    "limits": {
        "upload_megabytes": _Key("upload_megabytes", _positive, "a number of megabytes"),
        "rounds_a_day": _Key("rounds_a_day", _count, "a whole number of at least 0"),
        "noised_uploads": _Key("noised_uploads", _count, "a whole number of at least 0"),
    },
}


class _Reader:
    """Turns what TOML gave into rules, and finds the line of whatever is wrong."""

    def __init__(self, text: str, name: str) -> None:
        self._name, self._lines = name, _lines(text)

    def rules(self, told: Mapping[str, Any]) -> Rules:
        fields: dict[str, Any] = {}
        for section, content in told.items():
            if section not in _KEYS:
                raise self._error((section, 0, ""), f"there is no section [{section}]{_near(section, _KEYS)}")
            if section == "server":
                fields["servers"] = self._servers(content)
            elif not isinstance(content, dict):
                raise self._error(("", 0, section), f"{section} is a section; write [{section}] on a line of its own")
            else:
                found = self._section(section, 0, content)
                fields |= {"checks": Checks(**found)} if section == "checks" else found
        return self._consistent(Rules(**fields))

    def _servers(self, content: Any) -> tuple[ServerRule, ...]:
        if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
            raise self._error(("server", 0, ""), "each server has a section of its own; write [[server]]")
        found = []
        for i, each in enumerate(content):
            values = self._section("server", i, each)
            if "address" not in values:
                raise self._error(("server", i, ""), 'a server needs its address: address = "https://..."')
            found.append(ServerRule(**values))
        return tuple(found)

    def _section(self, section: str, index: int, content: Mapping[str, Any]) -> dict[str, Any]:
        found, keys = {}, _KEYS[section]
        for key, value in content.items():
            at = (section, index, key)
            if key not in keys:
                raise self._error(at, f"there is no rule {section}.{key}{_near(key, keys, section + '.')}")
            try:
                found[keys[key].field] = keys[key].read(value)
            except ValueError:
                raise self._error(at, f"{section}.{key} is {keys[key].wanted}; not {value!r}") from None
        return found

    def _consistent(self, rules: Rules) -> Rules:
        if rules.most is not None and rules.most < rules.least:
            raise self._error(("data", 0, "most"), f"data.most = {rules.most} is below data.least = {rules.least}")
        low, high = rules.checks.lowest, rules.checks.highest
        if low is not None and high is not None and high < low:
            raise self._error(("checks", 0, "highest"), f"checks.highest = {high:g} is below checks.lowest = {low:g}")
        return rules

    def _error(self, at: tuple[str, int, str], told: str) -> ConfigurationError:
        section, index, _ = at
        line = self._lines.get(at) or self._lines.get((section, index, "")) or 1
        return ConfigurationError(f"{self._name}, line {line}: {told}")


def _lines(text: str) -> dict[tuple[str, int, str], int]:
    """Line numbers, from 1, of sections and keys: (section, how many of that name came before, key) → line."""
    found: dict[tuple[str, int, str], int] = {}
    section, index, seen = "", 0, dict[str, int]()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[{1,2}\s*([\w-]+)", line):
            section = header[1]
            index = seen.get(section, 0)
            seen[section] = index + 1
            found.setdefault((section, index, ""), number)
        elif key := re.match(r"\s*([\w-]+)\s*[=.]", line):
            found.setdefault((section, index, key[1]), number)
            if not section:
                found.setdefault((key[1], 0, ""), number)
    return found


def _near(word: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; there is: {', '.join(prefix + k for k in known)}"
