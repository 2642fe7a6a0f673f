"""Alembic's entry point."""

import asyncio

from alembic import context

from orchestrator.registry.migrations import run_online

asyncio.run(run_online(context.config))
