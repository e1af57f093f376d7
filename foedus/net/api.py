"""The HTTP API's addresses, as server and clients write them; ``GET /openapi.json`` describes the rest.

| request | body | answer |
|---|---|---|
| ``POST /v1/check-in``, ``decline``, ``start-upload``, ``submit``, ``confer``, ``ask`` | a message | a message |
| ``GET /v1/blobs/{digest}`` | | the bytes; ``ETag``, ``Range`` |
| ``PUT /v1/uploads/{upload}?offset=N`` | bytes from N on | 200 and ``Upload-Offset``; or a Problem |
| ``HEAD /v1/uploads/{upload}`` | | ``Upload-Offset`` |
| ``GET /v1/runs``, ``/v1/runs/{run}`` | | JSON |
| ``/socket.io`` | | the doorbell |

A Problem comes with the status that HTTP has for it, so that proxies and people understand it; clients go by its code.
Digests and uploads are written in hexadecimal digits.

Not here: what is said (``protocol/messages.py``), the door where clients join (``identity/routes.py``).
"""

from __future__ import annotations

from foedus.errors import Code
from foedus.protocol.messages import KINDS, Ask, CheckIn, Confer, Decline, Message, StartUpload, Submit

MEDIA = "application/vnd.foedus.message+msgpack"
BYTES = "application/octet-stream"
OFFSET = "Upload-Offset"
AT_ONCE = "Foedus-At-Once"  # a gateway says so, which serves others meanwhile: answer, and let nobody wait in line
LEADER = "Foedus-Leader"  # where the leader is, in the answer of a server that is not
SERVERS = "Foedus-Servers"  # where all servers are that share a database, with spaces between
MOST_SERVERS = 16  # of which a client is told, and which it remembers
DOORBELL = "socket.io"
BELL = "bell"  # the doorbell's event; its only argument is an encoded Bell

_ASKED: tuple[type[Message], ...] = (CheckIn, Decline, StartUpload, Submit, Confer, Ask)
PATHS: dict[type[Message], str] = {kind: f"/v1/{name}" for name, kind in KINDS.items() if kind in _ASKED}

STATUS: dict[Code, int] = {
    Code.MALFORMED: 400, Code.WRONG_VERSION: 400, Code.TOO_LARGE: 413, Code.UNAUTHENTICATED: 401, Code.FORBIDDEN: 403,
    Code.BAD_SIGNATURE: 403, Code.RATE: 429, Code.OVERLOADED: 503, Code.NOT_LEADER: 503, Code.STORAGE: 503,
    Code.UNKNOWN_RUN: 404, Code.UNKNOWN_KEY: 404, Code.UNKNOWN_UPLOAD: 404, Code.UNKNOWN_BLOB: 404,
    Code.WRONG_OFFSET: 409, Code.WRONG_DIGEST: 409,
}  # fmt: skip
REFUSED = 422  # any other code: what came was understood, and is not taken


def status_of(code: Code) -> int:
    """HTTP's status for a code.

    >>> status_of(Code.RATE), status_of(Code.NOT_FINITE)
    (429, 422)
    """
    return STATUS.get(code, REFUSED)


def blob_path(digest: bytes) -> str:
    """Where a blob is fetched.

    >>> blob_path(bytes(2))
    '/v1/blobs/0000'
    """
    return f"/v1/blobs/{digest.hex()}"


def upload_path(upload: bytes) -> str:
    """Where an upload's bytes go.

    >>> upload_path(bytes(2))
    '/v1/uploads/0000'
    """
    return f"/v1/uploads/{upload.hex()}"
