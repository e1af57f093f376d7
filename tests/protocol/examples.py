"""One message of every kind, with every field told: what tests of the wire share, and what the vectors are made of."""

from __future__ import annotations

from foedus.errors import Code
from foedus.protocol.messages import (
    Accepted,
    Ask,
    Bell,
    Blob,
    CheckIn,
    Closed,
    Confer,
    Decline,
    Event,
    Finished,
    Kind,
    Later,
    Message,
    Place,
    Problem,
    Received,
    Refused,
    Standing,
    Standings,
    Stands,
    StartUpload,
    Submit,
    Turn,
    Why,
    Window,
)

KEY, OTHER, DIGEST = bytes(range(16)), bytes(16), bytes(range(32))
LATER = Window(after_s=60.0, until_s=90.5)

EXAMPLES: list[Message] = [
    CheckIn(
        run="study", kinds=(Kind.TRAIN, Kind.EVALUATE), examples=1234, software={"foedus": "0.1.0"},
        protections=("secure-aggregation",), pending=(KEY, OTHER),
    ),
    Accepted(
        run="study", round=3, attempt=2, kind=Kind.TRAIN, key=KEY, orders=Blob(digest=DIGEST, size=6653480),
        bundle=Blob(digest=DIGEST, size=100), target="federation:federation", position=7, seed=2**64 - 1, limit=5,
        closes_s=600.0, minimum=3, protections=("privacy-budget",), held=OTHER, signature=bytes(64),
    ),
    Later(after_s=60.0, until_s=90.0, reason="the cohort is full"),
    Finished(run="study", model=Blob(digest=DIGEST, size=5), personal=True, rounds=20),
    Decline(key=KEY, reason="rules"),
    StartUpload(key=KEY, size=1000, digest=DIGEST, version=2),
    Place(upload=OTHER, offset=512, scale=0.5, chunk=65536, most=1 << 24),
    Submit(key=KEY, upload=OTHER, size=1000, digest=DIGEST),
    Received(later=LATER),
    Refused(code=Code.NOT_FINITE, told="NaN in 'w'", later=LATER),
    Closed(why=Why.GOAL_REACHED, later=LATER),
    Confer(key=KEY, turn=2, upload=OTHER, size=800, digest=DIGEST),
    Turn(turn=3, body=Blob(digest=DIGEST, size=8080), closes_s=60.0),
    Ask(keys=(KEY,)),
    Standings(entries=(Standing(key=KEY, state=Stands.AGAIN),), later=LATER),
    Bell(run="study", event=Event.OFFER, round=4, progress=0.25),
    Problem(code=Code.RATE, told="ask once a minute", fatal=False, after_s=60.0),
]  # fmt: skip
