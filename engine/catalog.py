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


@dataclass(slots=True)
class Catalog:
    agents: dict[str, Entry] = field(default_factory=dict)
    skills: dict[str, Entry] = field(default_factory=dict)
    tools: dict[str, Entry] = field(default_factory=dict)
    soul: Entry | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.agents or self.skills or self.tools or self.soul)

    def fill(self, loaded: Catalog) -> None:
        """Takes over what was loaded; whoever holds this catalog sees it from now on."""
        self.agents, self.skills, self.tools, self.soul = loaded.agents, loaded.skills, loaded.tools, loaded.soul


def is_name(text: str) -> bool:
    """Whether an agent, a skill or a tool may be called so."""
    return _NAME.fullmatch(text) is not None


def load(directory: Path) -> Catalog:
    """Reads and checks a catalog. Raises CatalogError with the file and the line of what is wrong."""
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
                line = _line(path.read_text(encoding="utf-8-sig"), kind, agent[kind].index(missing))
                raise CatalogError(f"{path}:{line}: '{kind}' names {missing!r}, which this catalog does not have")
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
            line = _line(path.read_text(encoding="utf-8-sig"), "name")
            raise CatalogError(f"{path}:{line}: 'name' is {name!r}; it must be the file's name without .json")
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
        text = raw.decode("utf-8-sig")
        entry = json.loads(text)
    except UnicodeDecodeError as exc:
        line = 1 + raw[: exc.start].count(b"\n")
        raise CatalogError(f"{path}:{line}: not UTF-8 text") from None
    except json.JSONDecodeError as exc:
        raise CatalogError(f"{path}:{exc.lineno}: not JSON ({exc.msg})") from None
    except RecursionError:
        raise CatalogError(f"{path}: nested too deeply") from None
    if not isinstance(entry, dict):
        raise CatalogError(f"{path}:1: must be a JSON object")
    for name, (kind, required) in fields.items():
        if name not in entry and not required:
            continue
        if not _is(kind, entry.get(name)):
            raise CatalogError(
                f"{path}:{_line(text, name, _wrong_item(entry.get(name)))}: '{name}' must be {_CALLED[kind]}"
            )
    return entry


def _wrong_item(value: object) -> int | None:
    if not isinstance(value, list):
        return None
    return next((index for index, item in enumerate(value) if not isinstance(item, str)), None)


_SPACE = re.compile(r"[ \t\r\n]*")


def _line(text: str, key: str, index: int | None = None) -> int:
    """The line of a key's value in the text of a JSON object, or of one item of it; that of the object without it.

    Of a key that is written twice it is the last one, which is the one that counts.
    """

    def skip(at: int) -> int:
        found = _SPACE.match(text, at)
        return at if found is None else found.end()

    decode = json.JSONDecoder().raw_decode
    place = opened = skip(0)
    at = skip(opened + 1)
    while text[at] != "}":
        name, at = decode(text, at)
        value = skip(skip(at) + 1)  # after the colon
        if name == key:
            place = value
            if index is not None:
                place = skip(value + 1)
                for _ in range(index):
                    _, end = decode(text, place)
                    place = skip(skip(end) + 1)  # after the comma
        _, at = decode(text, value)
        at = skip(at)
        if text[at] == ",":
            at = skip(at + 1)
    return 1 + text.count("\n", 0, place)


def _is(kind: type, value: object) -> bool:
    if kind is str:
        return isinstance(value, str) and value.strip() != ""
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
