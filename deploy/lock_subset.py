"""Print the part of requirements.lock that some packages need, with versions and hashes as they are.

    python deploy/lock_subset.py                 what the orchestrator needs (project.dependencies)
    python deploy/lock_subset.py uvicorn uvloop  what these need

Needs nothing but Python: it runs while an image is built, before anything is installed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read(lock: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Each package's lines, and who needs it (the `# via` comments)."""
    blocks: dict[str, str] = {}
    parents: dict[str, set[str]] = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", lock):
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==", block)
        if match is None:
            continue
        name = canonical(match[1])
        lines = block.splitlines()
        # The same package may stand there once for each platform.
        kept = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        blocks[name] = f"{blocks[name]}\n{kept}" if name in blocks else kept
        comments = " ".join(line.strip().lstrip("# ") for line in lines if line.lstrip().startswith("#"))
        parents.setdefault(name, set()).update(canonical(word) for word in re.findall(r"[A-Za-z0-9._-]+", comments))
    return blocks, parents


def main() -> int:
    roots = sys.argv[1:]
    if not roots:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        roots = [re.split(r"[\[<>=!~; ]", dependency, maxsplit=1)[0] for dependency in project["dependencies"]]
    blocks, parents = read((ROOT / "requirements.lock").read_text())
    wanted = {canonical(root) for root in roots}
    if missing := wanted - blocks.keys():
        print(f"not in requirements.lock: {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    while more := {name for name in blocks if name not in wanted and parents[name] & wanted}:
        wanted |= more
    print("\n".join(blocks[name] for name in sorted(wanted)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
