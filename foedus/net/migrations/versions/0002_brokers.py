"""What aggregation workers behind a broker have merged: partitions, partial sums, who is in them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

WHOLE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "partitions",
        sa.Column("topic", sa.String(200), primary_key=True),
        sa.Column("partition", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("epoch", WHOLE, nullable=False),
        sa.Column("next", WHOLE, nullable=False),
    )
    op.create_table(
        "partials",
        sa.Column("run", sa.String(200), primary_key=True),
        sa.Column("round", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("part", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("topic", sa.String(200), primary_key=True),
        sa.Column("partition", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("sum", sa.String(100), nullable=False),
    )
    op.create_table(
        "gathered",
        sa.Column("run", sa.String(200), primary_key=True),
        sa.Column("round", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("part", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("position", WHOLE, primary_key=True, autoincrement=False),
        sa.Column("partition", WHOLE, nullable=False),
        sa.Column("key", sa.LargeBinary, nullable=False),
        sa.Column("refused", sa.Text, nullable=False),
        sa.Column("version", WHOLE, nullable=False),
        sa.Column("scale", sa.Float, nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("gathered", "partials", "partitions"):
        op.drop_table(table)
