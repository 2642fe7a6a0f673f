"""A position in the audit stream over all chains; products being deleted; the re-encryption of keys."""

from orchestrator.registry.migrations import run_sql_file

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    run_sql_file(__file__)
