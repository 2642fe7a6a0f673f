"""Counts of restarts that arrive out of order."""

from orchestrator.registry.migrations import run_sql_file

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    run_sql_file(__file__)
