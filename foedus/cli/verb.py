"""What all verbs share: their kind of command, the flags that replace a field of a federation, and the loading
of a federation from ``module:object``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from foedus.errors import ConfigurationError, MissingExtra

if TYPE_CHECKING:
    from foedus.record import Record
    from foedus.sim.federation import Federation

F = TypeVar("F", bound=Callable[..., Any])
EXTRAS = {"torch": "torch", "jax": "jax", "sklearn": "data", "pandas": "data", "matplotlib": "report"}
OBJECT = "federation"  # the name looked for where none is given


@dataclass
class State:
    """What the entry point learns about a command line."""

    debug: bool = False


class Verb(click.Command):
    """A command with examples below its options, and with ``--debug``."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, callback=_debug, help="Show tracebacks.")
        )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        if self.examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"  {line}\n" for line in self.examples))


def _debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and isinstance(ctx.obj, State):
        ctx.obj.debug = True


# --- a federation, and flags over it -------------------------------------------------------------------------


def with_target(function: F) -> F:
    """The argument ``module:object``, and the flags that replace a field each."""
    for option in reversed(_FLAGS):
        function = option(function)
    return click.argument("target", metavar="MODULE:OBJECT")(function)


_FLAGS = (
    click.option("--rounds", type=click.IntRange(0), help="Rounds in all."),
    click.option("--cohort", type=click.IntRange(1), help="Clients per round, drawn uniformly."),
    click.option("--seed", type=int, help="Everything random is a function of it."),
    click.option("--every", type=click.IntRange(0), help="Evaluate after each so many rounds."),
    click.option("--folder", type=click.Path(path_type=Path), help="Run folder; resumed if it has been used."),
    click.option("--executor", help="auto, debug, processes, ...; see `foedus doctor`."),
    click.option("--device", help="E.g. cpu or cuda."),
    click.option("--start", type=click.Path(exists=True, dir_okay=False), help="First weights (safetensors)."),
    click.option("--no-resume", is_flag=True, help="A folder with a run in it is an error."),
    click.option("--no-progress", is_flag=True, help="Show nothing while running."),
)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of :func:`with_target`; None, or False, is what was not given."""

    rounds: int | None
    cohort: int | None
    seed: int | None
    every: int | None
    folder: Path | None
    executor: str | None
    device: str | None
    start: str | None
    no_resume: bool
    no_progress: bool

    def over(self, federation: Federation) -> Federation:
        """The federation with the given fields replaced."""
        from foedus.sim.executors import by_name

        given = {name: getattr(self, name) for name in ("rounds", "cohort", "seed")}
        settings = {name: getattr(self, name) for name in ("folder", "device", "start")}
        settings |= {
            "executor": None if self.executor is None else by_name(self.executor),
            "resume": False if self.no_resume else None,
            "progress": False if self.no_progress else None,
        }
        evaluation = {"every": self.every}
        return replace(
            federation,
            **_known(given),
            evaluation=replace(federation.evaluation, **_known(evaluation)),
            settings=replace(federation.settings, **_known(settings)),
        )


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# --- run folders --------------------------------------------------------------------------------------------


def recorded(paths: Sequence[Path]) -> list[Record]:
    """The runs in some folders and their sub-folders; says which it leaves out, since they have done no round.

    Raises:
        ConfigurationError: there is none.
    """
    from foedus.record.folder import CONFIGURATION, read

    found: dict[Path, Record] = {}
    for path in paths:
        inside = [path] if (path / CONFIGURATION).exists() else sorted(p.parent for p in path.rglob(CONFIGURATION))
        if not inside:
            click.echo(f"left out: {path} holds no run", err=True)
        for folder in inside:
            if (record := read(folder)).metrics:
                found[folder] = record
            else:
                click.echo(f"left out: {folder} has not done a round", err=True)
    if not found:
        told = ", ".join(str(path) for path in paths[:3])
        raise ConfigurationError(
            f"there is no run folder with a finished round in {told}; `foedus runs` lists those here"
        )
    return list(found.values())


# --- loading ------------------------------------------------------------------------------------------------


def load(target: str) -> Federation:
    """The federation that ``module:object`` or ``path/file.py:object`` names; the object is ``federation`` if it
    is left out, and may be a function without arguments that makes one.

    Raises:
        ConfigurationError: there is no such file, module or object, or it is no Federation.
    """
    from foedus.sim.federation import Federation

    if Path(target).is_dir():
        inside = sorted(str(path) for path in Path(target).glob("*.py"))
        told = f"give a file in it: {', '.join(inside[:5])}" if inside else "there is no Python file in it"
        raise ConfigurationError(f"{target} is a folder; {told}")
    place, name = place_of(target)
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    if not hasattr(module, name):
        raise ConfigurationError(f"{place} has no {name!r}{_others(module, place)}")
    found = getattr(module, name)
    if callable(found) and not isinstance(found, Federation | type):
        found = found()
    if not isinstance(found, Federation):
        raise ConfigurationError(
            f"{target} is of type {type(found).__name__}, and foedus runs a foedus.Federation. Write in {place}: "
            f"{name} = foedus.Federation(task=task, algorithm=algorithm, clients=clients, rounds=20)"
        )
    return found


def place_of(target: str) -> tuple[str, str]:
    """The module or file that is named, and the object in it.

    Example:
        >>> place_of("my_project/federation.py"), place_of("package.module:skewed")
        (('my_project/federation.py', 'federation'), ('package.module', 'skewed'))
    """
    place, _, name = target.rpartition(":") if _has_object(target) else (target, "", OBJECT)
    return place, name


def _has_object(target: str) -> bool:
    """Whether an object is named: the colon of a Windows drive does not count."""
    return ":" in target and not target.endswith(".py")


def _others(module: ModuleType, place: str) -> str:
    from foedus.sim.federation import Federation

    names = [name for name, value in vars(module).items() if isinstance(value, Federation)]
    return f"; it has: {', '.join(f'{place}:{name}' for name in names)}" if names else ", and no Federation at all"


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under its own name, with its folder on the path, so that workers can import it as well."""
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.py"))
        told = f"; there is: {', '.join(near[:5])}" if near else f" in {path.parent.resolve()}"
        raise ConfigurationError(f"there is no file {path}{told}")
    module = _imported(path.stem, path.resolve().parent, str(path))
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise ConfigurationError(
            f"{path} cannot be imported, because {path.stem!r} is the name of another module, "
            f"{module.__file__ or 'built in'}. Rename the file"
        )
    return module


def _module(name: str) -> ModuleType:
    return _imported(name, Path.cwd(), name)


def _imported(name: str, folder: Path, asked: str) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            if extra := EXTRAS.get((error.name or "").partition(".")[0]):
                raise MissingExtra(str(error.name), extra, f"The file {asked}") from error
            raise  # another module that the user's own file imports
        raise ConfigurationError(
            f"there is no module {asked!r} in {folder} or among the installed ones. "
            "Give a module:object, or a path/file.py:object"
        ) from error
