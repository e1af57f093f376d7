"""The running system: server, client agent, transports, stores. Async; owns clocks, sockets and disks.

All of it needs the extra ``net``. That is looked up here, once and without loading any of it, so that whoever has the
base only is told what to install, and not that some module of somebody else is not there.
"""

from importlib.util import find_spec

from foedus.errors import MissingExtra

NEEDED = {  # what is imported: what is installed
    "alembic": "alembic",
    "cryptography": "cryptography",
    "fsspec": "fsspec",
    "httptools": "httptools",
    "httpx": "httpx",
    "jwt": "pyjwt",
    "msgpack": "msgpack",
    "prometheus_client": "prometheus-client",
    "psutil": "psutil",
    "socketio": "python-socketio",
    "sqlalchemy": "sqlalchemy",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "websockets": "websockets",
}


def _look() -> None:
    """Refuse to be imported where something is missing."""
    for module, package in NEEDED.items():
        if find_spec(module) is None:
            raise MissingExtra(package, "net", "Working between machines")


_look()
