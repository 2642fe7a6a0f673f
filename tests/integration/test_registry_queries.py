"""Every named query is valid against the schema, and every name that the code uses is defined."""

from __future__ import annotations

import re
from pathlib import Path

import asyncpg

import orchestrator
from orchestrator.registry.database import query_names, sql

SOURCES = Path(orchestrator.__file__).parent


def used_names() -> set[str]:
    found: set[str] = set()
    for path in SOURCES.rglob("*.py"):
        found.update(re.findall(r"\bsql\(\s*\"(\w+)\"", path.read_text()))
    return found


def test_names_used_and_defined_agree() -> None:
    assert used_names() == set(query_names())


async def test_every_query_is_valid(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    invalid = {}
    for name in query_names():
        try:
            await connection.prepare(sql(name))
        except asyncpg.PostgresError as error:
            invalid[name] = str(error)
    await connection.close()
    assert invalid == {}
