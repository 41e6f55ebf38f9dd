"""One row of feedback of an answer, the newest, and its size."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute(
        "DELETE FROM feedback WHERE EXISTS (SELECT 1 FROM feedback AS newer WHERE newer.answer = feedback.answer"
        " AND (newer.created > feedback.created OR (newer.created = feedback.created AND newer.id > feedback.id)))"
    )
    op.add_column("feedback", sa.Column("bytes", sa.Integer, nullable=False, server_default="0"))
    size = "coalesce(length(label), 0) + coalesce(length(correction), 0)"
    op.execute(f"UPDATE feedback SET bytes = {size}")
    op.drop_index("feedback_answer", "feedback")
    op.create_index("feedback_answer", "feedback", ["answer"], unique=True)
    op.create_index("feedback_key", "feedback", ["key"])
