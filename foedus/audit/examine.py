"""``foedus.audit``: attack a federation of one's own, and say in plain words what could be learnt from it.

Four parts, each kept when it is done, so that an audit that was interrupted goes on: the run itself (made if it is not
there), membership inference on the final model, canaries (the run once more, with clients that are known directions,
unless they entered beforehand), and gradient inversion on a few examples.

Not here: the parts (``parts.py``), the sentences (``words.py``), how they are set (``foedus.report.pages``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.audit import parts as attacks
from foedus.audit.parts import Effort, Figures, Ground
from foedus.audit.protections import Protections, protections
from foedus.audit.words import Place, advice, places
from foedus.backends import open_trainer
from foedus.errors import CheckpointError, ConfigurationError, FoedusError, MissingExtra
from foedus.record import files
from foedus.record.folder import new_folder
from foedus.report.pages import Block, Heading, Picture, Rows, Text, as_html, as_markdown
from foedus.rounds import start
from foedus.sim.federation import Federation, run_federation
from foedus.sim.progress import steps
from foedus.sim.run import Run, read_run

FINDINGS = "audit.json"


class Part(NamedTuple):
    """One part of an audit.

    * ``attack(ground) -> figures``
    * ``asked``: the fields of the effort that it depends on; where one is another, it is done again.
    * ``wanted(effort)``: whether it is to be done at all.
    """

    attack: Callable[[Ground], Figures]
    asked: tuple[str, ...]
    wanted: Callable[[Effort], bool] = lambda effort: True


PARTS: Mapping[str, Part] = {
    "membership": Part(attacks.membership, ("examples",)),
    "inversion": Part(attacks.inversion, ("sizes", "steps"), lambda effort: bool(effort.sizes)),
    "canaries": Part(attacks.canaries, ("canaries", "delta"), lambda effort: bool(effort.canaries)),
}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found.

    Attributes:
        protections: what is switched on.
        findings: figures by part; a part that could not be carried out has the reason under ``failed``.
        places: what an adversary at each place could learn.
        advice: what to switch on.
        folder: with ``report.md``, ``report.html``, ``audit.json`` and figures.
        figures: their paths within the folder.

    Example:
        >>> found.places[0].who, found.places[0].verdict  # doctest: +SKIP
        ('a curious server', 'much can be learnt')
    """

    protections: Protections
    findings: Mapping[str, Figures]
    places: tuple[Place, ...]
    advice: tuple[str, ...]
    folder: Path
    figures: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The report, as Markdown."""
        return as_markdown(page(self))

    def __repr__(self) -> str:
        told = ", ".join(f"{place.who}: {place.verdict}" for place in self.places)
        return f"Audit({told}; in {self.folder})"


def audit(federation: Federation, *, run: str | Path | None = None, effort: Effort | None = None) -> Audit:
    """Attack a federation, and report what an adversary at each place could learn.

    Without ``run`` the federation is run first (or read, if its folder holds it). Clients that are canaries measure
    what the run gives away about any one client: if they did not enter beforehand (``foedus.audit.with_canaries``),
    the run is made once more with them, which the report says.

    Args:
        federation: what is audited.
        run: the folder of its finished run.
        effort: how hard to try, and where to keep what is found.

    Returns:
        Figures, sentences and a report; ``report.md`` and ``report.html`` are in its folder.

    Raises:
        ConfigurationError: it is no federation, or the run is of another one.
        CheckpointError: the folder holds the audit of another run.

    Example:
        >>> found = audit(federation, effort=Effort(canaries=64))  # doctest: +SKIP
        >>> print(found.text)  # doctest: +SKIP
    """
    if not isinstance(federation, Federation):
        raise ConfigurationError(
            f"audit() takes a foedus.Federation(task=..., algorithm=..., clients=..., rounds=...), not "
            f"{type(federation).__name__}"
        )
    effort = Effort() if effort is None else effort
    federation = replace(federation, clients=federation.population())  # made once
    folder = _folder(federation, run, effort)
    files.private_folder(folder)  # it will hold examples of a client
    with steps(effort.progress, 1 + len(_parts(effort)), "audit") as tell:
        ground = _ground(federation, run, effort, folder)
        tell("the run is there")
        kept = _Kept(folder, _identity(ground))
        for name, part in _parts(effort):
            tell(f"{name}: {_carried_out(name, part, ground, kept)}")
    return _reported(ground, kept)


# --- where things are ---------------------------------------------------------------------------------------


def _folder(federation: Federation, run: str | Path | None, effort: Effort) -> Path:
    if effort.folder is not None:
        return Path(effort.folder)
    place = run or federation.settings.folder
    if place is not None:
        return Path(place) / "audit"
    folder = new_folder("audit-")
    folder.chmod(0o700)
    return folder


def _ground(federation: Federation, run: str | Path | None, effort: Effort, folder: Path) -> Ground:
    trainer = open_trainer(federation.task, seed=federation.seed, device=federation.settings.device)
    done = _run(federation, folder) if run is None else read_run(run, federation.task)
    rounds = len(done.metrics)
    if run is not None and done.configuration["algorithm"] != federation.algorithm.label:
        raise ConfigurationError(
            f"{run} is a run of {done.configuration['algorithm']}, and this federation's algorithm is "
            f"{federation.algorithm.label}. Give the federation that was run, or leave out the run"
        )
    return Ground(
        federation=replace(federation, rounds=rounds), run=done, trainer=trainer,
        first=start.weights(federation.settings.start, trainer), effort=effort, folder=folder,
    )  # fmt: skip


def _run(federation: Federation, folder: Path) -> Run:
    settings = replace(federation.settings, folder=federation.settings.folder or folder / "run", progress=False)
    return run_federation(replace(federation, settings=settings))


def _identity(ground: Ground) -> str:
    """What an audit that goes on must share with the one before: the run."""
    federation = ground.federation
    told = (
        federation.algorithm.label, federation.population().fingerprint(), federation.seed, federation.rounds,
        ground.trainer.layout.digest(), hashlib.sha256(ground.run.weights.vector.tobytes()).hexdigest(),
    )  # fmt: skip
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _parts(effort: Effort) -> list[tuple[str, Part]]:
    """Those that are to be done."""
    return [(name, part) for name, part in PARTS.items() if part.wanted(effort)]


class _Kept:
    """What is finished, in the audit's folder: figures as JSON, and arrays for drawing, a file for each part."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.findings: dict[str, Figures] = {}
        self.asked: dict[str, Any] = {}
        if (folder / FINDINGS).exists():
            self._read()

    def _read(self) -> None:
        place = self.folder / FINDINGS
        try:
            found = json.loads(place.read_text("utf-8"))
            identity, parts, asked = found["identity"], dict(found["findings"]), dict(found["asked"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{place} is damaged: {error}. Delete it, or audit elsewhere") from error
        if identity != self.identity:
            raise CheckpointError(
                f"{self.folder} holds the audit of another run. Choose another folder, Effort(folder=...), or delete "
                "this one"
            )
        self.findings, self.asked = parts, asked

    def has(self, name: str, asked: Any) -> bool:
        """Whether a part is done, as it is asked for."""
        return name in self.findings and self.asked.get(name) == asked

    def add(self, name: str, figures: Figures, asked: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
        """One part is done."""
        self.findings[name], self.asked[name] = figures, asked
        with files.storage(self.folder / f"{name}.npz"):
            np.savez_compressed(self.folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        told = {"identity": self.identity, "findings": self.findings, "asked": self.asked}
        files.replace(self.folder / FINDINGS, json.dumps(told, indent=1, ensure_ascii=False).encode() + b"\n")

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """A part's arrays."""
        place = self.folder / f"{name}.npz"
        if not place.exists():
            return {}
        with np.load(place, allow_pickle=False) as stored:
            return {each: stored[each] for each in stored.files}


def _carried_out(name: str, part: Part, ground: Ground, kept: _Kept) -> str:
    asked = _plain({field: getattr(ground.effort, field) for field in part.asked})
    if kept.has(name, asked):
        return "done before"
    ground.arrays = {}
    try:
        found = part.attack(ground)
    except FoedusError as error:
        found = {"failed": str(error)}
    kept.add(name, _plain(found), asked, ground.arrays)
    return "not possible" if "failed" in found else "done"


def _plain(value: Any) -> Any:
    """As JSON has it: no infinities."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --- the report ---------------------------------------------------------------------------------------------


def _reported(ground: Ground, kept: _Kept) -> Audit:
    delta, names = ground.effort.delta, [name for name, _ in _parts(ground.effort)]
    guard = protections(ground.federation, ground.layout, delta=delta)
    findings = {name: kept.findings[name] for name in names}
    found = Audit(
        protections=guard, findings=findings, places=tuple(places(guard, findings)),
        advice=tuple(advice(guard, findings, delta=delta)), folder=kept.folder, figures=_drawn(kept, names),
    )  # fmt: skip
    files.replace(kept.folder / "report.md", as_markdown(page(found)).encode())
    files.replace(kept.folder / "report.html", as_html(page(found), "Privacy audit", kept.folder).encode())
    return found


def _drawn(kept: _Kept, names: Sequence[str]) -> tuple[str, ...]:
    """The figures' paths; none without matplotlib."""
    try:
        from foedus.report.attacks import plot_audit

        arrays = {name: array for part in names for name, array in kept.arrays(part).items()}
        drawn = plot_audit(arrays, kept.folder / "figures")
    except MissingExtra:
        return ()
    return tuple(path.relative_to(kept.folder).as_posix() for path in drawn)


def page(found: Audit) -> list[Block]:
    """The report as blocks, to be set as Markdown or HTML."""
    guard, blocks = found.protections, list[Block]()
    blocks += [Heading(1, "Privacy audit"), Text(f"`{guard.algorithm}`"), Text(_setting(found))]
    blocks.append(Rows([{"who": p.who, "": p.verdict} for p in found.places]))
    for place in found.places:
        blocks.append(Heading(2, f"What {place.who} could learn"))
        blocks += [Text(sentence) for sentence in place.told]
    blocks.append(Heading(2, "What to switch on"))
    blocks += [Text(f"{number}. {text}") for number, text in enumerate(found.advice, 1)]
    blocks.append(Heading(2, "How this was found"))
    blocks += [Text(sentence) for sentence in _method(found)]
    return blocks + [Picture(path, Path(path).stem) for path in found.figures]


def _setting(found: Audit) -> str:
    guard = found.protections
    on = [
        *(["encrypted updates"] if guard.sealed else ["sums only for the server"] if guard.hidden else []),
        *([f"updates clipped to about {guard.bound:.3g}"] if guard.bound is not None else []),
        *(["noise by the clients"] if guard.local or guard.shared else ["noise by the server"] if guard.noisy else []),
    ]
    return (
        f"{guard.clients} clients, {guard.cohort:.0f} in a round, {guard.rounds} rounds. Switched on: "
        f"{', '.join(on) or 'nothing'}."
    )


def _method(found: Audit) -> list[str]:
    seen, told = found.findings.get("canaries", {}), list[str]()
    if "failed" in seen:
        told.append(f"ε was not measured: {seen['failed'].rstrip('.')}.")
    elif seen:
        count = seen["final model"]["canaries"]
        how = (
            f"They were not there when your run was made, so it was made once more with {count} of them; ε is of that "
            "run."
            if seen["rerun"] else f"The {count} of them had entered before your run, which was not repeated."
        )  # fmt: skip
        told.append(f"ε was measured with canaries, clients that send known random directions. {how}")
    told.append(
        "Membership is told by the loss on single examples. Examples are rebuilt from the update of the first "
        "round, in which the model tells most, by the angle of gradients. Attacks that find "
        "nothing prove nothing; ε promises."
    )
    if any(trial["recovered"] for trial in found.findings.get("inversion", {}).get("trials", ())):
        told.append("Mind that the pictures below, and this folder, hold examples of a client: do not pass them on.")
    return told
