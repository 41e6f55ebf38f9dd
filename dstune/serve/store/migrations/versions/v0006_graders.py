"""Graders of reinforcement jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("finetuning_jobs", sa.Column("grader", sa.JSON, nullable=True))
