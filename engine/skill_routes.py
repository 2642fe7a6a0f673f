"""Skills: the catalog's, which nobody changes over HTTP, and the user's own, which live in the brain.

    GET    /skills          name, description and source of each
    GET    /skills/{name}   one of them, with its instructions
    POST   /skills/create   {"name", "description", "instructions"}: 201
    PUT    /skills/{name}   {"description"?, "instructions"?}
    DELETE /skills/{name}   204

Changing or hiding a platform skill is 403.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine import bodies, memory
from engine.errors import PermissionDenied, SkillExists, SkillNotFound
from engine.routing import Route
from engine.wire import Request, Response

if TYPE_CHECKING:
    from engine.brain import Brain
    from engine.catalog import Catalog


class SkillRoutes:
    def __init__(self, brain: Brain, catalog: Catalog) -> None:
        self._brain = brain
        self._catalog = catalog

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("GET", "/skills", self._list),
            Route("POST", "/skills/create", self._create),
            Route("GET", "/skills/", self._get),
            Route("PUT", "/skills/", self._change),
            Route("DELETE", "/skills/", self._remove),
        )

    async def _list(self, _request: Request) -> Response:
        own = {skill["name"]: skill for skill in await self._brain.read(memory.skills)}
        found = [
            *(_public(skill, "platform") for skill in self._catalog.skills.values()),
            *(_public(skill, "user") for name, skill in sorted(own.items()) if name not in self._catalog.skills),
        ]
        return Response(200, {"skills": [{k: v for k, v in skill.items() if k in _LISTED} for skill in found]})

    async def _get(self, request: Request) -> Response:
        name = _name(request)
        if name in self._catalog.skills:
            return Response(200, _public(self._catalog.skills[name], "platform"))
        return Response(200, await self._own(name))

    async def _create(self, request: Request) -> Response:
        new = bodies.skill(await request.json_object())
        if new.name in self._catalog.skills or not await self._brain.write(lambda db: memory.add_skill(db, *new)):
            raise SkillExists(new.name)
        return Response(201, await self._own(new.name))

    async def _change(self, request: Request) -> Response:
        name = self._changeable(request)
        change = bodies.skill_change(await request.json_object())
        if not await self._brain.write(lambda db: memory.change_skill(db, name, *change)):
            raise SkillNotFound(name[:1000])
        return Response(200, await self._own(name))

    async def _remove(self, request: Request) -> Response:
        name = self._changeable(request)
        if not await self._brain.write(lambda db: memory.remove_skill(db, name)):
            raise SkillNotFound(name[:1000])
        return Response(204)

    def _changeable(self, request: Request) -> str:
        name = _name(request)
        if name in self._catalog.skills:
            raise PermissionDenied("Platform skills are read-only.", name=name)
        return name

    async def _own(self, name: str) -> dict[str, Any]:
        found = await self._brain.read(lambda db: memory.skill(db, name))
        if found is None:
            raise SkillNotFound(name[:1000])
        return _public(found, "user")


_LISTED = ("name", "description", "source", "read_only")


def _name(request: Request) -> str:
    return request.path.removeprefix("/skills/")


def _public(skill: dict[str, Any], source: str) -> dict[str, Any]:
    return {**skill, "source": source, "read_only": source == "platform"}
