"""Makes docs/configuration.md from the settings and docs/api.md from the OpenAPI document.

make docs                                    write them
python scripts/reference_docs.py --check     exit code 1 when they are not what they would be
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet

from orchestrator.api import create_app
from orchestrator.control_plane import ControlPlane
from orchestrator.settings import Settings, load_settings

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTICE = "<!-- Made by `make docs`; do not edit. -->\n\n"

# Heading → beginnings of names, in this order; a name belongs to the first that fits.
GROUPS: dict[str, tuple[str, ...]] = {
    "Required": ("database_url", "master_key", "admin_key"),
    "Database": ("database_", "auto_migrate"),
    "Serving": ("host", "port", "workers", "log_", "deployment_id"),
    "Engines": ("engine_backend", "engine_image", "engine_env", "catalog_", "data_root", "subprocess_"),
    "Where engines are reached": ("engine_network", "engine_container", "engine_url", "engine_host", "engine_publish",
                                  "port_"),
    "Limits of one engine": ("engine_",),
    "Time and concurrency": ("boot_", "pull_", "queue_", "lease_", "orphan_", "start_concurrency"),
    "Health and restarts": ("health_", "restart_"),
    "Sleep": ("idle_",),
}  # fmt: skip
EXACT = {"host", "port"}
# What the code computes, said in words.
COMPUTED = {
    "data_root": "the user's state directory",
    "start_concurrency": "number of cores",
    "log_format": "`json`, `console` on a terminal",
    "subprocess_command": "this Python, `-m engine`",
}


def configuration() -> str:
    lines = [
        NOTICE + "# Configuration\n",
        "Every variable is read from the environment or from a file `.env` in the working directory. `orchestrator "
        "config` prints what is in force, secrets masked; a bad value stops the start with one line that names the "
        "variable. Names ending in `_S` are seconds. `orchestrator dev` needs none of them.",
    ]
    left = list(Settings.model_fields)
    groups = {**GROUPS, "Other": ("",)}
    members: dict[str, list[str]] = {heading: [] for heading in groups}
    for name in left:
        heading = next(
            heading
            for heading, beginnings in groups.items()
            if any(name == part if part in EXACT else name.startswith(part) for part in beginnings)
        )
        members[heading].append(name)
    for heading, names in members.items():
        if not names:
            continue
        lines.append(f"\n## {heading}\n\n| variable | default | meaning |\n|---|---|---|")
        lines.extend(
            f"| `ORCH_{name.upper()}` | {_default(name)} | {_cell(Settings.model_fields[name].description or '')} |"
            for name in names
        )
    return "\n".join(lines) + "\n"


def _default(name: str) -> str:
    field = Settings.model_fields[name]
    if name in COMPUTED:
        return COMPUTED[name]
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value in (None, ()):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`"


def api() -> str:
    settings = load_settings(
        _env_file=None,
        database_url="postgresql://unused/unused",
        master_key=Fernet.generate_key().decode(),
        admin_key="only-to-make-the-docs",
    )
    document = create_app(ControlPlane(settings)).openapi()
    schemas = document["components"]["schemas"]
    lines = [
        NOTICE + "# API\n",
        "The same document, to try out, is served at `/docs` and as JSON at `/openapi.json`.\n",
        "A product calls with `X-Platform-Key`. An operator calls with `X-Admin-Key`, and with `X-Product-Id` beside "
        'it as that product. An error is `{"error": {"code", "message", "details"?}}`; compare the code. 429 '
        "and 503 carry `Retry-After` in seconds. Every call may also answer `PAYLOAD_TOO_LARGE` (413), "
        "`DATABASE_UNAVAILABLE` (503) and `INTERNAL_ERROR` (500).\n",
    ]
    by_tag: dict[str, list[str]] = {tag["name"]: [] for tag in document["tags"]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append(_operation(method, path, operation, schemas))
    about = {tag["name"]: tag.get("description", "") for tag in document["tags"]}
    for tag, sections in by_tag.items():
        if sections:
            lines.append(f"\n## {tag.capitalize()}\n\n{about.get(tag, '')}\n")
            lines.extend(sections)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


EVERYWHERE = {"PAYLOAD_TOO_LARGE", "DATABASE_UNAVAILABLE", "INTERNAL_ERROR"}


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    parts = [f"\n### {method.upper()} `{path}`\n", f"{operation['summary']}. {operation.get('description', '')}\n"]
    keys = [name for choice in operation["security"] for name in choice]
    parts.append("Key: " + (" or ".join(keys) if keys else "none") + ".\n")
    given = [one for one in operation.get("parameters", []) if one["name"] != "X-Product-Id"]
    if given:
        parts.append("\n| parameter | in | |\n|---|---|---|")
        parts.extend(
            f"| `{one['name']}` | {one['in']} | {_cell(_bounds(one['schema']) + ' ' + one.get('description', ''))} |"
            for one in given
        )
    if (body := operation.get("requestBody")) is not None:
        optional = "" if body["required"] else " (optional)"
        parts.append(
            f"\nBody{optional}:\n\n{_fields(body['content']['application/json']['schema'], schemas, given=True)}"
        )
    for status, answer in operation["responses"].items():
        content = answer.get("content", {})
        if not status.startswith("2"):
            continue
        for kind, value in content.items():
            named = "" if kind == "application/json" else f" (`{kind}`)"
            table = _fields(value.get("schema", {}), schemas, given=False)
            parts.append(f"\nAnswer {status}{named}{':' if table else '.'}\n\n{table}")
    codes = [
        f"`{code}` {status}"
        for status, answer in operation["responses"].items()
        for code in answer.get("content", {}).get("application/json", {}).get("examples", {})
        if status >= "400" and code not in EVERYWHERE
    ]
    if codes:
        parts.append(f"\nErrors: {', '.join(codes)}.\n")
    return "\n".join(parts)


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        found: dict[str, Any] = schemas[schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def _fields(schema: dict[str, Any], schemas: dict[str, Any], *, given: bool) -> str:
    schema = _resolved(schema, schemas)
    rows = _rows(schema, schemas, "", given)
    return "| field | type | |\n|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""


def _rows(schema: dict[str, Any], schemas: dict[str, Any], prefix: str, given: bool) -> list[str]:
    rows = []
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        inner, many = _inner(field, schemas)
        said = [field.get("description", "")]
        if given:
            said.insert(0, "required." if name in required else _default_of(field))
        rows.append(f"| `{prefix}{name}` | {_cell(_type(field, schemas))} | {_cell(' '.join(filter(None, said)))} |")
        if inner is not None and inner.get("properties"):
            rows.extend(_rows(inner, schemas, f"{prefix}{name}{'[]' if many else ''}.", given))
    return rows


def _inner(field: dict[str, Any], schemas: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """The object within a field, and whether there are many."""
    for option in field.get("anyOf", [field]):
        resolved = _resolved(option, schemas)
        if resolved.get("type") == "array":
            return _resolved(resolved.get("items", {}), schemas), True
        if resolved.get("type") == "object":
            return resolved, False
    return None, False


def _type(field: dict[str, Any], schemas: dict[str, Any]) -> str:
    names = []
    for option in field.get("anyOf", [field]):
        resolved = _resolved(option, schemas)
        kind = resolved.get("format") or resolved.get("type", "any")
        if "enum" in resolved:
            kind = ", ".join(f"`{value}`" for value in resolved["enum"])
        elif "const" in resolved:
            kind = f"`{resolved['const']}`"
        elif kind == "array":
            kind = f"list of {_type(resolved.get('items', {}), schemas)}"
        names.append(kind)
    return " or ".join(names)


def _default_of(field: dict[str, Any]) -> str:
    default = field.get("default")
    return "" if default is None else f"Default `{str(default).lower() if isinstance(default, bool) else default}`."


def _bounds(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema["enum"]) + "."
    said = schema.get("type", "")
    if "minimum" in schema and "maximum" in schema:
        said += f" from {schema['minimum']} to {schema['maximum']}"
    if "default" in schema:
        said += f", default `{schema['default']}`"
    return f"{said}." if said else ""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def main() -> int:
    made = {DOCS / "configuration.md": configuration(), DOCS / "api.md": api()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is not up to date; run 'make docs'", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(made[path], encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
