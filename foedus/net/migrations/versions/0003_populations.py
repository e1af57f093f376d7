"""Populations: whose runs a client takes part in, as its invitation says."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    for table in ("clients", "invitations"):
        op.add_column(table, sa.Column("population", sa.String(100), nullable=False, server_default=""))


def downgrade() -> None:
    """Drop them."""
    for table in ("clients", "invitations"):
        op.drop_column(table, "population")
