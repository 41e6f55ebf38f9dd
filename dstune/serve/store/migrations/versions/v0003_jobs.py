"""Fine-tuning jobs, their events and checkpoints, the models that they make."""

import sqlalchemy as sa
from alembic import op

from dstune.serve.store.migrations.versions.v0002_finetuning import numbered, project

revision = "0003"
down_revision = "0002"


def _job(*, is_key: bool = False) -> sa.Column:
    key = sa.ForeignKey("finetuning_jobs.id", ondelete="CASCADE")
    return sa.Column("job", sa.String(64), key, nullable=False, primary_key=is_key)


def upgrade() -> None:
    with op.batch_alter_table("answers") as answers:  # names of tuned models are longer
        answers.alter_column("model", existing_type=sa.String(128), type_=sa.String(256), existing_nullable=False)
    op.create_table(
        "finetuning_jobs",
        *numbered(),
        sa.Column("organization", sa.String(64), nullable=False),
        project(),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("preset", sa.String(64), nullable=False),
        sa.Column("start", sa.Text),
        sa.Column("method", sa.String(32), nullable=False),
        sa.Column("hyperparameters", sa.JSON, nullable=False),
        sa.Column("training_file", sa.String(64), nullable=False),
        sa.Column("validation_file", sa.String(64)),
        sa.Column("suffix", sa.Text),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("integrations", sa.JSON, nullable=False),
        sa.Column("metadata", sa.JSON),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("pool", sa.String(32), nullable=False),
        sa.Column("devices", sa.Integer, nullable=False),
        sa.Column("taken", sa.JSON, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("idle_attempts", sa.Integer, nullable=False),
        sa.Column("attempt_step", sa.Integer, nullable=False),
        sa.Column("rows", sa.BigInteger),
        sa.Column("base_lr", sa.Float),
        sa.Column("total_steps", sa.BigInteger),
        sa.Column("last_step", sa.BigInteger, nullable=False),
        sa.Column("step_seconds", sa.Float),
        sa.Column("memory_gib", sa.Float),
        sa.Column("queued_at", sa.BigInteger),
        sa.Column("started_at", sa.Float),
        sa.Column("device_seconds", sa.Float, nullable=False),
        sa.Column("estimated_finish", sa.BigInteger),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("error", sa.JSON),
        sa.Column("fine_tuned_model", sa.Text),
        sa.Column("result_file", sa.String(64)),
        sa.Column("trained_tokens", sa.BigInteger),
    )
    op.create_index("finetuning_jobs_page", "finetuning_jobs", ["project", "created_at", "number"])
    op.create_index("finetuning_jobs_state", "finetuning_jobs", ["state", "organization"])
    op.create_index("finetuning_jobs_active", "finetuning_jobs", ["active"])
    op.create_table(
        "finetuning_metadata",
        _job(is_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(512), nullable=False),
    )
    op.create_index("finetuning_metadata_pair", "finetuning_metadata", ["name", "value"])
    op.create_table(
        "finetuning_events",
        *numbered(),
        _job(),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("step", sa.BigInteger),
        sa.UniqueConstraint("job", "step", name="finetuning_events_step"),
    )
    op.create_index("finetuning_events_page", "finetuning_events", ["job", "created_at", "number"])
    op.create_table(
        "finetuning_checkpoints",
        *numbered(),
        _job(),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.UniqueConstraint("job", "step", name="finetuning_checkpoints_step"),
    )
    op.create_index("finetuning_checkpoints_page", "finetuning_checkpoints", ["job", "created_at", "number"])
    op.create_table(
        "finetuning_models",
        *numbered(),
        sa.Column("name", sa.String(512), nullable=False, unique=True),
        sa.Column("organization", sa.String(64), nullable=False),
        project(),
        sa.Column("job", sa.String(64), sa.ForeignKey("finetuning_jobs.id"), nullable=False),
        sa.Column("preset", sa.String(64), nullable=False),
        sa.Column("step", sa.BigInteger),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("deleted_at", sa.BigInteger),
    )
    op.create_index("finetuning_models_page", "finetuning_models", ["project", "created_at", "number"])
    op.create_table(
        "finetuning_permissions",
        *numbered(),
        sa.Column("model", sa.String(512), nullable=False),
        project(),
        sa.Column("key", sa.String(32), nullable=False),
        sa.UniqueConstraint("model", "project", name="finetuning_permissions_pair"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("until", sa.Float, nullable=False),
    )
