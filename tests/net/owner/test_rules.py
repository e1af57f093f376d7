"""The owner's rules: every rule lets pass and refuses, in plain words; a bad file is told with its line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import ConfigurationError
from foedus.net.owner import rules as owner
from foedus.net.owner.rules import _KEYS, TEMPLATE, Finding, Protections, Rules, Situation, parse, read, refused

A, PIN = "https://a.example:8765", "ab" * 32
MONDAY = datetime(2030, 1, 7, 12, 0)
Ask = Callable[[Rules], Sequence[Finding]]


def server(address: str = A, pin: str = PIN) -> Ask:
    return lambda rules: owner.server(rules, address, pin)


def task(digest: str = "c0ffee" * 10 + "1234", by_hand: bool = False) -> Ask:
    return lambda rules: owner.task(rules, digest, by_hand=by_hand)


def data(name: str = "heart", count: int | None = 100) -> Ask:
    return lambda rules: owner.data(rules, name, count)


def moment(**known: Any) -> Ask:
    return lambda rules: owner.moment(rules, Situation(**{"now": MONDAY, **known}))


def promised(**given: Any) -> Ask:
    return lambda rules: owner.protections(rules, Protections(**{"others": 2, **given}))


def upload(size: int, sent: int = 0) -> Ask:
    return lambda rules: owner.upload(rules, size, sent)


# rule: the file, what passes, what does not, and what is said then
RULES: dict[str, tuple[str, Ask, Ask, str]] = {
    "server": (f'[[server]]\naddress = "{A}/"', server(), server("https://b.example"), "is not among"),
    "server.pin": (
        f'[[server]]\naddress = "{A}"\npin = "{PIN.upper()}"',
        server(),
        server(pin="cd" * 32),
        "another key",
    ),
    "jurisdictions.allowed": (
        f'[jurisdictions]\nallowed = ["DE"]\n[[server]]\naddress = "{A}"\njurisdiction = "DE"\n'
        '[[server]]\naddress = "https://b.example"\njurisdiction = "US"',
        server(),
        server("https://b.example"),
        "is in US; allowed: DE",
    ),
    "tasks.approved": ('[tasks]\napproved = ["C0FFEEC0FFEEC0FF"]', task(), task("d" * 64), "is not approved"),
    "tasks.by_hand": ("[tasks]\nby_hand = true", task(by_hand=True), task(), "foedus tasks review"),
    "tasks": (
        "[tasks]\nby_hand = false\napproved = ['" + "d" * 64 + "']",
        task("d" * 64),
        task(by_hand=True),
        "does not let count",
    ),
    "data.offered": ('[data]\noffered = ["heart"]', data(), data("lung"), "offered: heart"),
    "data.least": ("[data]\nleast = 100", data(), data(count=99), "99 examples"),
    "data.most": ("[data]\nmost = 100", data(), data(count=101), "at most 100"),
    "when.hours": ('[when]\nhours = ["11:30-12:30"]', moment(), moment(now=MONDAY.replace(hour=13)), "it is 13:00"),
    "when.days": ('[when]\ndays = ["mon"]', moment(), moment(now=MONDAY.replace(day=8)), "today is tue"),
    "when.idle_minutes": (
        "[when]\nidle_minutes = 10",
        moment(idle_seconds=600),
        moment(idle_seconds=599),
        "used the machine",
    ),
    "when.on_power": ("[when]\non_power = true", moment(on_power=True), moment(on_power=False), "on battery"),
    "when.unmetered": ("[when]\nunmetered = true", moment(metered=False), moment(metered=True), "is metered"),
    "protections.least_others": (
        "[protections]\nleast_others = 3",
        promised(others=3),
        promised(others=2),
        "at least 2 others",
    ),
    "protections.encrypted_others": (
        "[protections]\nencrypted_others = 3",
        promised(others=3, encrypted=True),
        promised(others=500, secure=True),
        "an encrypted sum is not offered",
    ),
    "protections.secure_others": (
        "[protections]\nsecure_others = 100",
        promised(others=100, secure=True),
        promised(others=99, secure=True),
        "at least 99",
    ),
    "protections.budget": ("[protections]\nbudget = true", promised(epsilon=8.0), promised(), "budget is none"),
    "protections.most_epsilon": (
        "[protections]\nmost_epsilon = 8",
        promised(epsilon=8.0),
        promised(epsilon=8.1),
        "ε = 8.1",
    ),
    "limits.upload_megabytes": (
        "[limits]\nupload_megabytes = 1",
        upload(400_000, 600_000),
        upload(400_001, 600_000),
        "1 MB",
    ),
    "protections.most_client_epsilon": (
        "[protections]\nmost_client_epsilon = 8",
        lambda rules: owner.release(rules, 3, ""),
        lambda rules: owner.release(rules, 3, "one update more would make it 8.1"),
        "make it 8.1",
    ),
    "limits.noised_uploads": (
        "[limits]\nnoised_uploads = 3",
        lambda rules: owner.release(rules, 2, ""),
        lambda rules: owner.release(rules, 3, ""),
        "3 updates with noise of this client's own have left, and 3 are allowed",
    ),
    "limits.rounds_a_day": ("[limits]\nrounds_a_day = 3", moment(rounds_today=2), moment(rounds_today=3), "3 rounds"),
}


# Only the training process can tell whether they hold: tests/net/test_spending.py.
EXAMPLES = {"protections.most_example_epsilon", "protections.example_delta"}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_lets_pass_and_refuses(rule: str) -> None:
    text, passes, fails, told = RULES[rule]
    rules = parse(text)
    assert refused(passes(rules)) == ()
    reasons = refused(fails(rules))
    named = "tasks" if rule.startswith("tasks") else rule  # a task is refused by both together
    assert any(told in reason and f"(rules: {named})" in reason for reason in reasons), reasons


def test_every_rule_of_the_file_is_in_the_table_above() -> None:
    """But for checks of data (test_checks.py), and what only says whom a rule is about."""
    keys = {f"{section}.{key}" for section, keys in _KEYS.items() for key in keys if section != "checks"}
    others = {"server.address", "server.jurisdiction", "data.tell_examples", "protections.client_delta", *EXAMPLES}
    assert keys - others == set(RULES) - {"server", "tasks"}


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ("[when]\nidle_minutes = 1", moment()),
        ("[when]\non_power = true", moment()),
        ("[when]\nunmetered = true", moment()),
        ("[protections]\nsecure_others = 1", promised(others=500)),
        ("[protections]\nmost_epsilon = 8", promised()),
        (f'[jurisdictions]\nallowed = ["DE"]\n[[server]]\naddress = "{A}"', server()),
        ('[jurisdictions]\nallowed = ["DE"]', server()),
        (f'[[server]]\naddress = "{A}"\npin = "{PIN}"', server(pin="")),
    ],
)
def test_what_is_not_known_does_not_pass(text: str, ask: Ask) -> None:
    assert refused(ask(parse(text)))


def test_nothing_written_lets_pass_what_needs_no_word_and_asks_for_two_others() -> None:
    for rules in (parse(""), parse(TEMPLATE)):
        assert rules == Rules()
        for ask in (server(), data(), moment(), promised(), upload(10**12)):
            assert refused(ask(rules)) == ()
        assert refused(task()(rules))
        assert refused(promised(others=1)(rules))
        assert refused(data(count=0)(rules))


def test_every_line_of_the_template_that_is_switched_off_can_be_switched_on() -> None:
    lines = [
        line[2:] if line.startswith("# ") and ("=" in line or "[" in line) and "`" not in line else line
        for line in TEMPLATE.split("\n")
    ]
    rules = parse("\n".join(lines).replace('"3f1c..."', f'"{PIN}"').replace('"heart"', '"h"'))
    assert (rules.servers[0].jurisdiction, rules.most_epsilon, rules.checks.labels) == ("DE", 8.0, (0, 1))
    keys = sum(len(keys) for keys in _KEYS.values())
    assert sum("=" in line for line in lines if not line.startswith("#")) == keys


@given(clock=st.times(), begin=st.times(), end=st.times())
def test_hours_hold_every_minute_of_a_span_and_no_other(clock: Any, begin: Any, end: Any) -> None:
    clock, begin, end = (t.replace(second=0, microsecond=0, tzinfo=None) for t in (clock, begin, end))
    rules = parse(f'[when]\nhours = ["{begin:%H:%M}-{end:%H:%M}"]')
    at = (clock.hour - begin.hour) * 60 + clock.minute - begin.minute
    long = (end.hour - begin.hour) * 60 + end.minute - begin.minute
    inside = at % 1440 < (long % 1440 or 1440)
    assert (not refused(moment(now=datetime.combine(MONDAY, clock))(rules))) is inside


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[data]\nleast = \n", "is no TOML: .*line 2"),
        ("# nothing\n[dta]\nleast = 1", r"line 2: there is no section \[dta\]; did you mean data\?"),
        ("[data]\n\nlest = 1", "line 3: there is no rule data.lest; did you mean data.least"),
        ("[data]\nxyz = 1", "line 2: there is no rule data.xyz; there is: data.offered"),
        ("least = 1", r"line 1: there is no section \[least\]"),
        ("data = 1", "line 1: data is a section"),
        ('[data]\nleast = "5"', "line 2: data.least is a whole number of at least 0; not '5'"),
        ("[data]\nleast = true", "line 2: data.least"),
        ("[data]\nleast = 9\nmost = 3", "line 3: data.most = 3 is below data.least = 9"),
        ('[when]\nhours = ["22-6"]', "line 2: when.hours is spans"),
        ('[when]\nhours = ["25:00-26:00"]', "line 2: when.hours is spans"),
        ('[when]\ndays = ["monday"]', "line 2: when.days is days, of mon"),
        ('[when]\non_power = "yes"', "line 2: when.on_power is true or false"),
        ("[when]\nidle_minutes = nan", "line 2: when.idle_minutes"),
        ('[tasks]\napproved = ["beef"]', "line 2: tasks.approved is digests"),
        ('[tasks]\napproved = "beef"', "line 2: tasks.approved is digests"),
        ("[checks]\nlowest = 2\nhighest = 1", "line 3: checks.highest = 1 is below checks.lowest = 2"),
        ('[server]\naddress = "x"', r"line 1: each server has a section of its own; write \[\[server\]\]"),
        ('[[server]]\naddress = "x"\n\n[[server]]\npin = "' + "ab" * 32 + '"', "line 4: a server needs its address"),
        ('[[server]]\naddress = "x"\n[[server]]\naddress = "y"\npin = "z"', "line 5: server.pin is the 64"),
    ],
)
def test_a_bad_file_is_told_with_its_line_and_what_to_write(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        parse(text)


@given(st.text(alphabet="[]=\"'#\n.abdestu 0123"))
def test_no_text_does_worse_than_that(text: str) -> None:
    with contextlib.suppress(ConfigurationError):
        parse(text)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read(tmp_path / "rules.toml")
    (tmp_path / "rules.toml").write_bytes(b"\xff\xfe[")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read(tmp_path / "rules.toml")
    (tmp_path / "rules.toml").write_text(TEMPLATE)
    assert read(tmp_path / "rules.toml") == Rules()


def test_protections_are_told_in_plain_words() -> None:
    assert Protections(others=3, secure=True, epsilon=8.0).told() == (
        "summed with at least 3 others before anybody sees a sum",
        "under secure aggregation",
        "within a privacy budget of ε = 8",
    )
    assert Protections().told() == ("none",)
