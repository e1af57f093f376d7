"""What an audit found, in plain words: who could learn what, and what to switch on.

Every sentence rests on a figure that was measured, or says that it does not. *Nothing was found* never means *nothing
can be found*: attacks get better, a promise (ε) does not get worse.

Not here: how the report looks (``foedus.report.pages``), the measuring (``parts.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from foedus.audit.protections import Protections
from foedus.errors import FoedusError
from foedus.privacy.claims import calibrate

Figures = Mapping[str, Any]

WEAK, STRONG = 1.0, 8.0  # ε up to which little, and from which on much, is learnt about a client
TARGET = 8.0  # ε that is proposed where there is none
FEW = 200  # clients in a round, below which noise for a small ε costs a model most of what it learns


class Level(IntEnum):
    """How much somebody could learn."""

    LITTLE = 0
    SOME = 1
    MUCH = 2

    @property
    def word(self) -> str:
        return ("little was found", "something can be learnt", "much can be learnt")[self]


@dataclass(frozen=True, kw_only=True)
class Place:
    """What somebody at some place could learn.

    Attributes:
        who: where the attacker sits.
        level: how much; ``None`` where it was not measured.
        told: sentences.
    """

    who: str
    level: Level | None
    told: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The level in words."""
        return "not measured" if self.level is None else self.level.word


def places(guard: Protections, parts: Mapping[str, Figures]) -> list[Place]:
    """What an adversary at each place could learn.

    Args:
        guard: what is switched on.
        parts: figures by part, of which some may be missing or have failed.
    """
    return [_server(guard, parts), _client(guard, parts), _eavesdropper(guard), _holder(guard, parts)]


# --- the four places ----------------------------------------------------------------------------------------


def _server(guard: Protections, parts: Mapping[str, Figures]) -> Place:
    seen, rebuilt = _part(parts, "canaries"), _rebuilt(parts)
    sent, models = seen.get("messages"), _level(seen.get("every model"))  # it makes the models, and has all of them
    told: list[str] = []
    if guard.sealed:
        level = models
        told.append(
            "It sees encrypted updates, and of them nothing but who sent how much. With the help of any one client, "
            "all of which have the key, it reads every update; so does whoever steals the key."
        )
        told.append(_with_models(seen))
        told.append("What follows is what clients see, who decrypt sums, and the server, which makes models of them:")
    elif guard.hidden:
        level = max(Level.SOME if rebuilt else Level.LITTLE, models)
        noise = ", with noise in them that clients added" if guard.shared else ""
        told.append(
            f"It sees sums over a cohort only{noise}. That holds as long as it does not control so many of the "
            "cohort's clients that it knows the rest of the sum, and as long as clients check that all of them have "
            "the same model."
        )
        told.append(_with_models(seen))
    elif guard.local:
        level = Level.MUCH if rebuilt else max(_level(sent), models)
        told.append(f"It sees single updates, with noise that clients added. {_measured(sent, _updates(sent))}")
        told.append(_claim(guard))
    else:
        level = Level.MUCH
        told.append(f"It sees every client's update as it was sent.{_in_vain(guard)}")
    told += _inversions(parts)
    return Place(who="a curious server", level=level, told=tuple(told))


def _with_models(seen: Figures) -> str:
    """What the models tell a server that sees no single update."""
    measured = _measured(seen.get("every model"), "of the whole run, from the models")
    return f"But it has the model of every round, and learns from them what a client does. {measured}".rstrip()


def _updates(sent: Figures | None) -> str:
    """Of how many updates a figure is."""
    if sent is None or sent["sent"] == 1:
        return "of one update"
    some = "all" if sent["looked at"] == sent["sent"] else f"{sent['looked at']} of the"
    return f"of {some} {sent['sent']} updates of one client, put together"


def _in_vain(guard: Protections) -> str:
    """Why noise does not help against a server that sees single updates."""
    if guard.shared:
        return " The share of noise in each hides little; it protects only where sums are all that is seen."
    return " The noise that it adds itself hides nothing from it." if guard.noisy else ""


def _client(guard: Protections, parts: Mapping[str, Figures]) -> Place:
    every = _part(parts, "canaries").get("every model")
    told = [_measured(every, "of the whole run, for somebody who sees the model of every round")]
    told.append(_claim(guard))
    if not guard.noisy:
        told.append(
            "A client that takes part can also rebuild what a class of data looks like that it has none of (with a "
            "GAN, from the models alone). Hiding updates from the server does not change that; noise at client level "
            "does."
        )
    return Place(who="a client that takes part", level=_level(every), told=tuple(t for t in told if t))


def _eavesdropper(guard: Protections) -> Place:
    seen = "masked or encrypted numbers" if guard.hidden else "what the server sees"
    return Place(
        who="an eavesdropper",
        level=None,
        told=(
            f"Behind TLS: who talks to the server, when, and how many bytes. Without TLS: {seen}, and every model, "
            "as a client does. It depends on how you serve.",
        ),
    )


def _holder(guard: Protections, parts: Mapping[str, Figures]) -> Place:
    final, members = _part(parts, "canaries").get("final model"), _part(parts, "membership")
    told = [_measured(final, "of the whole run, from the final model"), _claim(guard), *_member_words(members)]
    level = max(_level(final) if final else Level.LITTLE, _member_level(members))
    return Place(who="whoever holds the final model", level=level, told=tuple(t for t in told if t))


# --- sentences ----------------------------------------------------------------------------------------------


def _inversions(parts: Mapping[str, Figures]) -> Iterator[str]:
    found = parts.get("inversion", {})
    if "failed" in found:
        yield f"Rebuilding examples from an update was not tried: {found['failed'].rstrip('.')}."
    for trial in found.get("trials", ()):
        many = (
            "the example"
            if trial["size"] == 1
            else f"{trial['recovered'] * trial['size']:.0f} of {trial['size']} examples"
        )
        how = "after one step on" if trial["way"] == "one step on all" else "after local training as configured on"
        what = "an update" if trial["clients"] == 1 else f"a sum over {trial['clients']} clients' updates, each"
        figures = f"{trial['psnr']:.1f} dB, where guessing the mean gives {trial['baseline_psnr']:.1f} dB"
        if trial["recovered"] > 0:
            yield f"Rebuilt {many} from {what} {how} {trial['size']} ({figures})."
        else:
            yield f"Rebuilt nothing from {what} {how} {trial['size']} ({figures})."
    if found.get("trials"):
        yield f"Clients with more examples are harder to undo than this; the median client has {found['median']:.0f}."


def _measured(found: Figures | None, what: str) -> str:
    if found is None:
        return ""
    if found["epsilon"] is None or found["least"] is None:  # infinite
        return f"Canaries are seen as they were sent: no ε bounds what is told {what}."
    return f"Canaries measure ε ≈ {_two(found['epsilon'])} {what} (at least {_two(found['least'])}, with 95 %)."


def _two(value: float) -> str:
    """Two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _claim(guard: Protections) -> str:
    if guard.claimed is not None:
        all_of_them = guard.local or (guard.shared and guard.hidden)
        whom = "against everybody, the server included" if all_of_them else "against everybody but the server"
        per = "for each client's updates, all rounds together" if guard.local else "for each client"
        return f"Promised: ε = {guard.claimed:.3g} {per}, {whom}, as long as the run keeps to what was planned."
    if guard.refused:
        return f"Noise is added, but nothing can be promised: {guard.refused}"
    return "Nothing is promised: no noise is added."


def _member_words(found: Figures) -> Iterator[str]:
    if not found:
        return
    if "failed" in found:
        yield f"Membership was not tried: {found['failed'].rstrip('.')}."
        return
    guess = "no more than guessing" if found["advantage"] <= found["by_chance"] else "more than guessing"
    yield (
        f"Whether an example was trained on: told with an advantage of {100 * found['advantage']:.0f} points, {guess} "
        f"(which gives up to {100 * found['by_chance']:.0f} with {found['members']} examples); while 1 % of others are "
        f"accused, {100 * found['tpr']:.1f} % of the members are found."
    )


def _member_level(found: Figures) -> Level:
    if not found or "failed" in found or found["advantage"] <= found["by_chance"]:
        return Level.LITTLE
    return Level.MUCH if found["advantage"] > 0.4 or found["tpr"] > 0.1 else Level.SOME


def _level(found: Figures | None) -> Level:
    """By the lower bound, and much where nothing bounds it; something where it was not measured."""
    if found is None:
        return Level.SOME
    least = math.inf if found["least"] is None else found["least"]
    return Level.LITTLE if least < WEAK else Level.SOME if least < STRONG else Level.MUCH


def _rebuilt(parts: Mapping[str, Figures]) -> bool:
    return any(trial["recovered"] > 0 for trial in parts.get("inversion", {}).get("trials", ()))


def _part(parts: Mapping[str, Figures], name: str) -> Figures:
    return parts.get(name, {})


# --- what to switch on --------------------------------------------------------------------------------------


def advice(guard: Protections, parts: Mapping[str, Figures], *, delta: float) -> list[str]:
    """What to switch on, the most useful first.

    Args:
        guard: what is on.
        parts: what was measured.
        delta: δ of what is proposed.
    """
    found = [*_alarms(guard, parts)]
    if not guard.hidden and not guard.local:
        found.append(
            "Hide single updates from the server by secure aggregation; or, if nobody is to be trusted with anything, "
            "let clients add the noise: chain(foedus.privacy.local(clip=..., noise_multiplier=...), mean())."
            + (" The rule that you use compares single updates, which secure aggregation hides: you cannot have both."
               if guard.compares else "")
        )  # fmt: skip
    if not guard.noisy:
        found.append(_noise(guard, delta))
    if _rebuilt(parts):
        found.append(
            "Let clients train on more examples before they send (larger batches, more local steps). That makes "
            "updates harder to undo; it is no promise."
        )
    if _member_level(parts.get("membership", {})) > Level.LITTLE:
        found.append(
            "The model knows training examples by heart: fewer rounds, a smaller model, weight decay or more data "
            "help; noise at client level bounds it."
        )
    if guard.noisy and guard.claimed is not None and guard.claimed > 2 * TARGET:
        found.append(
            f"ε = {guard.claimed:.3g} promises little. More noise or fewer rounds: foedus.calibrate(8.0, {delta:g}, "
            f"rounds={guard.rounds}, cohort={guard.cohort:.0f}) says how much."
        )
    return found or ["Nothing more that this audit knows of. Audit again when data, model or rounds change."]


def _alarms(guard: Protections, parts: Mapping[str, Figures]) -> Iterator[str]:
    seen = _part(parts, "canaries")
    for name in ("every model", "final model", *(("messages",) if guard.local else ())):
        least = seen.get(name, {}).get("least")
        if guard.claimed is not None and least is not None and least > guard.claimed:
            yield (
                f"ALARM: canaries show ε of at least {least:.2g} from the {name}, and {guard.claimed:.3g} is promised. "
                "Once in 20 audits that is chance; if it happens again, the promise does not hold: please report it."
            )
            return


def _noise(guard: Protections, delta: float) -> str:
    cohort = max(guard.cohort, 1.0)
    try:
        multiplier = calibrate(TARGET, delta, rounds=max(guard.rounds, 1), cohort=cohort)
        much = f"{multiplier:.3g}"
    except FoedusError:  # dp-accounting is not installed
        much = f"foedus.calibrate({TARGET:g}, {delta:g}, rounds={guard.rounds}, cohort={cohort:.0f})"
    clip = "C" if guard.bound is None else f"{guard.bound:.3g}"
    told = f"clip={clip}, noise_multiplier={much}, cohort={cohort:.0f}"
    warning = (
        f" With {guard.cohort:.0f} clients in a round that noise is larger than what they send, and the model will "
        "learn little: more clients, fewer rounds or a larger ε are needed, and `foedus privacy` shows the choice."
        if guard.cohort < FEW else ""
    )  # fmt: skip
    chain = _shared(guard, told) if guard.hidden else f"aggregator=foedus.privacy.central({told})"
    return f"Bound what any one client can change, and drown it in noise. For ε = {TARGET:g}: {chain}.{warning}"


def _shared(guard: Protections, told: str) -> str:
    """Noise where the server sees no single update, and is not to: in shares, under masks."""
    cohort = max(guard.cohort, 1.0)
    honest = max(1, math.floor(0.5 * cohort)) if guard.honest is None else guard.honest
    shares = f"foedus.privacy.gaussian_shares({told}, honest={honest})"
    if guard.sealed:
        return (
            f"aggregator=foedus.chain({shares}, foedus.masked(foedus.Withstand(clients={cohort:.0f}), "
            f"planned={cohort:.0f})), masks in place of encryption, which takes no shares of noise; or, for much more "
            "noise, foedus.privacy.local(...) before encryption"
        )
    return f"before the masks, which stay: aggregator=foedus.chain({shares}, foedus.masked(..., planned={cohort:.0f}))"
