"""The door over HTTP: five small JSON requests, to be mounted beside a server's other routes.

| request | asks | answers |
|---|---|---|
| ``GET /v1/authority`` | | the authority's and the signing key's certificate (PEM) |
| ``POST /v1/challenge`` | | ``challenge`` |
| ``POST /v1/enrol`` | ``token, name, key, signature`` | ``name, position, certificate`` |
| ``POST /v1/session`` | ``name, challenge, channel, signature`` | ``ticket, seconds`` |
| ``POST /v1/certificate`` | the same | ``certificate`` (PEM) |

Bytes are base64url without padding. What is refused is answered ``{"code", "told"}`` with the status of its code
(``net/api.py``; 429 with ``Retry-After``). Every request counts against the limit of its address.

Not here: what is decided (``access.py``); the client's side (``visits.py``).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from foedus.errors import (
    Code,
    FoedusError,
    MalformedMessage,
    NotTrusted,
    ProtocolError,
    StorageError,
    TooFast,
    TooLarge,
)
from foedus.net.api import status_of
from foedus.net.identity.access import Access
from foedus.net.identity.limits import Rate
from foedus.net.identity.sessions import Proof

__all__ = ["peer_of", "refusal", "routes"]

LARGEST = 8192  # bytes of a request to the door
Clock = Callable[[], float]
Aside = Callable[[Callable[[], Any]], Awaitable[Any]]
Answer = Callable[[Request], Awaitable[Response]]

_CODES: dict[type[FoedusError], Code] = {NotTrusted: Code.MALFORMED, StorageError: Code.STORAGE}


def routes(access: Access, *, clock: Clock, rate: Rate, aside: Aside) -> list[Route]:
    """The door's routes.

    Args:
        access: who is let in.
        clock: seconds since 1970.
        rate: how often one address may ask.
        aside: how what touches the database is run, so that the event loop does not wait.
    """

    async def authority(request: Request) -> Response:
        return PlainTextResponse(access.document(now=clock()), media_type="application/x-pem-file")

    async def challenge(request: Request) -> Response:
        return _told({"challenge": _text(access.challenge(now=clock()))})

    async def enrol(request: Request) -> Response:
        asked = await _asked(request, "token", "name", "key", "signature")
        key, signature = _bytes(asked["key"]), _bytes(asked["signature"])
        member, certificate = await aside(
            lambda: access.enrol(asked["token"], asked["name"], key, signature=signature, now=clock())
        )
        return _told({"name": member.name, "position": member.position, "certificate": certificate.decode()})

    async def session(request: Request) -> Response:
        proof = await _proof(request)
        ticket, seconds = await aside(lambda: access.session(proof, peer=peer_of(request.scope), now=clock()))
        return _told({"ticket": ticket, "seconds": seconds})

    async def certificate(request: Request) -> Response:
        proof = await _proof(request)
        made = await aside(lambda: access.certificate(proof, now=clock()))
        return _told({"certificate": made.decode()})

    def guarded(answer: Answer) -> Answer:
        async def answered(request: Request) -> Response:
            try:
                rate.take(request.client.host if request.client else "", now=clock())
                return await answer(request)
            except FoedusError as error:
                return refusal(error)
            except ClientDisconnect:  # nobody is there to be answered
                return Response(status_code=400)

        return answered

    return [
        Route("/v1/authority", guarded(authority), methods=["GET"]),
        Route("/v1/challenge", guarded(challenge), methods=["POST"]),
        Route("/v1/enrol", guarded(enrol), methods=["POST"]),
        Route("/v1/session", guarded(session), methods=["POST"]),
        Route("/v1/certificate", guarded(certificate), methods=["POST"]),
    ]


def refusal(error: FoedusError) -> Response:
    """How a request that is not let in is answered."""
    code = error.code if isinstance(error, ProtocolError) else _CODES.get(type(error), Code.OTHER)
    headers = {"WWW-Authenticate": "Bearer"} if code is Code.UNAUTHENTICATED else {}
    if isinstance(error, TooFast):
        headers["Retry-After"] = str(max(1, round(error.after_s)))
    return JSONResponse({"code": code, "told": str(error)}, status_code=status_of(code), headers=headers)


def peer_of(scope: Mapping[str, Any]) -> bytes | None:
    """The client certificate that a request's connection has proven, as ``connections.py`` notes it; DER form."""
    peer = scope.get("extensions", {}).get("tls", {}).get("client_der")
    return peer if isinstance(peer, bytes) else None


async def _asked(request: Request, *wanted: str) -> dict[str, str]:
    """The texts of a small JSON object; raises for anything else."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            raise TooLarge(f"a request to the door has at most {LARGEST} bytes")
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("the request is not JSON") from error
    if not isinstance(told, dict) or not all(isinstance(told.get(name), str) for name in wanted):
        raise MalformedMessage(f"the request must be a JSON object with the texts {', '.join(wanted)}")
    return {name: told[name] for name in wanted}


async def _proof(request: Request) -> Proof:
    asked = await _asked(request, "name", "challenge", "channel", "signature")
    return Proof(asked["name"], _bytes(asked["challenge"]), asked["channel"], _bytes(asked["signature"]))


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedMessage("bytes are written in base64url") from error


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _told(answer: dict[str, object]) -> Response:
    return JSONResponse(answer, headers={"Cache-Control": "no-store"})
