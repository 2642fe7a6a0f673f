"""The catalog: agents, skills, tools and `core_soul.json` from `CATALOG_DIR`, read once at boot and never written.

    agents/NAME.json    name, description, prompt; optional: skills, tools (names of files of this catalog)
    skills/NAME.json    name, description, instructions
    tools/NAME.json     name, description; optional: requires_permission
    core_soul.json      identity, values, patterns

Every part may be missing; what is there must be right. Fields that this engine does not know are left alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import CatalogError

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

# Field → type, and whether it must be there. A list is a list of strings.
_Fields = dict[str, tuple[type, bool]]
_AGENT: _Fields = {
    "name": (str, True),
    "description": (str, True),
    "prompt": (str, True),
    "skills": (list, False),
    "tools": (list, False),
}
_SKILL: _Fields = {"name": (str, True), "description": (str, True), "instructions": (str, True)}
_TOOL: _Fields = {"name": (str, True), "description": (str, True), "requires_permission": (bool, False)}
_SOUL: _Fields = {"identity": (str, True), "values": (list, True), "patterns": (list, True)}
_CALLED: dict[type, str] = {str: "a non-empty string", list: "a list of strings", bool: "true or false"}

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Catalog:
    agents: dict[str, Entry] = field(default_factory=dict)
    skills: dict[str, Entry] = field(default_factory=dict)
    tools: dict[str, Entry] = field(default_factory=dict)
    soul: Entry | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.agents or self.skills or self.tools or self.soul)


def load(directory: Path) -> Catalog:
    """Reads and checks a catalog. Raises CatalogError with the file, and the line where the JSON breaks."""
    try:
        catalog = Catalog(
            agents=_entries(directory / "agents", _AGENT),
            skills=_entries(directory / "skills", _SKILL),
            tools=_entries(directory / "tools", _TOOL),
            soul=_soul(directory / "core_soul.json"),
        )
    except OSError as exc:
        raise CatalogError(f"{exc.filename}: cannot be read ({exc.strerror})") from None
    for name, agent in catalog.agents.items():
        for kind, known in (("skills", catalog.skills), ("tools", catalog.tools)):
            for missing in (wanted for wanted in agent.get(kind, []) if wanted not in known):
                path = directory / "agents" / f"{name}.json"
                raise CatalogError(f"{path}: '{kind}' names {missing!r}, which this catalog does not have")
    return catalog


def _entries(directory: Path, fields: _Fields) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    if not directory.exists():
        return entries
    for path in sorted(directory.iterdir()):
        if path.suffix != ".json" or path.name.startswith("."):
            continue
        entry = _read(path, fields)
        name = entry["name"]
        if name != path.stem or not _NAME.fullmatch(name):
            raise CatalogError(f"{path}: 'name' is {name!r}; it must be the file's name without .json")
        entries[name] = entry
    return entries


def _soul(path: Path) -> Entry | None:
    return _read(path, _SOUL) if path.exists() else None


def _read(path: Path, fields: _Fields) -> Entry:
    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise CatalogError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise CatalogError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as exc:
        raise CatalogError(f"{path}:{exc.lineno}: not JSON ({exc.msg})") from None
    except RecursionError:
        raise CatalogError(f"{path}: nested too deeply") from None
    if not isinstance(entry, dict):
        raise CatalogError(f"{path}: must be a JSON object")
    for name, (kind, required) in fields.items():
        if name not in entry and not required:
            continue
        if not _is(kind, entry.get(name)):
            raise CatalogError(f"{path}: '{name}' must be {_CALLED[kind]}")
    return entry


def _is(kind: type, value: object) -> bool:
    if kind is str:
        return isinstance(value, str) and value.strip() != ""
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
