"""Organizations, projects and roles of keys; files, uploads, usage, the audit log."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def numbered() -> list[sa.Column]:
    return [
        sa.Column("number", BIG, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    ]


def project() -> sa.Column:
    return sa.Column("project", sa.String(64), sa.ForeignKey("projects.id"), nullable=False)


def upgrade() -> None:
    organizations = op.create_table(
        "organizations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    projects = op.create_table(
        "projects",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("organization", sa.String(64), sa.ForeignKey("organizations.id"), nullable=False, index=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("organization", "name", name="projects_name"),
    )
    now = int(time.time())
    op.bulk_insert(organizations, [{"id": "org-default", "name": "default", "created_at": now}])
    default = {"id": "proj_default", "organization": "org-default", "name": "default", "created_at": now}
    op.bulk_insert(projects, [default])
    op.add_column("keys", sa.Column("project", sa.String(64), nullable=False, server_default="proj_default"))
    op.add_column("keys", sa.Column("role", sa.String(16), nullable=False, server_default="member"))
    op.add_column("answers", sa.Column("input_tokens", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE keys SET role = 'owner' WHERE admin")
    _files()
    op.create_table(
        "creations",
        sa.Column("number", BIG, primary_key=True, autoincrement=True),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("route", sa.String(64), nullable=False),
        sa.Column("idempotency_key", sa.String(256)),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("object", sa.String(64), nullable=False),
        sa.Column("retried", sa.Boolean, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.UniqueConstraint("project", "route", "idempotency_key", name="creations_idempotency"),
    )
    op.create_index("creations_digest", "creations", ["project", "key", "route", "digest"])
    op.create_index("creations_created", "creations", ["created"])
    op.create_table(
        "usage",
        sa.Column("number", BIG, primary_key=True, autoincrement=True),
        project(),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("object", sa.String(128), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("device_seconds", sa.Float, nullable=False),
        sa.Column("cost", sa.Float, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_index("usage_time", "usage", ["project", "created_at"])
    op.create_table(
        "audit",
        *numbered(),
        sa.Column("organization", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("object", sa.Text, nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index("audit_page", "audit", ["organization", "created_at", "number"])
    op.create_table(
        "webhook_endpoints",
        *numbered(),
        sa.Column("project", sa.String(64), sa.ForeignKey("projects.id"), nullable=False, index=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("event_types", sa.JSON, nullable=False),
        sa.Column("secret", sa.Text, nullable=False),
        sa.Column("old_secret", sa.Text),
        sa.Column("old_until", sa.BigInteger),
        sa.Column("hint", sa.String(16), nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("deleted_at", sa.BigInteger),
    )
    op.create_table(
        "deliveries",
        sa.Column("number", BIG, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Float, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_index("deliveries_due", "deliveries", ["state", "next_at"])
    op.create_table(
        "batches",
        *numbered(),
        project(),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False, index=True),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("output_seconds", sa.BigInteger),
        sa.Column("lease_until", sa.Float, nullable=False),
    )
    op.create_index("batches_page", "batches", ["project", "created_at", "number"])
    op.create_table(
        "secrets",
        sa.Column("project", sa.String(64), sa.ForeignKey("projects.id"), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )


def _files() -> None:
    op.create_table(
        "blobs",
        sa.Column("id", sa.String(64), primary_key=True),
        project(),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("references", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("project", "sha256", name="blobs_content"),
    )
    op.create_table(
        "files",
        *numbered(),
        project(),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("blob", sa.String(64), sa.ForeignKey("blobs.id")),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, index=True),
        sa.Column("deleted_at", sa.BigInteger),
    )
    op.create_index("files_page", "files", ["project", "created_at", "number"])
    op.create_index("files_blob", "files", ["blob"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(64), primary_key=True),
        project(),
        sa.Column("key", sa.String(32), nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("mime_type", sa.String(256), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("file_seconds", sa.BigInteger),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("file", sa.String(64)),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "parts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("upload", sa.String(64), sa.ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False, index=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
