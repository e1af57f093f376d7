"""A real server at a real port: the same bits as a simulation, over TLS."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from foedus.errors import ConfigurationError, StorageError
from foedus.net import logs
from foedus.net.blobs import open_blobs
from foedus.net.serve import Server, blocking, serve_all
from foedus.net.served import Rounds, Served
from foedus.net.serving import Serving
from foedus.record.folder import read

from ..conformance.test_methods import population, task
from . import databases
from .test_learning import MORE, simulated
from .trainees import Trainee
from .visitors import joined


def trainee_of(name: str) -> Trainee:
    clients = population(ragged=True)
    return Trainee(task(normal=False), MORE[name](), clients.with_test(clients.train(0)), seed=2)


@contextmanager
def serving(folder: Path, trainee: Trainee, **how: Any) -> Iterator[Server]:
    """A server in a thread of its own."""
    settings = {"port": 0, "progress": False, "names": ["localhost"], "farewell": 20.0} | how.pop("settings", {})
    what = {"rounds": 3, "seed": trainee.seed, "each": Rounds(clients=4), "name": "run"} | how
    served = Served(
        task=trainee.task, algorithm=trainee.algorithm, central_test=trainee.clients.central_test, **what
    )  # fmt: skip
    with listening(Server([served], Serving(folder=folder, **settings))) as server:
        yield server


@contextmanager
def listening(server: Server) -> Iterator[Server]:
    """Until the block ends."""
    thread = threading.Thread(target=blocking, args=(server,), daemon=True)
    log = logs.to_stream()
    thread.start()
    while not server.uvicorn.started and thread.is_alive():
        threading.Event().wait(0.01)
    try:
        yield server
    finally:
        server.uvicorn.should_exit = True
        thread.join(30)
        server.close()
        logs.logger().removeHandler(log)


def where(server: Server) -> Callable[[], tuple[str, str, str]]:
    return lambda: (server._url(server.port), server.authority.pin, server.invite())


async def trained(trainee: Trainee, folder: Path, server: Server) -> list[bytes]:
    """All clients, at once; each one's final model."""
    visitors = [await joined(trainee, i, folder, where(server)) for i in range(len(trainee.clients))]
    await asyncio.gather(*(visitor.until_finished() for visitor in visitors))
    for visitor in visitors:
        await visitor.transport.close()
    return [visitor.model for visitor in visitors]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "median", "feedback"])
def test_over_http_and_tls_the_model_has_the_bits_of_the_simulation(tmp_path: Path, name: str) -> None:
    trainee = trainee_of(name)
    with serving(tmp_path / "server", trainee) as server:
        models = asyncio.run(trained(trainee, tmp_path, server))
    wanted = simulated(trainee_of(name), tmp_path / "run")
    found = read(tmp_path / "server" / "runs" / "run")
    assert found.configuration["status"] == "finished"
    assert [line["central"] for line in found.metrics] == [line["central"] for line in wanted.metrics]
    for parameter, array in wanted.parameters.items():
        np.testing.assert_array_equal(found.parameters[parameter], array)
    assert len(set(models)) == 1, "everybody has the same model"
    assert {row["client"] for row in found.costs} == {"c0", "c1", "c3", "c4"}


@pytest.mark.slow
def test_two_runs_at_once_with_their_models_on_s3(tmp_path: Path) -> None:
    """The same clients take part in both, at the same time; neither knows of the other."""
    both = {name: trainee_of(name) for name in ("adam", "feedback")}
    with databases.s3() as place:
        runs = [
            Served(
                name=name, task=each.task, algorithm=each.algorithm, central_test=each.clients.central_test, rounds=3,
                seed=each.seed, each=Rounds(clients=4),
            )
            for name, each in both.items()
        ]  # fmt: skip
        settings = Serving(folder=tmp_path / "server", port=0, progress=False, names=["localhost"], blobs=place)
        with listening(Server(runs, settings)) as server:
            asyncio.run(in_both(both, tmp_path, server))
        assert len(list(open_blobs(place).digests())) == 2, "the checkpoint of each, and nothing of the rounds before"
    assert not (tmp_path / "server" / "blobs").exists()
    for name in both:
        wanted, found = simulated(trainee_of(name), tmp_path / name), read(tmp_path / "server" / "runs" / name)
        assert found.configuration["status"] == "finished"
        for parameter, array in wanted.parameters.items():
            np.testing.assert_array_equal(found.parameters[parameter], array)


async def in_both(trainees: dict[str, Trainee], folder: Path, server: Server) -> None:
    one = next(iter(trainees.values()))
    visitors = [await joined(one, i, folder, where(server)) for i in range(len(one.clients))]
    each = [replace(visitor, run=name, trainee=own) for visitor in visitors for name, own in trainees.items()]
    await asyncio.gather(*(visitor.until_finished() for visitor in each))
    for visitor in visitors:
        await visitor.transport.close()


@pytest.mark.slow
def test_what_anybody_may_see(tmp_path: Path) -> None:
    trainee = trainee_of("adam")
    with serving(tmp_path / "server", trainee, settings={"insecure_loopback": True}) as server:
        url = f"http://localhost:{server.port}"
        assert "Write --minimum 3, or have the owners write least_others = 0" in server.told()
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "leading": True}
        assert httpx.get(f"{url}/leading").status_code == 200
        assert b"foedus_leading 1.0" in httpx.get(f"{url}/metrics").content
        assert "/v1/check-in" in httpx.get(f"{url}/openapi.json").json()["paths"]
        assert httpx.get(f"{url}/v1/runs").status_code == 401
        assert httpx.post(f"{url}/v1/check-in", content=b"x").status_code == 400
        assert httpx.post(f"{url}/v1/check-in", content=bytes(1 << 20)).status_code == 413
        assert httpx.get(f"{url}/v1/blobs/{'0' * 64}").status_code == 401


@pytest.mark.slow
def test_a_port_that_is_taken_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither a traceback nor the end of the process: a notebook goes on."""
    trainee = trainee_of("adam")
    served = Served(name="run", task=trainee.task, algorithm=trainee.algorithm, rounds=1, seed=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}: .*Perhaps another server"):
            serve_all([served], Serving(folder=tmp_path / "server", port=port))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_what_goes_wrong_once_it_listens_ends_it_in_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Server) -> str:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Server, "told", full)
    trainee = trainee_of("adam")
    served = Served(name="run", task=trainee.task, algorithm=trainee.algorithm, rounds=1, seed=2)
    with pytest.raises(StorageError, match="the disk is full"):
        serve_all([served], Serving(folder=tmp_path / "server", port=0))
    assert "Traceback" not in capfd.readouterr().err
