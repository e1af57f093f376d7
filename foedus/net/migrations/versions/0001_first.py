"""The first tables: leases, clients, invitations, runs, seats, who is counted, the record, and the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

WHOLE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "leases",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("holder", sa.String(200), nullable=False),
        sa.Column("address", sa.String(500), nullable=False),
        sa.Column("epoch", WHOLE, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_table(
        "clients",
        sa.Column("position", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(200), nullable=False, unique=True),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("enrolled_at", sa.Float, nullable=False),
        sa.Column("examples", WHOLE, nullable=False),
        sa.Column("revoked_at", sa.Float, nullable=True),
        sa.Column("scope", sa.String(200), nullable=False),
        sa.Column("silo", sa.Boolean, nullable=False),
        sa.Column("invited", sa.LargeBinary, nullable=False),
    )
    op.create_index("clients_by_key", "clients", ["key"])
    op.create_table(
        "invitations",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("uses", WHOLE, nullable=False),
        sa.Column("scope", sa.String(200), nullable=False),
        sa.Column("silo", sa.Boolean, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
    )
    op.create_table(
        "runs",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("identity", sa.String(100), nullable=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
        sa.Column("checkpoint", sa.String(100), nullable=False),
        sa.Column("sum", sa.String(100), nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("changed_at", sa.Float, nullable=False),
    )
    op.create_table(
        "seats",
        sa.Column("run", sa.String(200), primary_key=True),
        sa.Column("round", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("part", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("attempt", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("position", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("about", sa.LargeBinary, nullable=False),
    )
    op.create_index("seats_by_key", "seats", ["key"], unique=True)
    op.create_table(
        "counted",
        sa.Column("run", sa.String(200), primary_key=True),
        sa.Column("round", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("part", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("position", WHOLE, primary_key=True, autoincrement=False),
    )
    op.create_table(
        "lines",
        sa.Column("run", sa.String(200), primary_key=True),
        sa.Column("file", sa.String(100), primary_key=True),
        sa.Column("round", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("number", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("kind", sa.String(50), nullable=False),
        sa.Column("told", sa.Text, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("audit", "lines", "counted", "seats", "runs", "invitations", "clients", "leases"):
        op.drop_table(table)
