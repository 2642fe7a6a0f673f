"""What PostgreSQL knows. Pure data access: no backend call, no HTTP, no decision about an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.registry.admissions import AdmissionRegistry
from orchestrator.registry.audit import AuditRegistry
from orchestrator.registry.database import sql
from orchestrator.registry.engines import EngineRegistry
from orchestrator.registry.fleet import FleetRegistry
from orchestrator.registry.health import HealthRegistry
from orchestrator.registry.idle import IdleRegistry
from orchestrator.registry.orphans import OrphanRegistry
from orchestrator.registry.platform_keys import PlatformKeyRegistry
from orchestrator.registry.products import ProductRegistry
from orchestrator.registry.rate import RateRegistry
from orchestrator.registry.rewrap import RewrapRegistry
from orchestrator.registry.timelines import TimelineRegistry
from orchestrator.registry.webhooks import WebhookRegistry

if TYPE_CHECKING:
    from uuid import UUID

    from orchestrator.registry.database import Database

__all__ = ["Registry"]


class Registry:
    """The tables, by subject, on one pool."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.products = ProductRegistry(database)
        self.platform_keys = PlatformKeyRegistry(database)
        self.engines = EngineRegistry(database)
        self.rate = RateRegistry(database)
        self.audit = AuditRegistry(database)
        self.fleet = FleetRegistry(database)
        self.rewrap = RewrapRegistry(database)
        self.webhooks = WebhookRegistry(database)
        self.admissions = AdmissionRegistry(database)
        self.timelines = TimelineRegistry(database)
        self.health = HealthRegistry(database)
        self.idle = IdleRegistry(database)
        self.orphans = OrphanRegistry(database)

    async def deployment_id(self) -> UUID:
        """The mark of ownership that the first migration made."""
        deployment_id: UUID = await self.database.fetchval(sql("deployment_id"))
        return deployment_id
