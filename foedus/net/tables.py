"""The tables of a server's database. What is written here, and when, is in ``store.py``; how a database of an older
version becomes one of this version, in ``migrations``.

No table has a column for an update or a sum: those are never in a database (``blobs.py`` holds what is allowed to
lie on a disk at all).
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text

METADATA = MetaData()

# Numbers of positions, rounds and epochs fit 64 bits everywhere; SQLite's autoincrement wants its own Integer.
WHOLE = BigInteger().with_variant(Integer, "sqlite")

LEASES = Table(
    "leases", METADATA,
    Column("name", String(100), primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("address", String(500), nullable=False),
    Column("epoch", WHOLE, nullable=False),
    Column("expires_at", Float, nullable=False),
)  # fmt: skip

CLIENTS = Table(
    "clients", METADATA,
    Column("position", WHOLE, primary_key=True, autoincrement=False),
    Column("name", String(200), nullable=False, unique=True),
    Column("key", LargeBinary, nullable=False),  # its public key
    Column("enrolled_at", Float, nullable=False),
    Column("examples", WHOLE, nullable=False),  # as it last said; −1 for never
    Column("revoked_at", Float, nullable=True),
    Column("scope", String(200), nullable=False),
    Column("silo", Boolean, nullable=False),  # must show a client certificate
    Column("invited", LargeBinary, nullable=False),  # digest of the join token that let it in
    Column("population", String(100), nullable=False, server_default=""),  # whose runs it takes part in
    Index("clients_by_key", "key"),
)  # fmt: skip

INVITATIONS = Table(
    "invitations", METADATA,
    Column("digest", LargeBinary, primary_key=True),  # of a join token; the token itself is nowhere
    Column("expires_at", Float, nullable=False),
    Column("uses", WHOLE, nullable=False),  # how many clients it still lets in
    Column("scope", String(200), nullable=False),
    Column("silo", Boolean, nullable=False),
    Column("name", String(200), nullable=False),  # the only one it is good for; "" for any
    Column("population", String(100), nullable=False, server_default=""),
)  # fmt: skip

RUNS = Table(
    "runs", METADATA,
    Column("name", String(200), primary_key=True),
    Column("identity", String(100), nullable=False),
    Column("state", LargeBinary, nullable=False),  # of the round machine, without its seats
    Column("checkpoint", String(100), nullable=False),  # digest: what the run is between two rounds
    Column("sum", String(100), nullable=False),  # digest: the partial sum of the round under way; "" for none
    Column("key", LargeBinary, nullable=False),  # the round's own, sealed; destroyed at its end
    Column("changed_at", Float, nullable=False),
)  # fmt: skip

SEATS = Table(
    "seats", METADATA,
    Column("run", String(200), primary_key=True),
    Column("round", WHOLE, primary_key=True, autoincrement=False),
    Column("part", WHOLE, primary_key=True, autoincrement=False),
    Column("attempt", WHOLE, primary_key=True, autoincrement=False),
    Column("position", WHOLE, primary_key=True, autoincrement=False),
    Column("key", LargeBinary, nullable=False),
    Column("state", String(20), nullable=False),
    Column("about", LargeBinary, nullable=False),
    Index("seats_by_key", "key", unique=True),
)  # fmt: skip

# Whose update is in the model of a round: the database itself refuses the second one.
COUNTED = Table(
    "counted", METADATA,
    Column("run", String(200), primary_key=True),
    Column("round", WHOLE, primary_key=True, autoincrement=False),
    Column("part", WHOLE, primary_key=True, autoincrement=False),
    Column("position", WHOLE, primary_key=True, autoincrement=False),
)  # fmt: skip

# The record of a run, line by line, as it stands in the files of its folder.
LINES = Table(
    "lines", METADATA,
    Column("run", String(200), primary_key=True),
    Column("file", String(100), primary_key=True),
    Column("round", WHOLE, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
)  # fmt: skip

# What aggregation workers behind a broker have merged (``brokers/partials.py``).
PARTITIONS = Table(
    "partitions", METADATA,
    Column("topic", String(200), primary_key=True),
    Column("partition", WHOLE, primary_key=True, autoincrement=False),
    Column("epoch", WHOLE, nullable=False),  # grows with every worker that has it
    Column("next", WHOLE, nullable=False),  # the offset after the last record that is in a sum
)  # fmt: skip

PARTIALS = Table(
    "partials", METADATA,
    Column("run", String(200), primary_key=True),
    Column("round", WHOLE, primary_key=True, autoincrement=False),
    Column("part", WHOLE, primary_key=True, autoincrement=False),
    Column("topic", String(200), primary_key=True),
    Column("partition", WHOLE, primary_key=True, autoincrement=False),
    Column("sum", String(100), nullable=False),  # digest
)  # fmt: skip

GATHERED = Table(
    "gathered", METADATA,
    Column("run", String(200), primary_key=True),
    Column("round", WHOLE, primary_key=True, autoincrement=False),
    Column("part", WHOLE, primary_key=True, autoincrement=False),
    Column("position", WHOLE, primary_key=True, autoincrement=False),
    Column("partition", WHOLE, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("refused", Text, nullable=False),  # why; "" if it is in the sum
    Column("version", WHOLE, nullable=False),
    Column("scale", Float, nullable=False),
)  # fmt: skip

AUDIT = Table(
    "audit", METADATA,
    Column("number", WHOLE, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("kind", String(50), nullable=False),
    Column("told", Text, nullable=False),  # JSON
    Column("digest", String(64), nullable=False),  # of the line before and this one
)  # fmt: skip
