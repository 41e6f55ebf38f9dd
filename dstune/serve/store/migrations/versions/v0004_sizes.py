"""Sizes of the folders of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("finetuning_jobs", sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"))
