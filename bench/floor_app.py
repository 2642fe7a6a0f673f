"""The floor of an admit: a bare FastAPI look-up by the hash of a key, through asyncpg's pool as it comes."""

from __future__ import annotations

import hashlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import asyncpg
import uvicorn
from fastapi import FastAPI, Header, HTTPException

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pool: asyncpg.Pool[asyncpg.Record]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    global pool
    pool = await asyncpg.create_pool(os.environ["FLOOR_DATABASE_URL"], min_size=10, max_size=10)
    yield
    await pool.close()


app = FastAPI(lifespan=lifespan)


@app.post("/lookup/{user_id}")
async def look_up(user_id: str, x_platform_key: str = Header()) -> dict[str, Any]:
    key_hash = hashlib.sha256(x_platform_key.encode()).hexdigest()
    row = await pool.fetchrow(
        "SELECT e.id, e.user_id, e.status, e.host, e.endpoint_port FROM platform_keys k "
        "JOIN engines e ON e.product_id = k.product_id AND e.user_id = $2 WHERE k.key_hash = $1",
        key_hash,
        user_id,
    )
    if row is None:
        raise HTTPException(404)
    return {"id": str(row["id"]), "user_id": row["user_id"], "status": row["status"], "port": row["endpoint_port"]}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["FLOOR_PORT"]), access_log=False, log_level="error")
