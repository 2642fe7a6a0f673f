"""The tools that this engine brings. What a tool cannot do is told in its result; the turn goes on.

    bash            {"command"}            in the sandbox, in the task's workspace
    read_file       {"path"}               of the task's workspace
    write_file      {"path", "content"}    of the task's workspace
    memory_search   {"query", "store"?, "limit"?}

The catalog may describe them otherwise and say which of them need a person's permission. With a catalog that lists
tools, those it does not list are off.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from engine import memory
from engine.errors import EngineError
from engine.responder import ToolSpec
from engine.sandbox import MAX_COMMAND_BYTES
from engine.workspace import Workspace, WorkspaceError

if TYPE_CHECKING:
    from engine.brain import Brain
    from engine.catalog import Catalog
    from engine.sandbox import Sandbox

_TEXT = {"type": "string"}


def _schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class _Builtin(NamedTuple):
    spec: ToolSpec
    asks: bool
    """Whether it needs permission where no catalog says."""


_BUILTIN = {
    spec.name: _Builtin(spec, asks)
    for spec, asks in (
        (
            ToolSpec(
                "bash",
                "Runs a bash command in the task's sandboxed workspace, without a network. Answers what it printed.",
                _schema({"command": _TEXT}, ["command"]),
            ),
            True,
        ),
        (
            ToolSpec("read_file", "Reads a text file of the task's workspace.", _schema({"path": _TEXT}, ["path"])),
            False,
        ),
        (
            ToolSpec(
                "write_file",
                "Writes a whole text file of the task's workspace.",
                _schema({"path": _TEXT, "content": _TEXT}, ["path", "content"]),
            ),
            True,
        ),
        (
            ToolSpec(
                "memory_search",
                "Searches what the engine remembers: past conversations (episodes), knowledge, people (social).",
                _schema(
                    {
                        "query": _TEXT,
                        "store": {"type": "string", "enum": list(memory.STORES)},
                        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
                    },
                    ["query"],
                ),
            ),
            False,
        ),
    )
}
NAMES = tuple(_BUILTIN)


class Outcome(NamedTuple):
    output: str
    error: str | None = None


class Toolbox:
    def __init__(self, brain: Brain, sandbox: Sandbox, catalog: Catalog, bash_timeout_s: float) -> None:
        self._brain = brain
        self._sandbox = sandbox
        self._catalog = catalog
        self._bash_timeout_s = bash_timeout_s

    def health(self) -> dict[str, Any]:
        """Each tool, and for one that is off, why."""
        state: dict[str, Any] = {}
        for name in [*NAMES, *(name for name in self._catalog.tools if name not in _BUILTIN)]:
            problem = self._problem(name)
            state[name] = {"status": "ok"} if problem is None else {"status": "off", "detail": problem}
        return state

    async def specs(self) -> list[ToolSpec]:
        await self._sandbox.probe()
        return [
            replace(builtin.spec, description=self._catalog.tools[name]["description"])
            if name in self._catalog.tools
            else builtin.spec
            for name, builtin in _BUILTIN.items()
            if self._problem(name) is None
        ]

    async def problem(self, name: str) -> str | None:
        """Why a tool cannot be used here; None when it can."""
        if name == "bash":
            await self._sandbox.probe()
        return self._problem(name)

    def _problem(self, name: str) -> str | None:
        if name not in _BUILTIN:
            return "this engine does not bring a tool of this name"
        if self._catalog.tools and name not in self._catalog.tools:
            return "the catalog does not list it"
        return self._sandbox.problem if name == "bash" else None

    def needs_permission(self, name: str) -> bool:
        entry = self._catalog.tools.get(name)
        return _BUILTIN[name].asks if entry is None else bool(entry.get("requires_permission", False))

    def checked(self, name: str, arguments: str) -> dict[str, Any] | str:
        """The arguments of a call, or what is wrong with them."""
        try:
            given = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return "the arguments are not valid JSON"
        if not isinstance(given, dict):
            return "the arguments must be a JSON object"
        schema = _BUILTIN[name].spec.parameters
        for key in schema["required"]:
            if key not in given:
                return f"the argument {key!r} is missing"
        for key, value in given.items():
            wanted = schema["properties"].get(key)
            if wanted is None:
                return f"there is no argument {key[:100]!r}"
            if wanted["type"] == "string" and not isinstance(value, str):
                return f"the argument {key!r} must be a string"
            if "enum" in wanted and value not in wanted["enum"]:
                return f"the argument {key!r} must be one of {', '.join(wanted['enum'])}"
            if wanted["type"] == "integer" and not (
                type(value) is int and wanted["minimum"] <= value <= wanted["maximum"]
            ):
                return f"the argument {key!r} must be from {wanted['minimum']} to {wanted['maximum']}"
        return given

    async def use(self, task_id: str, name: str, given: dict[str, Any]) -> Outcome:
        """Uses a tool with `checked` arguments. Raises nothing but cancellation."""
        workspace = Workspace(self._brain.path.parent, task_id)
        try:
            if name == "bash":
                return await self._bash(workspace, given["command"])
            if name == "read_file":
                return Outcome(await asyncio.to_thread(workspace.read, given["path"]))
            if name == "write_file":
                written = await asyncio.to_thread(workspace.write, given["path"], given["content"])
                return Outcome(f"{written} bytes written")
            return await self._search(given)
        except WorkspaceError as error:
            return Outcome("", str(error))
        except EngineError as error:
            return Outcome("", error.message)
        except OSError as error:
            return Outcome("", f"the tool failed: {error.strerror}")

    async def _bash(self, workspace: Workspace, command: str) -> Outcome:
        if "\0" in command or len(command.encode("utf-8", "replace")) > MAX_COMMAND_BYTES:
            return Outcome("", f"the command must be at most {MAX_COMMAND_BYTES} bytes, none of them zero")
        result = await self._sandbox.run(command, workspace.make(), self._bash_timeout_s)
        if result.ended is not None:
            return Outcome(result.output, f"the command was ended: {result.ended}")
        return Outcome(result.output, None if result.exit_code == 0 else f"exit code {result.exit_code}")

    async def _search(self, given: dict[str, Any]) -> Outcome:
        stores = [given["store"]] if "store" in given else list(memory.STORES)
        limit = given.get("limit", 10)
        found = {
            store: await self._brain.read(lambda db, store=store: memory.search(db, store, given["query"], limit))  # type: ignore[misc]
            for store in stores
        }
        return Outcome(json.dumps(found, ensure_ascii=False))
