"""The commands that talk to an orchestrator, against a real one with real engines."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import stat
import sys
from typing import TYPE_CHECKING

import pytest

from tests.integration.commands import PATIENCE_S, Commands, line_of
from tests.integration.conftest import ADMIN_KEY, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.conftest import Api, Served

pytestmark = pytest.mark.timeout(600)  # many processes, each of which may wait for its turn


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    """The reference engine, which streams turns."""
    return variables | {"ORCH_SUBPROCESS_COMMAND": f"{shlex.quote(sys.executable)} -P -m engine"}


@pytest.fixture
def run(api: Api, tmp_path: Path) -> Commands:
    """A product's command line."""
    key = str(api.client.headers["x-platform-key"])
    return Commands({"ORCHESTRATOR_URL": api.url, "ORCHESTRATOR_PLATFORM_KEY": key}, tmp_path)


@pytest.fixture
def admin_run(served: Served, tmp_path: Path) -> Commands:
    return Commands({"ORCHESTRATOR_URL": served.url, "ORCHESTRATOR_ADMIN_KEY": ADMIN_KEY}, tmp_path)


# --- engines ----------------------------------------------------------------------------------------------------


async def test_life_of_an_engine_for_scripts(run: Commands) -> None:
    made = (await run("engines", "provision", "ann", "--json")).json
    assert made["status"] == "running"
    assert made["api_key"].startswith("sk-sept-")
    admitted = (await run("engines", "admit", "ann", "--json")).json
    assert admitted["engine"]["api_key"] == made["api_key"]
    assert (await run("engines", "sleep", "ann", "--json")).json["status"] == "sleeping"
    assert (await run("engines", "wake", "ann", "--json")).json["admitted"] is True
    assert (await run("engines", "stop", "ann", "--json")).json["status"] == "stopped"
    assert (await run("engines", "wait", "ann", "stopped", "--json")).json["engine_id"] == made["engine_id"]
    assert (await run("engines", "start", "ann", "--json")).json["status"] == "running"
    shown = (await run("engines", "show", "ann", "--json")).json
    assert "api_key" not in shown
    assert shown["user_id"] == "ann"
    assert (await run("engines", "show", "ann", "--json", "--show-key")).json["api_key"] == made["api_key"]
    listed = (await run("engines", "list", "--json", "--status", "running")).json
    assert (listed["total"], listed["engines"][0]["engine_id"]) == (1, made["engine_id"])
    assert (await run("engines", "destroy", "ann", "--yes", "--json")).json["status"] == "destroyed"


async def test_life_of_an_engine_for_people(run: Commands) -> None:
    made = await run("engines", "provision", "ann")
    assert made.out.startswith("✓ ann is running at http://127.0.0.1:")
    assert "sk-sept-… (--show-key shows it)" in made.out
    rotated = await run("engines", "rotate-key", "ann", "--overlap", "0", "--show-key")
    assert "the old one is dead" in rotated.out
    key = rotated.out.split()[-1]
    assert key.startswith("sk-sept-")
    assert len(key) > 20
    kept, shown, listed = await asyncio.gather(
        run("engines", "keep-alive", "ann", "60"), run("engines", "show", "ann"), run("engines", "list")
    )
    assert "stays awake until" in kept.out
    assert "sk-sept-…" in shown.out
    assert key not in shown.out + listed.out
    assert listed.out.splitlines()[0].split() == ["user", "state", "url", "image", "created", "healthy"]
    assert listed.out.splitlines()[1].split()[:2] == ["ann", "running"]
    refused = await run("engines", "destroy", "ann")
    assert (refused.code, refused.out) == (2, "")
    assert "--yes" in refused.err
    async with run.terminal("engines", "destroy", "ann") as terminal:
        await terminal.shows("nothing brings it back")
        terminal.type("n\n")
        assert await terminal.ends() == 1
    async with run.terminal("engines", "destroy", "ann") as terminal:
        await terminal.shows("nothing brings it back")
        terminal.type("y\n")
        assert await terminal.ends() == 0
        assert "is destroyed" in terminal.text
    assert (await run("engines", "list")).err == "No engines.\n"


async def test_exit_codes_and_one_line(run: Commands, served: Served) -> None:
    await run("engines", "provision", "ann")
    nowhere: dict[str, str | None] = {"ORCHESTRATOR_URL": f"http://127.0.0.1:{free_port()}"}
    cases: list[tuple[int, list[str], dict[str, str | None]]] = [
        (3, ["engines", "show", "bob"], {}),
        (4, ["engines", "provision", "ann"], {}),
        (4, ["engines", "start", "ann"], {}),
        (4, ["engines", "admit", "bob"], {}),
        (5, ["engines", "list"], {"ORCHESTRATOR_PLATFORM_KEY": "pk-sept-wrong"}),
        (5, ["products", "list"], {}),
        (2, ["engines", "list", "--status", "odd"], {}),
        (8, ["engines", "wait", "ann", "stopped", "--timeout", "0"], {}),
        (7, ["engines", "list"], nowhere),
        (1, ["engines", "list", "--profile", "none"], {}),
        (1, ["engines", "list"], {"ORCHESTRATOR_URL": None, "ORCHESTRATOR_PLATFORM_KEY": None}),
        (1, ["engines", "provision", "bob", "--image", "no-such-engine"], {}),
    ]
    ends = [await run(*arguments, **changes) for _, arguments, changes in cases]
    for (code, arguments, _), ended in zip(cases, ends, strict=True):
        if code == 1 and "--image" in arguments:
            assert ended.code == 5, "an image that the policy does not allow"
            continue
        assert ended.code == code, (arguments, ended)
        assert ended.out == ""
        assert len(ended.err.splitlines()) == 1, ended.err
        assert ended.err.startswith("error: ")
    told = json.loads((await run("engines", "show", "bob", "--json")).err)
    assert told["error"]["code"] == "ENGINE_NOT_FOUND"
    assert (await run("engines", "show")).code == 2
    assert (await run("nonsense")).code == 2


async def test_a_missing_scope_and_a_limit(run: Commands, admin_run: Commands, api: Api) -> None:
    product = str(api.headers["product_id"])
    issued = (await admin_run("keys", "issue", product, "--scope", "read", "--json")).json
    reader = {"ORCHESTRATOR_PLATFORM_KEY": issued["platform_api_key"]}
    refused, limited = await asyncio.gather(
        run("engines", "provision", "ann", **reader),
        admin_run("products", "policy", "acme", "--policy", '{"max_engines": 0}'),
    )
    assert (refused.code, limited.code) == (5, 0)
    assert "manage" in refused.err
    full = await run("engines", "provision", "ann")
    assert full.code == 6
    assert "max_engines" in full.err


# --- the terminal -----------------------------------------------------------------------------------------------


async def test_progress_shows_what_it_waits_for(run: Commands) -> None:
    await run("engines", "provision", "ann")
    async with run.terminal("engines", "wait", "ann", "stopped", "--timeout", "300") as terminal:
        await terminal.shows("Waiting for ann to be stopped …")
        await run("engines", "stop", "ann")
        assert await terminal.ends() == 0
        assert "ann is stopped" in terminal.text
        assert "\x1b[" in terminal.drawn


async def test_no_colour(run: Commands) -> None:
    await run("engines", "provision", "ann")
    for arguments in (["engines", "show", "ann"], ["status"], ["engines", "show", "bob"]):
        async with run.terminal(*arguments, NO_COLOR="1") as terminal:
            await terminal.ends()
            assert "\x1b[1m" not in terminal.drawn
            assert "\x1b[3" not in terminal.drawn
    piped = await run("engines", "show", "ann")
    assert "\x1b" not in piped.out + piped.err


async def test_status_and_watch(run: Commands) -> None:
    await run("engines", "provision", "ann")
    found = (await run("status", "--json")).json
    assert found["fleet"]["by_status"]["running"] == 1
    assert found["orchestrator"]["status"] == "ok"
    assert found["metrics"]["total_provisions"] == 1
    assert "running" in (await run("status")).out
    async with run.following("status", "--watch", "--interval", "0.2", "--json") as process:
        for _ in range(3):
            assert json.loads(await line_of(process))["fleet"]["total"] == 1
    async with run.terminal("status", "--watch", "--interval", "0.2") as terminal:
        await terminal.shows("provision")
        await run("engines", "sleep", "ann")
        await terminal.shows("sleep ", 1)
        terminal.type("\x03")
        assert await terminal.ends() == 130
    async with run.terminal("status", "--watch", "--interval", "0.2") as terminal:
        await terminal.shows("provision")
        ended = asyncio.ensure_future(terminal.ends())
        while not ended.done():  # an impatient person
            terminal.type("\x03")
            await asyncio.wait({ended}, timeout=0.005)
        assert await ended in (130, -signal.SIGINT)
        assert "Traceback" not in terminal.drawn


async def test_audit(run: Commands) -> None:
    await run("engines", "provision", "ann")
    await run("engines", "provision", "bob")

    async with run.following("audit", "tail", "--user", "ann", "--json") as process:
        assert json.loads(await line_of(process))["action"] == "provision"
        await run("engines", "sleep", "ann")
        assert json.loads(await line_of(process))["action"] == "sleep"
    by_user, by_action, last, none, table = await asyncio.gather(
        run("audit", "--json", "--user", "ann"),
        run("audit", "--json", "--action", "provision", "--since", "2h"),
        run("audit", "--json", "--limit", "1"),
        run("audit", "--json", "--until", "2020-01-01"),
        run("audit"),
    )
    assert [entry["action"] for entry in by_user.json["entries"]] == ["provision", "sleep"]
    assert [entry["user_id"] for entry in by_action.json["entries"]] == ["ann", "bob"]
    assert [entry["action"] for entry in last.json["entries"]] == ["sleep"]
    assert none.json["entries"] == []
    assert table.out.splitlines()[0].split()[:3] == ["time", "action", "user"]
    assert (await run("audit", "--since", "yesterday")).code == 2


async def test_audit_verify(run: Commands, served: Served) -> None:
    await run("engines", "provision", "ann")
    verified = await run("audit", "verify", "--json", **served.deployment.variables)
    assert all(chain["problem"] is None for chain in verified.json["chains"])


async def test_chat(run: Commands) -> None:
    once = await run("chat", "ann", "-m", "Hello")
    assert "turn 1 of this task. You said: Hello" in once.out
    piped = await run("chat", "ann", given="Second\n\nThird\n/exit\nNever said\n")
    assert "turn 2 of this task. You said: Second" in piped.out
    assert "turn 3 of this task. You said: Third" in piped.out
    assert "Never" not in piped.out
    events = await run("chat", "ann", "-m", "Fourth", "--json")
    kinds = [json.loads(line)["event"] for line in events.out.splitlines()]
    assert kinds[0] == "thread_lifecycle"
    assert "text_delta" in kinds
    async with run.terminal("chat", "ann") as terminal:
        await terminal.shows("Ctrl-D or /exit ends")
        await terminal.shows("›")
        terminal.type("Fifth\n")
        await terminal.shows("turn 5 of this task. You said: Fifth")
        await terminal.shows("›", 2)
        terminal.type("/slow 300\n")
        await terminal.shows("A slow turn of 300 s")
        terminal.type("\x03")
        await terminal.shows("broken off")
        await terminal.shows("›", 3)
        # Pressed again when it came before the line editor had the terminal, which forgets it.
        ended = asyncio.ensure_future(terminal.ends())
        while not ended.done():
            terminal.type("\x04")
            await asyncio.wait({ended}, timeout=1)
        assert await ended == 0
    await run("engines", "destroy", "ann", "--yes")


async def test_chat_with_a_stopped_engine(run: Commands) -> None:
    await run("engines", "provision", "ann")
    await run("engines", "stop", "ann")
    refused = await run("chat", "ann", "-m", "Hello")
    assert refused.code == 4
    assert "orchestrator engines start ann" in refused.err


# --- administration ---------------------------------------------------------------------------------------------


async def test_products_and_keys(admin_run: Commands) -> None:
    run = admin_run
    made = (
        await run("products", "register", "acme", "--name", "Acme", "--policy", '{"max_engines": 3}', "--json")
    ).json
    listed = (await run("products", "list", "--json")).json["products"]
    assert [(one["slug"], one["policy"], one["engines"]) for one in listed] == [("acme", {"max_engines": 3}, 0)]
    assert (await run("products", "register", "acme")).code == 4
    changed = await run("products", "policy", "acme", "--policy", '{"max_engines": 5}', "--json")
    assert changed.json == {"policy": {"max_engines": 5}}
    assert "max_engines" in (await run("products", "policy", made["product_id"])).out
    assert (await run("products", "policy", "acme", "--policy", "{")).code == 2
    issued = (await run("keys", "issue", "acme", "--scope", "admit", "--expires", "30d", "--json")).json
    assert issued["scopes"] == ["admit"]
    keys = (await run("keys", "list", "acme", "--json")).json["keys"]
    assert {tuple(key["scopes"]) for key in keys} == {("manage",), ("admit",)}
    assert (await run("keys", "revoke", "acme", issued["key_id"], "--yes")).code == 0
    assert (await run("keys", "revoke", "acme", issued["key_id"], "--yes")).code == 3
    rotated = (await run("keys", "rotate", "acme", "--overlap", "0", "--json")).json
    assert rotated["platform_api_key"] != made["platform_api_key"]
    assert (await run("keys", "rewrap", "--json")).json["remaining"] == 0
    assert (await run("products", "delete", "nobody", "--yes")).code == 3


async def test_the_admin_key_acts_as_a_product(admin_run: Commands) -> None:
    run = admin_run
    await run("products", "register", "acme")
    unnamed = await run("engines", "provision", "ann")
    assert (unnamed.code, "--product" in unnamed.err) == (2, True)
    made = (await run("engines", "provision", "ann", "--product", "acme", "--json")).json
    assert "api_key" not in made
    everywhere = (await run("engines", "list", "--all-products", "--json")).json
    assert everywhere["engines"][0]["product_id"]
    assert (await run("engines", "list", "--product", "acme", "--json")).json["total"] == 1
    assert (await run("audit", "--all-products", "--json", "--user", "ann")).json["entries"]
    refused = await run("products", "delete", "acme", "--yes")
    assert refused.code == 4
    assert (await run("products", "delete", "acme", "--force", "--yes")).code == 0
    async with asyncio.timeout(PATIENCE_S):  # it may say "deleting", and go on
        while (await run("products", "list", "--json")).json["products"]:
            pass


# --- this command -----------------------------------------------------------------------------------------------


async def test_profiles(api: Api, tmp_path: Path) -> None:
    key = str(api.client.headers["x-platform-key"])
    run = Commands({}, tmp_path)
    path = tmp_path / "config" / "engine-orchestrator" / "profiles.json"
    added = await run("profiles", "add", "here", "--url", api.url, "--platform-key-file", "-", given=f"{key}\n")
    assert added.code == 0, added
    assert key not in added.out + added.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (await run("engines", "list", "--json")).json["total"] == 0
    async with run.terminal("profiles", "add", "other", "--url", "http://127.0.0.1:1") as terminal:
        await terminal.shows("Platform key")
        await terminal.hides()
        terminal.type("pk-sept-other\n")
        await terminal.shows("Admin key")
        await terminal.hides()
        terminal.type("\n")
        assert await terminal.ends() == 0
        assert "pk-sept-other" not in terminal.text
    listed = (await run("profiles", "list", "--json")).json["profiles"]
    assert [(one["name"], one["current"]) for one in listed] == [("here", False), ("other", True)]
    assert key not in json.dumps(listed)
    assert (await run("profiles", "use", "here")).code == 0
    assert (await run("engines", "list", "--json")).json["total"] == 0
    assert (await run("profiles", "remove", "other")).code == 0
    path.chmod(0o644)
    refused = await run("engines", "list")
    assert refused.code == 1
    assert "chmod 600" in refused.err
    assert len(refused.err.splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
async def test_completion(tmp_path: Path, shell: str) -> None:
    ended = await Commands({}, tmp_path)("completion", shell)
    assert ended.code == 0
    assert "_ORCHESTRATOR_COMPLETE" in ended.out


async def test_completion_of_user_ids(run: Commands) -> None:
    await asyncio.gather(run("engines", "provision", "ann"), run("engines", "provision", "bob"))

    async def completed(words: str, **changes: str | None) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        asked = {"_ORCHESTRATOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'orchestrator'; from orchestrator.cli import main; main()",
            env=run.environment(**asked, **changes),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        return out.decode().split()

    async with asyncio.timeout(PATIENCE_S):  # it gives up early, so that a shell never hangs
        while await completed("orchestrator engines show ") != ["ann", "bob"]:
            pass
        while await completed("orchestrator engines show b") != ["bob"]:
            pass
    assert "destroyed" in await completed("orchestrator engines wait ann d")
    assert await completed("orchestrator engines show ", ORCHESTRATOR_PLATFORM_KEY="wrong") == []
