"""Webhooks and their deliveries."""

from orchestrator.registry.migrations import run_sql_file

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    run_sql_file(__file__)
