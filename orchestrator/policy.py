"""A product's policy: what it may contain, and the two checks that are made before any change of state.

The quota is checked where the engine is recorded (`registry.engines.insert`), because only there it can be exact.
"""

from __future__ import annotations

import asyncio
import fnmatch
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from orchestrator.errors import PolicyDenied
from orchestrator.registry.rate import SLOT_LIMIT

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.registry.rate import RateRegistry

__all__ = ["Policy", "RateLimiter", "allowed_image", "image_of"]

Count = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
Seconds = Annotated[StrictFloat, Field(ge=0, le=10**9)]


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("must not contain control characters")
    return value


Text = Annotated[StrictStr, Field(min_length=1, max_length=512), AfterValidator(_printable)]
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LEAST_MEMORY = 6 << 20  # Docker's own floor


def _enough(value: str) -> str:
    unit = value.lower().removesuffix("b")[-1:]
    if float(value.lower().rstrip("bkmgt")) * _UNITS.get(unit, 1) < _LEAST_MEMORY:
        raise ValueError("must be at least 6m")
    return value


Memory = Annotated[
    StrictStr,
    Field(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?[bkmgtBKMGT]?[bB]?$"),
    AfterValidator(_enough),
]


class Policy(BaseModel):
    """`{}` sets no limits. Unknown keys are invalid."""

    model_config = ConfigDict(extra="forbid")

    max_engines: Count | None = Field(None, description="engines of all states; provision answers 429 at the limit")
    rate_limit_rpm: Annotated[StrictInt, Field(ge=1, le=100_000_000)] | None = Field(
        None, description="admits in any 60 s, over all replicas"
    )
    idle_sleep_threshold_s: Seconds | None = Field(None, description="idle before sleep; 0 = never")
    idle_stop_threshold_s: Seconds | None = Field(None, description="asleep before the object stops; 0 = never")
    engine_image: Text | None = Field(None, description="default image of this product")
    engine_memory: Memory | None = Field(None, description="memory ceiling, as `512m`")
    engine_cpus: Annotated[StrictFloat, Field(gt=0, le=10_000)] | None = Field(None, description="CPU ceiling")
    allowed_images: list[Text] | None = Field(None, description="exact or with `*`")
    warm_pool: Count | None = Field(None, description="engines kept ready")
    warm_pool_frozen: StrictBool | None = Field(None, description="keep them frozen")
    snapshot_interval_s: Seconds | None = Field(None, description="between two snapshots; 0 = never")
    snapshot_keep: Count | None = Field(None, description="snapshots kept of an engine")
    snapshot_max_age_s: Seconds | None = Field(None, description="older ones are removed")


def _repository(image: str) -> str:
    name = image.split("@", 1)[0]
    head, slash, last = name.rpartition("/")
    return head + slash + last.split(":", 1)[0]


def allowed_image(policy: dict[str, Any], image: str, default_image: str) -> bool:
    """Whether a product may run `image`: by `allowed_images`, else only the default image's repository."""
    allowed = policy.get("allowed_images")
    if allowed is None:
        return _repository(image) in {
            _repository(default_image),
            _repository(policy.get("engine_image", default_image)),
        }
    return any(fnmatch.fnmatchcase(image, pattern) for pattern in allowed)


def image_of(policy: dict[str, Any], wanted: str | None, default_image: str) -> str:
    """The image that a provision uses. Raises `PolicyDenied`."""
    image = wanted or str(policy.get("engine_image") or default_image)
    if wanted is not None and not allowed_image(policy, wanted, default_image):
        raise PolicyDenied(f"The policy does not allow the image '{wanted}'.", details={"engine_version": wanted})
    return image


@dataclass(slots=True)
class _Block:
    id: int
    left: int
    used: int
    ends: float  # monotonic


class RateLimiter:
    """Never more than N counted calls in any 60 s, over all replicas and across restarts.

    Up to `SLOT_LIMIT` a minute each call takes a slot in the database (the admit statement does it). Above, this
    process takes blocks of at most N/100 calls, uses each for at most one second, and gives back what was left.
    """

    def __init__(self, registry: RateRegistry) -> None:
        self._registry = registry
        self._blocks: dict[UUID, _Block] = {}
        self._spent: dict[int, int] = {}
        self._locks: dict[UUID, asyncio.Lock] = {}

    async def count(self, product_id: UUID, limit_rpm: int) -> bool:
        """Count one call against a limit above `SLOT_LIMIT`; False when the last 60 s are full."""
        assert limit_rpm > SLOT_LIMIT
        if self._use(product_id):
            return True
        lock = self._locks.setdefault(product_id, asyncio.Lock())
        async with lock:
            if self._use(product_id):
                return True
            asked = time.monotonic()
            block = await self._registry.take_block(product_id, limit_rpm)
            if block is None:
                return False
            block_id, calls = block
            self._blocks[product_id] = _Block(block_id, calls - 1, 1, asked + 1)
            return True

    def _use(self, product_id: UUID) -> bool:
        block = self._blocks.get(product_id)
        if block is None:
            return False
        if block.left > 0 and time.monotonic() < block.ends:
            block.left -= 1
            block.used += 1
            return True
        self._retire(product_id, block)
        return False

    def _retire(self, product_id: UUID, block: _Block) -> None:
        if block.left > 0:
            self._spent[block.id] = block.used
        del self._blocks[product_id]

    async def settle(self) -> None:
        """Give back what was left of blocks whose second has ended. Called about once a second."""
        now = time.monotonic()
        for product_id, block in list(self._blocks.items()):
            if now >= block.ends:
                self._retire(product_id, block)
        if self._spent:
            spent, self._spent = self._spent, {}
            await self._registry.settle_blocks(spent)

    async def close(self) -> None:
        """Give back everything at the end of the process."""
        for product_id, block in list(self._blocks.items()):
            self._retire(product_id, block)
        await self.settle()
