"""The documentation is whole: every public name, command, option, error and parameter is in it, and no link is dead."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import foedus
import foedus.data
from foedus import errors
from foedus.cli import foedus as command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
BLOCK = re.compile(r"^::: ([\w.]+)\n((?:    .*\n?)*)", re.MULTILINE)
MEMBERS = re.compile(r"members:\s*((?:\[[^\]]*\])|(?:\n\s+- \w+)+)")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def documented() -> set[str]:
    """Full names of everything that the reference pages show."""
    found: set[str] = set()
    for page in REFERENCE.glob("*.md"):
        for place, options in BLOCK.findall(page.read_text("utf-8")):
            members = MEMBERS.search(options)
            found |= {f"{place}.{name}" for name in re.findall(r"\w+", members[1])} if members else {place}
    return found


def resolve(name: str):
    """The value of a full name, and whether it is a module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        place, _, last = name.rpartition(".")
        return getattr(importlib.import_module(place), last)


def public() -> list[str]:
    values = [f"{foedus._HOMES[name]}.{name}" for name in foedus._HOMES]
    return values + [f"foedus.data.{home}.{name}" for name, home in foedus.data._HOMES.items()]


@pytest.mark.parametrize("name", public())
def test_every_public_name_is_in_the_reference(name):
    assert name in documented()


def test_what_the_reference_shows_exists():
    for name in documented():
        resolve(name)


def test_every_function_of_the_executors_is_in_the_reference():
    shown = {name.rpartition(".")[2] for name in documented() if name.startswith("foedus.sim.executors.")}
    assert shown >= set(importlib.import_module("foedus.sim.executors").BY_NAME)


# --- docstrings ---------------------------------------------------------------------------------------------

ARGUMENTS = re.compile(r"^Args:\n((?:    .*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w+(?:, \w+)*):", re.MULTILINE)


def callables() -> list[str]:
    return [name for name in sorted(documented()) if callable(resolve(name)) and not inspect.ismodule(resolve(name))]


@pytest.mark.parametrize("name", callables())
def test_docstrings_speak_of_parameters_that_exist(name):
    value = resolve(name)
    told = ARGUMENTS.search(inspect.cleandoc(value.__doc__ or "") + "\n")
    named = {n for entry in ENTRY.findall(told[1]) for n in entry.split(", ")} if told else set()
    assert named <= set(inspect.signature(value).parameters) if named else True


@pytest.mark.parametrize("name", public())
def test_every_public_name_has_a_docstring_of_its_own(name):
    value = resolve(name)
    own = value.__doc__ if not isinstance(value, tuple) else type(value).__doc__
    assert own
    assert not own.startswith(f"{name.rpartition('.')[2]}(")  # what dataclass and NamedTuple write by themselves


@pytest.mark.parametrize("name", [name for name in public() if not isinstance(resolve(name), foedus.Metric)])
def test_every_public_name_has_an_example(name):
    """tests/test_doctests.py runs them."""
    assert ">>> " in resolve(name).__doc__


# --- errors -------------------------------------------------------------------------------------------------


def kinds() -> list[type[errors.FoedusError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_tree_and_on_the_page(kind):
    assert issubclass(kind, errors.FoedusError)
    assert kind.__doc__
    assert re.search(rf"\b{kind.__name__}\b", errors.__doc__)
    assert "foedus.errors" in documented()  # the page shows the module, and with it every class in it


# --- the command line ---------------------------------------------------------------------------------------

COMMANDS = REFERENCE / "cli.md"


def section(command: str) -> str:
    """The part of the page that is about a command."""
    found = re.search(rf"^## foedus {command}\n(.*?)(?=^## |\Z)", COMMANDS.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert found, f"{COMMANDS.name} has no section '## foedus {command}'"
    return found[1]


def options(command: click.Command) -> set[str]:
    """Of a command, or of all commands of a group."""
    if isinstance(command, click.Group):
        return {name for each in command.commands.values() for name in options(each)}
    return {name for p in command.params if isinstance(p, click.Option) for name in p.opts if name.startswith("--")}


@pytest.mark.parametrize("name", sorted(command_line.commands))
def test_every_option_of_a_command_is_on_its_page_and_no_other(name):
    real, text = options(command_line.commands[name]), section(name)
    assert {option for option in real if f"`{option}" not in text} == set()
    assert set(re.findall(r"`(--[\w-]+)", text)) - real == set()


def test_no_command_is_told_of_that_is_not_there():
    told = set(re.findall(r"^## foedus (\w+)$", COMMANDS.read_text("utf-8"), re.MULTILINE))
    assert told == set(command_line.commands)


@pytest.mark.parametrize("words", [[], *([name] for name in sorted(command_line.commands))], ids=" ".join)
def test_every_command_explains_itself(words):
    told = CliRunner().invoke(command_line, [*words, "--help"])
    assert told.exit_code == 0
    assert "Usage: " in told.output


SHELL = re.compile(r"^```(?:sh)?\n(.*?)^```", re.DOTALL | re.MULTILINE)


def typed() -> list[str]:
    """Every foedus command line in a shell block of the documentation, each once."""
    lines = [
        line.split("  #")[0].strip()
        for page in [ROOT / "README.md", *DOCS.rglob("*.md")]
        for block in SHELL.findall(page.read_text("utf-8"))
        for line in block.split("\n")
    ]
    real = [line for line in lines if line.startswith("foedus ") and not re.search(r"[A-Z]{3,}|   ", line)]
    return sorted(set(real))


@pytest.mark.parametrize("line", typed())
def test_command_lines_in_the_documentation_can_be_parsed(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, name, *words = line.split()
    command = command_line.commands[name]
    words = [word for word in words if word != "--start"]
    command.make_context(name, words)  # raises click.UsageError for an option or value that does not exist


# --- links --------------------------------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_there(page):
    targets = [link for link in LINK.findall(page.read_text("utf-8")) if "://" not in link]
    assert [link for link in targets if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation():
    told = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert {page for page in pages if page not in told} == set()


def test_pictures_of_the_readme_are_small():
    pictures = list((DOCS / "pictures").iterdir())
    assert pictures
    assert [p.name for p in pictures if p.stat().st_size > 150_000] == []


@pytest.mark.slow  # builds all pages
def test_the_pages_build_without_a_warning_and_fetch_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    tags = r'script|img|iframe|link rel="(?:stylesheet|icon|preconnect)"'
    fetched = re.compile(rf"""<(?:{tags})[^>]*(?:src|href)="https?:""")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    assert [page.name for page in pages if fetched.search(page.read_text("utf-8"))] == []
