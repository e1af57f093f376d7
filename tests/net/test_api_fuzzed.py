"""The HTTP API against schemathesis: requests made from its own description, right and wrong ones.

Whatever comes, there is no answer of 500, and every answer is one that the description names. Bodies that are messages
are packed as the protocol has it; others go as they are.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from foedus.net.api import MEDIA, PATHS
from foedus.net.identity.callers import OPERATE, TRAIN, Caller
from foedus.net.openapi import document
from foedus.protocol.messages import KINDS

from .test_safety import Open, opened

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import status_code_conformance

_NAMES = {PATHS[kind]: name for name, kind in KINDS.items() if kind in PATHS}
SCHEMA = schemathesis.openapi.from_dict(document())


@schemathesis.serializer(MEDIA)
def packed(context: Any, value: Any) -> bytes:
    """A body as a message of the request's kind; what cannot be one goes as it is."""
    if isinstance(value, bytes):
        return value
    fields = {k: _bytes(v) for k, v in value.items()} if isinstance(value, dict) else value
    try:
        return msgpack.packb([1, 0, _NAMES.get(context.case.operation.path, "check-in"), fields])
    except (TypeError, ValueError, OverflowError):
        return repr(value).encode()


def _bytes(value: Any) -> Any:
    """Texts of 16 and 32 characters stand for bytes."""
    if isinstance(value, str) and len(value) in (16, 32):
        return value.encode("latin-1", "replace")
    return [_bytes(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with opened(tmp_path_factory.mktemp("fuzzed"), insecure_loopback=True) as found:
        found.server.access._rate = type(found.server.access._rate)(per_s=1e6, burst=10**6)
        yield found


OPERATIONS = {f"{o.method.upper()} {o.path}": o for o in (r.ok() for r in SCHEMA.get_all_operations())}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_whatever_is_asked_is_answered_as_described(served: Open, name: str) -> None:
    operation = OPERATIONS[name]
    ticket = served.server.access.mint(Caller(0, "absent-0", TRAIN | OPERATE), now=time.time(), lifetime_s=3600)
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ]

    @settings(max_examples=25, deadline=None, suppress_health_check=quiet, phases=[Phase.generate], database=None)
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        response = case.call(base_url=f"http://localhost:{served.server.port}", headers=_ticket(ticket))
        case.validate_response(response, checks=[not_a_server_error, status_code_conformance])
        assert b"Traceback" not in response.content

    ask()


def _ticket(ticket: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {ticket}"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_server_is_well_afterwards(served: Open) -> None:
    """In its own words: it leads, nothing failed, and a client is still let in."""
    import httpx

    from foedus.protocol import wire
    from foedus.protocol.messages import CheckIn

    url = f"http://localhost:{served.server.port}"
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    ticket = served.server.access.mint(Caller(1, "absent-1", TRAIN), now=time.time(), lifetime_s=60)
    response = httpx.post(f"{url}/v1/check-in", content=wire.encode(CheckIn(examples=10)), headers=_ticket(ticket))
    assert response.status_code == 200
    assert re.search(r'foedus_problems_total\{code="other"\}', httpx.get(f"{url}/metrics").text) is None
