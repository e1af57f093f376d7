"""The shape of the package, held: layers, import time, public names, sizes, and the price of a variant."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foedus as fd
import foedus.data

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "foedus"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = (
    "torch",
    "jax",
    "numpy",
    "ray",
    "pandas",
    "polars",
    "sklearn",
    "matplotlib",
    "rich",
    "click",
    "pooch",
)

MIRRORS = ("lowering_", "torch_random")  # tables of rules whose signatures are those of torch's operators

Function = ast.FunctionDef | ast.AsyncFunctionDef

PUBLIC = [
    "Adversary",
    "Aggregator",
    "Algorithm",
    "Arms",
    "Clients",
    "Comparison",
    "Consult",
    "Contribution",
    "Evaluation",
    "ExampleStore",
    "Examples",
    "Federation",
    "Gate",
    "JaxModel",
    "Joining",
    "Keeping",
    "LocalCurves",
    "MLflow",
    "Measure",
    "Method",
    "Metric",
    "NumpyModel",
    "Rounds",
    "Run",
    "Serving",
    "Settings",
    "Stage",
    "Sweep",
    "Task",
    "TensorBoard",
    "Train",
    "Watch",
    "Withstand",
    "World",
    "accuracy",
    "adagrad",
    "adam",
    "afl",
    "always",
    "asynchronous",
    "attacks",
    "audit",
    "auroc",
    "available",
    "averaged_momentum",
    "buffered",
    "bulyan",
    "by_data",
    "calibrate",
    "centred_clipping",
    "chain",
    "clip",
    "collect",
    "compare",
    "data",
    "ditto",
    "dnc",
    "dp_sgd",
    "drive",
    "eden",
    "encrypted",
    "entropy",
    "error_feedback",
    "everybody",
    "executors",
    "fedavg",
    "fedbn",
    "feddyn",
    "fednova",
    "fedrep",
    "fedsgd",
    "fine_tune",
    "fltrust",
    "fsvrg",
    "geometric_median",
    "heterofl",
    "hierarchical",
    "ifca",
    "join",
    "krum",
    "lag",
    "lazy",
    "linear",
    "local_parts",
    "local_sgd",
    "local_training",
    "logistic",
    "low_rank",
    "mae",
    "masked",
    "matrices",
    "mean",
    "median",
    "mime_lite",
    "momentum",
    "multi_krum",
    "on_layers",
    "pfedme",
    "plan_compression",
    "poison",
    "poisson",
    "power_sgd",
    "privacy",
    "proximal",
    "qfedavg",
    "qsgd",
    "quantise",
    "quarantine",
    "rand_k",
    "random_mask",
    "read_run",
    "rmse",
    "rotate",
    "scaffold",
    "self_checked",
    "semi_synchronous",
    "serve",
    "sgd",
    "sign_majority",
    "silo_key",
    "simulate",
    "spaced",
    "sparse_logistic",
    "sparse_rows",
    "structured",
    "subsample",
    "sweep",
    "top_k",
    "trimmed_mean",
    "uniform",
    "yogi",
]


# --- layers and imports -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_arrow_between_layers_is_one_that_the_design_draws() -> None:
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_two_parts_import_each_other() -> None:
    """The first-level parts form no pair that imports each other (DESIGN.md section 5, last column)."""
    edges = {(part(name), part(target)) for name, target in imports() if part(name) != part(target)}
    assert [(a, b) for a, b in edges if (b, a) in edges and a < b] == []


@pytest.mark.slow
def test_importing_foedus_loads_no_framework_and_takes_under_a_fifth_of_a_second() -> None:
    script = """
        import sys, time, json
        begin = time.perf_counter()
        import foedus
        seconds = time.perf_counter() - begin
        names = dir(foedus)
        print(json.dumps([seconds, len(names), sorted(m for m in sys.modules if "." not in m)]))
    """
    runs = [json.loads(python(script)) for _ in range(5)]
    for _, names, loaded in runs:
        assert names == len(PUBLIC)
        assert not set(FRAMEWORKS) & set(loaded)
    assert min(seconds for seconds, _, _ in runs) < 0.2


@pytest.mark.slow
def test_the_core_and_the_data_layer_load_no_framework_either() -> None:
    script = """
        import sys, json, foedus as fd
        clients = fd.Clients.of({"a": ([[1.0]], [0])})
        fd.fedavg(fd.local_sgd(0.1), server=fd.adam()), fd.chain(fd.clip(1.0), fd.mean()), fd.data.dirichlet
        print(json.dumps(sorted(m for m in sys.modules if "." not in m)))
    """
    assert not set(FRAMEWORKS) - {"numpy"} & set(json.loads(python(script)))


# --- names --------------------------------------------------------------------------------------------------


def test_the_public_names_are_these() -> None:
    assert fd.__all__ == sorted(PUBLIC) == dir(fd)


@pytest.mark.parametrize("module", [fd, foedus.data], ids=["foedus", "foedus.data"])
def test_type_checkers_see_the_names_that_are_there(module: Any) -> None:
    """The imports under TYPE_CHECKING and the table of homes say the same, both in order."""
    tree = ast.parse(Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        (alias,) = node.names
        assert alias.asname == alias.name, "re-exports are written 'import name as name'"
        seen[alias.name] = node.module
    homes = {n: h if h.startswith("foedus") else f"foedus.data.{h}" for n, h in module._HOMES.items()}
    modules = {n: h.rpartition(".")[0] for n, h in getattr(module, "_MODULES", {}).items()}
    assert seen == homes | modules
    assert list(module._HOMES) == sorted(module._HOMES)


@pytest.mark.parametrize("module", [fd, foedus.data], ids=["foedus", "foedus.data"])
def test_every_name_can_be_had_and_others_cannot(module: Any) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fedmagic'"):
        module.fedmagic  # noqa: B018


def test_names_say_what_a_thing_is() -> None:
    empty = ("Manager", "Handler", "Helper", "Util", "Base")
    classes = [node.name for _, node in nodes(ast.ClassDef)]
    assert [name for name in classes if any(word in name for word in empty)] == []
    assert [p for p in SOURCES if any(word.lower() in p.stem for word in empty)] == []


# --- sizes --------------------------------------------------------------------------------------------------


def test_no_function_is_longer_than_80_lines() -> None:
    long = {f"{path}: {f.name}": length for path, f in functions() if (length := lines(f)) > 80}
    assert long == {}


def test_no_function_takes_more_than_8_arguments() -> None:
    many = {
        f"{path}: {f.name}": count
        for path, f in functions()
        if (count := len(arguments(f))) > 8 and not path.name.startswith(MIRRORS)
    }
    assert many == {}


@pytest.mark.parametrize("module", [fd, foedus.data], ids=["foedus", "foedus.data"])
def test_public_names_take_at_most_3_positional_arguments(module: Any) -> None:
    """The rest are named at the call, so that calls read and signatures may grow."""
    many = {}
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or value is fd.Task:  # other classes are made by functions of theirs
            parameters = inspect.signature(value).parameters.values()
            positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            many |= {name: positional} if len(positional) > 3 else {}
    assert many == {}


def test_most_functions_are_short() -> None:
    sizes = sorted(lines(f) for _, f in functions())
    assert sizes[len(sizes) // 2] <= 11


def test_nothing_is_inherited_through_more_than_two_classes() -> None:
    """Beside protocols, which have no behaviour to inherit, and the tree of exceptions."""
    bases = {
        node.name: [ast.unparse(b).split("[")[0].split(".")[-1] for b in node.bases]
        for path, node in nodes(ast.ClassDef)
        if path.name != "errors.py" and not any("Protocol" in ast.unparse(b) for b in node.bases)
    }

    def depth(name: str) -> int:
        return 1 + max((depth(b) for b in bases[name] if b in bases), default=0)

    assert {name: depth(name) for name in bases if depth(name) > 2} == {}


def test_public_functions_say_what_they_do() -> None:
    silent = [
        f"{path}: {function.name}"
        for path, function in functions(module_level=True)
        if not (function.name.startswith("_") or path.name.startswith(MIRRORS) or ast.get_docstring(function))
        and "overload" not in [ast.unparse(d) for d in function.decorator_list]
    ]
    assert silent == []


def test_every_module_says_what_it_is_for() -> None:
    assert [str(p) for p in SOURCES if not ast.get_docstring(parsed(p))] == []


# --- the price of a variant (DESIGN.md section 2) -----------------------------------------------------------


def test_fedadam_costs_one_line_at_the_call_site() -> None:
    plain = fd.fedavg(fd.local_sgd(lr=0.1))
    adaptive = fd.fedavg(fd.local_sgd(lr=0.1), server=fd.adam(lr=0.01))
    assert adaptive.client == plain.client
    assert adaptive.server.label == "adam(lr=0.01, beta1=0.9, beta2=0.99, tau=0.001)"


def test_fedprox_costs_at_most_5_lines() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(fd.proximal)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    assert lines(function) <= 5


@pytest.mark.parametrize("method", [fd.scaffold, fd.feddyn])
def test_scaffold_and_feddyn_cost_at_most_40_lines_each(method: Any) -> None:
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    assert isinstance(function, ast.FunctionDef)
    docstring = function.body[0]
    source = inspect.getsource(method).splitlines()
    code = source[: docstring.lineno - 1] + source[docstring.end_lineno :]
    assert len([line for line in code if line.strip()]) <= 40


def trimmed_mean(share: float) -> fd.Aggregator:
    """Without each entry's largest and smallest values (Yin et al. 2018): an aggregator of one's own."""

    def merge(a: Any, b: Any) -> Any:
        values = np.concatenate([np.atleast_2d(m["values"]) for m in (a, b)])
        return {"values": np.sort(values + 0.0, axis=0)}  # −0 and 0 sort alike, but are not the same bits

    def decode(state: Any, message: Any, context: Any) -> Any:
        values = np.atleast_2d(message["values"])
        cut = int(share * len(values))
        return values[cut : len(values) - cut].mean(axis=0), state

    return fd.Aggregator(
        init=lambda layout: {},
        encode=lambda update, context: {"values": update.vector},
        merge=merge,
        decode=decode,
        additive=False,
        label=f"trimmed_mean({share})",
    )


def test_an_aggregator_costs_at_most_25_lines() -> None:
    assert len(inspect.getsource(trimmed_mean).splitlines()) <= 25


@pytest.mark.slow
def test_an_aggregator_of_ones_own_runs_and_survives_a_poisoner(tmp_path: Path) -> None:
    from foedus.core.linear import logistic

    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4))
    y = (x @ np.array([1.0, -1.0, 2.0, 0.5]) > 0).astype(int)
    shares = {i: (x[i::8], y[i::8]) for i in range(7)} | {7: (1000 * x[7::8], 1 - y[7::8])}
    clients = fd.Clients.of(shares, central_test=(x, y))
    found = {}
    for aggregator in (fd.mean(), trimmed_mean(0.2)):
        settings = fd.Settings(folder=tmp_path / aggregator.label, progress=False, executor=fd.executors.debug())
        algorithm = fd.fedavg(fd.local_sgd(lr=0.1), aggregator=aggregator)
        task = fd.Task(logistic(4, 2), metrics=[fd.accuracy])
        found[aggregator.label] = fd.simulate(task, algorithm, clients, rounds=15, settings=settings).final["accuracy"]
    assert found["mean()"] < 0.6
    assert found["trimmed_mean(0.2)"] > 0.95


# --- reading the sources ------------------------------------------------------------------------------------


def python(script: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    return done.stdout


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def nodes(kind: Any) -> Iterator[tuple[Path, Any]]:
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, kind):
                yield path.relative_to(ROOT), node


def functions(*, module_level: bool = False) -> Iterator[tuple[Path, Function]]:
    if not module_level:
        yield from nodes(Function)
        return
    for path in SOURCES:
        for node in parsed(path).body:
            if isinstance(node, Function):
                yield path.relative_to(ROOT), node


def lines(function: Function) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    text = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (len(text.splitlines()) if text else 0)


def arguments(function: Function) -> list[str]:
    a = function.args
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]


def imports() -> Iterator[tuple[str, str]]:
    """(module, what it imports) for the package's own modules, imports inside functions included."""
    for path in SOURCES:
        name = ".".join(("foedus", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if name == "foedus":
            continue  # the table of public names
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foedus."):
                yield name, node.module or ""


def part(module: str) -> str:
    return module.split(".")[1]
