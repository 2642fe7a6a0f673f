"""Write the blocking client from the one on asyncio: `python scripts/client_twins.py [--check]`.

Names are replaced word by word, `async` and `await` fall away, and the result is formatted by ruff. `--check` writes
nothing and fails when a twin is not what it should be.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[1] / "orchestrator" / "client"
TWINS = {"_async.py": "_sync.py", "_async_engine.py": "_sync_engine.py"}

WORDS = {
    "AsyncAdmission": "Admission",
    "AsyncClient": "Client",
    "AsyncEngine": "Engine",
    "AsyncIterator": "Iterator",
    "AsyncOrchestratorClient": "OrchestratorClient",
    "AsyncRetrying": "Retrying",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "aclose": "close",
    "aiter_lines": "iter_lines",
    "aiter_sse": "iter_sse",
    "aread": "read",
    "asynccontextmanager": "contextmanager",
    "asyncio": "time",
    "tasks": "threads",
}
SENTENCES = {
    "The client on asyncio. `_sync.py` is generated from this file by `make client`; edit only here.": (
        "The blocking client. Generated from `_async.py` by `make client`; edit only there."
    ),
    "An admitted engine, and a turn with it. `_sync_engine.py` is generated from this file by `make client`.": (
        "An admitted engine, and a turn with it. Generated from `_async_engine.py` by `make client`; edit only there."
    ),
}


def twin(source: str) -> str:
    for sentence, replacement in SENTENCES.items():
        source = source.replace(sentence, replacement)
    source = re.sub(r"\b(async|await) ", "", source)
    source = source.replace("orchestrator.client._async", "orchestrator.client._sync")
    source = re.sub(r"\w+", lambda word: WORDS.get(word[0], word[0]), source)
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        done = subprocess.run(  # noqa: S603 - ruff, on our own source
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(CLIENT / "_sync.py"), "-"],
            input=source,
            capture_output=True,
            text=True,
            check=True,
        )
        source = done.stdout
    return source


def main() -> int:
    stale = []
    for name, twin_name in TWINS.items():
        wanted = twin((CLIENT / name).read_text(encoding="utf-8"))
        path = CLIENT / twin_name
        if not path.exists() or path.read_text(encoding="utf-8") != wanted:
            stale.append(twin_name)
            if "--check" not in sys.argv:
                path.write_text(wanted, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"{', '.join(stale)}: not what the asyncio twin says; run 'make client'.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
