"""What the health, idle and reconcile loops remember."""

from orchestrator.registry.migrations import run_sql_file

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    run_sql_file(__file__)
