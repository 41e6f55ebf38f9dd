"""The second name of the user of a request."""

import sqlalchemy
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("answers", sqlalchemy.Column("safety_identifier", sqlalchemy.String(256), nullable=True))
    op.create_index("ix_answers_safety_identifier", "answers", ["safety_identifier"])
