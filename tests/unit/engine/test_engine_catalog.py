from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import catalog
from engine.errors import CatalogError

SAMPLE = Path(catalog.__file__).parent / "catalog"

AGENT = {"name": "a", "description": "d", "prompt": "p"}
SKILL = {"name": "s", "description": "d", "instructions": "i"}
TOOL = {"name": "t", "description": "d"}
SOUL: dict[str, Any] = {"identity": "i", "values": [], "patterns": ["p"]}


def put(root: Path, name: str, content: object) -> Path:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_bundled_sample_is_valid() -> None:
    loaded = catalog.load(SAMPLE)
    assert set(loaded.agents) == {"researcher", "coder", "analyst", "writer"}
    assert len(loaded.skills) >= 2
    assert loaded.soul is not None


def test_an_empty_directory_is_an_empty_catalog(tmp_path: Path) -> None:
    assert catalog.load(tmp_path).is_empty


def test_a_whole_catalog(tmp_path: Path) -> None:
    put(tmp_path, "agents/a.json", {**AGENT, "skills": ["s"], "tools": ["t"], "of a later engine": 1})
    put(tmp_path, "skills/s.json", SKILL)
    put(tmp_path, "tools/t.json", {**TOOL, "requires_permission": True})
    put(tmp_path, "core_soul.json", SOUL)
    put(tmp_path, "skills/README.md", "not a skill")
    put(tmp_path, "skills/.hidden.json", "not a skill")
    loaded = catalog.load(tmp_path)
    assert (list(loaded.agents), list(loaded.skills), list(loaded.tools)) == (["a"], ["s"], ["t"])
    assert loaded.soul == SOUL


def test_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    put(tmp_path, "skills/s.json", b"\xef\xbb\xbf" + json.dumps(SKILL).encode())
    assert "s" in catalog.load(tmp_path).skills


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("agents/a.json", '{\n"name": "a",\n"prompt" "p"}', r"a\.json:3: not JSON"),
        ("agents/a.json", '{\n"name": "a",\n"description": 5, "prompt": "p"}', r"a\.json:3: 'description' must"),
        ("agents/a.json", '{\n\n"name": "a"}', r"a\.json:1: 'description' must"),
        (
            "agents/a.json",
            '{"name": "a", "description": "d", "prompt": "p",\n"skills" : [\n"s", "\\"",\n 3]}',
            r"a\.json:4: 'skills' must",
        ),
        ("agents/a.json", '{"name": "a", "description": "d", "prompt": "p",\n"tools":\n["x"]}', r"a\.json:3: 'tools'"),
        ("agents/b.json", '\n{"description": "d",\n"prompt": "p", "name": "a"}', r"b\.json:3: 'name' is 'a'"),
        ("agents/a.json", b'{\n"name": "\xff"}', r"a\.json:2: not UTF-8"),
        ("agents/a.json", "", r"a\.json:1: not JSON"),
        ("agents/a.json", b"\xff", "not UTF-8"),
        ("agents/a.json", "[" * 100_000, "nested too deeply"),
        ("agents/a.json", " " * (catalog.MAX_FILE_BYTES + 1), "larger than"),
        ("agents/a.json", [AGENT], "must be a JSON object"),
        ("agents/a.json", {**AGENT, "prompt": " "}, "'prompt' must be a non-empty string"),
        ("agents/a.json", {"name": "a"}, "'description' must be a non-empty string"),
        ("agents/a.json", {**AGENT, "skills": "s"}, "'skills' must be a list of strings"),
        ("agents/a.json", {**AGENT, "tools": [1]}, "'tools' must be a list of strings"),
        ("agents/a.json", {**AGENT, "skills": ["nope"]}, "'skills' names 'nope'"),
        ("agents/a.json", {**AGENT, "tools": ["nope"]}, "'tools' names 'nope'"),
        ("agents/b.json", AGENT, "must be the file's name"),
        ("skills/a b.json", {**SKILL, "name": "a b"}, "must be the file's name"),
        ("tools/t.json", {**TOOL, "requires_permission": "yes"}, "'requires_permission' must be true or false"),
        ("core_soul.json", {**SOUL, "values": None}, "'values' must be a list of strings"),
        ("core_soul.json", "null", "must be a JSON object"),
        ("skills/s.json/x", "a directory in a file's place", "cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_file(tmp_path: Path, name: str, content: object, says: str) -> None:
    if name.endswith("/x"):
        (tmp_path / "skills").mkdir()
    path = put(tmp_path, name, content)
    with pytest.raises(CatalogError, match=says) as caught:
        catalog.load(tmp_path)
    assert str(path).removesuffix("/x") in str(caught.value)
    assert "\n" not in str(caught.value)
