"""The reference engine as it runs: real processes, real HTTP, on 127.0.0.1.

The engine is told PORT=0 and says in its log which port it got, so that no two tests can meet; where a restart on the
same port matters, the second process is given the first one's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-sept-key-of-the-engine-process-tests"
GIVE_UP_S = 60.0
"""Only for what never happens in a healthy engine."""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parse_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in filter(None, text.split("\n\n")):
        kind, data = block.split("\n")
        events.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


class EngineProcess:
    """One `python -m engine`. Its log is read as it is written; `wait_for_log` waits for a line of it."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine"],
            env={"PATH": os.environ["PATH"], **env},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self._grown = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.client = httpx.Client(timeout=GIVE_UP_S, headers={"X-Engine-Key": KEY})

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._grown:
                self.raw.append(line)
                self.lines.append(json.loads(line))
                self._grown.notify_all()
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def wait_for_log(self, message: str) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [line["extra"] for line in self.lines if line["message"] == message]

        with self._grown:
            assert self._grown.wait_for(lambda: found() or self._ended, GIVE_UP_S), f"no {message!r} in the log"
            assert found(), f"the engine ended without {message!r}: {self.raw}"
            return found()[0]

    def ready(self) -> EngineProcess:
        self.port = int(self.wait_for_log("listening")["port"])
        self.wait_for_log("ready")
        self.client.base_url = httpx.URL(f"http://127.0.0.1:{self.port}")
        return self

    def health(self) -> httpx.Response:
        return self.client.get("/health")

    def execute(self, message: str, task_id: str = "task", key: str = KEY) -> httpx.Response:
        return self.client.post(
            "/execute", json={"message": message, "task_id": task_id}, headers={"X-Engine-Key": key}
        )

    @contextlib.contextmanager
    def turn_in_flight(self, message: str, task_id: str = "task") -> Iterator[Iterator[str]]:
        """A turn whose `started` and first words have arrived; leaving the block hangs up."""
        body = {"message": message, "task_id": task_id}
        with self.client.stream("POST", "/execute", json=body) as response:
            assert response.status_code == 200, response.read()
            chunks = response.iter_text()
            seen = ""
            while "text_delta" not in seen:
                seen += next(chunks)
            yield chunks

    def history(self, task_id: str = "task") -> dict[str, Any]:
        history: dict[str, Any] = self.client.get(f"/history/{task_id}").raise_for_status().json()
        return history

    def rotate(self, key: str, generation: int, overlap: float, *, using: str = KEY) -> httpx.Response:
        body = {"key_hash": sha256(key), "generation": generation, "overlap_seconds": overlap}
        return self.client.post("/admin/key", json=body, headers={"X-Engine-Key": using})

    def accepts(self, key: str) -> bool:
        status = self.client.get("/skills", headers={"X-Engine-Key": key}).status_code
        assert status in (200, 401)
        return status == 200

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(GIVE_UP_S)

    def outcome(self) -> tuple[int, str]:
        """Exit code and stderr of an engine that ends by itself."""
        code = self.process.wait(GIVE_UP_S)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self.client.close()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        "ENGINE_KEY_HASH": sha256(KEY),
        "SQLITE_DB_PATH": str(tmp_path / "brain.sqlite"),
        "CATALOG_DIR": str(ROOT / "engine" / "catalog"),
        "PORT": "0",
    }


@pytest.fixture
def launch(env: dict[str, str]) -> Iterator[Callable[..., EngineProcess]]:
    """Starts an engine with `env` and what a test changes of it; all are gone after the test."""
    engines: list[EngineProcess] = []

    def start(**changes: str | None) -> EngineProcess:
        merged = {**env, **changes}
        engines.append(EngineProcess({name: value for name, value in merged.items() if value is not None}))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(launch: Callable[..., EngineProcess]) -> EngineProcess:
    return launch().ready()


class TestServing:
    def test_health_needs_no_key_and_everything_else_does(self, engine: EngineProcess) -> None:
        bare = httpx.get(f"http://127.0.0.1:{engine.port}/health")
        assert (bare.status_code, bare.json()["status"]) == (200, "ok")
        assert "server" not in bare.headers
        assert {"brain", "catalog", "llm", "activity"} <= set(bare.json()["subsystems"])
        for path in ("/execute", "/history/x", "/nothing", "/admin/key"):
            refused = httpx.post(f"http://127.0.0.1:{engine.port}{path}", headers={"X-Engine-Key": "wrong"})
            assert (refused.status_code, refused.json()["error"]) == (401, "INVALID_KEY")
        assert engine.client.get("/nothing").json()["error"] == "NOT_FOUND"

    def test_a_turn_streams_and_is_remembered_over_a_restart(
        self, engine: EngineProcess, launch: Callable[..., EngineProcess]
    ) -> None:
        response = engine.execute("hello")
        assert response.headers["content-type"].startswith("text/event-stream")
        kinds = [kind for kind, _ in parse_events(response.text)]
        assert (kinds[0], kinds[-2:]) == ("thread_lifecycle", ["usage", "thread_lifecycle"])
        assert "local responder" in response.text
        before = engine.history()
        assert engine.terminate() == 0
        again = launch(PORT=str(engine.port)).ready()
        assert again.port == engine.port
        assert again.history() == before
        words = [data["text"] for kind, data in parse_events(again.execute("again").text) if kind == "text_delta"]
        assert "turn 2 of this task" in "".join(words)

    def test_a_slow_turn_has_heartbeats(self, engine: EngineProcess) -> None:
        kinds = [kind for kind, _ in parse_events(engine.execute("/slow 1.5").text)]
        assert "heartbeat" in kinds

    def test_a_busy_task_is_409_and_counts_as_one_in_flight(self, engine: EngineProcess) -> None:
        with engine.turn_in_flight("/slow 300"):
            busy = engine.execute("me too")
            assert (busy.status_code, busy.json()["error"]) == (409, "TASK_BUSY")
            activity = engine.health().json()["subsystems"]["activity"]
            assert activity == {"in_flight": 1, "idle_seconds": 0.0}

    def test_a_turn_goes_on_when_its_caller_hangs_up(self, engine: EngineProcess) -> None:
        with engine.turn_in_flight("/slow 1"):
            pass
        engine.wait_for_log("turn ended")
        (turn,) = engine.history()["turns"]
        assert turn["status"] == "completed"

    def test_a_huge_body_is_413_and_the_engine_goes_on(self, engine: EngineProcess) -> None:
        refused = engine.execute("x" * 5_000_000)
        assert (refused.status_code, refused.json()["error"]) == (413, "PAYLOAD_TOO_LARGE")
        assert engine.execute("small").status_code == 200

    def test_what_is_no_http_harms_nobody(self, engine: EngineProcess) -> None:
        with socket.create_connection(("127.0.0.1", engine.port)) as connection:
            connection.sendall(b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
        assert engine.health().status_code == 200


class TestFrozen:
    def test_no_turn_for_a_caller_who_hung_up_meanwhile(self, engine: EngineProcess) -> None:
        body = json.dumps({"message": "too late", "task_id": "gone"}).encode()
        head = f"POST /execute HTTP/1.1\r\nHost: x\r\nX-Engine-Key: {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
        engine.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, engine.process.pid, os.WSTOPPED | os.WNOWAIT)
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", engine.port)) as connection:
                connection.sendall(head.encode() + body)
        engine.process.send_signal(signal.SIGCONT)
        engine.wait_for_log("caller gone, no turn begun")
        # Came after them, so they are decided when it is answered.
        assert engine.execute("in time").status_code == 200
        assert engine.client.get("/history/gone").json()["error"] == "TASK_NOT_FOUND"

    def test_a_caller_who_waited_gets_the_turn(self, engine: EngineProcess) -> None:
        body = json.dumps({"message": "patient", "task_id": "task"}).encode()
        head = (
            f"POST /execute HTTP/1.1\r\nHost: x\r\nX-Engine-Key: {KEY}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        engine.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, engine.process.pid, os.WSTOPPED | os.WNOWAIT)
        with socket.create_connection(("127.0.0.1", engine.port)) as connection:
            connection.sendall(head.encode() + body)
            engine.process.send_signal(signal.SIGCONT)
            answer = connection.makefile("rb").read()
        assert b'"phase":"completed"' in answer


class TestStopping:
    def test_drains_turns_in_flight_then_exits_0(self, engine: EngineProcess) -> None:
        with engine.turn_in_flight("/slow 2") as rest:
            engine.process.terminate()
            engine.wait_for_log("draining")
            draining = engine.health()
            assert (draining.status_code, draining.json()["status"]) == (503, "draining")
            refused = engine.execute("too late", "another task")
            assert (refused.status_code, refused.json()["error"]) == (503, "DRAINING")
            assert '"phase":"completed"' in "".join(rest)
        assert engine.process.wait(GIVE_UP_S) == 0

    def test_a_second_interrupt_does_not_wait(
        self, engine: EngineProcess, launch: Callable[..., EngineProcess]
    ) -> None:
        with engine.turn_in_flight("/slow 300") as rest:
            engine.process.send_signal(signal.SIGINT)
            engine.wait_for_log("draining")
            engine.process.send_signal(signal.SIGINT)
            told = "".join(rest)
        assert "TURN_INTERRUPTED" in told
        assert engine.process.wait(GIVE_UP_S) == 0
        (turn,) = launch().ready().history()["turns"]
        assert turn["status"] == "interrupted"

    def test_a_repeated_sigterm_still_waits(self, engine: EngineProcess) -> None:
        with engine.turn_in_flight("/slow 1") as rest:
            engine.process.terminate()
            engine.wait_for_log("draining")
            engine.process.terminate()
            assert '"phase":"completed"' in "".join(rest)
        assert engine.process.wait(GIVE_UP_S) == 0

    def test_killed_in_a_turn_nothing_is_lost_but_the_answer(
        self, engine: EngineProcess, launch: Callable[..., EngineProcess]
    ) -> None:
        engine.execute("before")
        with contextlib.suppress(httpx.HTTPError), engine.turn_in_flight("/slow 300"):
            engine.kill()
        again = launch(PORT=str(engine.port)).ready()
        assert again.wait_for_log("ready")["interrupted_turns"] == 1
        history = again.history()
        assert [turn["status"] for turn in history["turns"]] == ["completed", "interrupted"]
        assert history["messages"][-1]["content"] == "/slow 300"
        assert "turn 3 of this task" in "".join(
            data["text"] for kind, data in parse_events(again.execute("after").text) if kind == "text_delta"
        )

    def test_a_stop_while_it_starts_is_clean(self, launch: Callable[..., EngineProcess], tmp_path: Path) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "brain.sqlite", isolation_level=None)) as held:
            held.execute("BEGIN EXCLUSIVE")  # The engine waits for the lock, so it is starting for as long.
            engine = launch()
            port = engine.wait_for_log("listening")["port"]
            health = httpx.get(f"http://127.0.0.1:{port}/health")
            assert (health.status_code, health.json()["status"]) == (503, "starting")
            assert engine.terminate() == 0


class TestRefusingToStart:
    @pytest.mark.parametrize(
        ("changes", "code", "says"),
        [
            ({"ENGINE_KEY_HASH": None}, 2, "ENGINE_KEY_HASH"),
            ({"ENGINE_API_KEY": KEY}, 2, "only one"),
            ({"ENGINE_KEY_GENERATION": "x"}, 2, "ENGINE_KEY_GENERATION"),
            ({"SQLITE_DB_PATH": None}, 2, "SQLITE_DB_PATH"),
            ({"CATALOG_DIR": "/nowhere/at/all"}, 2, "CATALOG_DIR"),
            ({"HOST": "not a host"}, 3, "cannot listen"),
        ],
    )
    def test_a_bad_setting(
        self, launch: Callable[..., EngineProcess], changes: dict[str, str | None], code: int, says: str
    ) -> None:
        self.refused(launch(**changes), code, says)

    def test_a_taken_port(self, engine: EngineProcess, launch: Callable[..., EngineProcess], tmp_path: Path) -> None:
        (tmp_path / "second").mkdir()
        second = launch(PORT=str(engine.port), SQLITE_DB_PATH=str(tmp_path / "second" / "brain.sqlite"))
        self.refused(second, 3, f"127.0.0.1:{engine.port}")
        assert list((tmp_path / "second").iterdir()) == []

    def test_a_wrong_catalog(self, launch: Callable[..., EngineProcess], tmp_path: Path) -> None:
        (tmp_path / "skills").mkdir()
        (tmp_path / "skills" / "bad.json").write_text("{\n oops")
        self.refused(launch(CATALOG_DIR=str(tmp_path)), 2, "skills/bad.json:2")

    def test_a_damaged_key_record(self, launch: Callable[..., EngineProcess], tmp_path: Path) -> None:
        (tmp_path / ".engine-key.json").write_text("{}")
        self.refused(launch(), 2, ".engine-key.json")

    def test_a_newer_brain(self, engine: EngineProcess, launch: Callable[..., EngineProcess], tmp_path: Path) -> None:
        engine.terminate()
        with contextlib.closing(sqlite3.connect(tmp_path / "brain.sqlite")) as db:
            db.execute("PRAGMA user_version = 999")
        self.refused(launch(), 4, "MIGRATION_REQUIRED")

    def test_a_damaged_brain_is_kept(self, launch: Callable[..., EngineProcess], tmp_path: Path) -> None:
        path = tmp_path / "brain.sqlite"
        path.write_bytes(b"precious but not SQLite\n" * 400)
        self.refused(launch(), 4, str(path))
        assert path.read_bytes() == b"precious but not SQLite\n" * 400

    def test_a_brain_in_use(self, engine: EngineProcess, launch: Callable[..., EngineProcess]) -> None:
        self.refused(launch(), 4, "in use")
        assert engine.execute("still here").status_code == 200

    def refused(self, engine: EngineProcess, code: int, says: str) -> None:
        found, stderr = engine.outcome()
        assert (found, stderr.count("\n")) == (code, 1), stderr
        assert stderr.startswith("engine: ")
        assert says in stderr
        assert KEY not in stderr
        assert sha256(KEY) not in stderr


class TestKeys:
    def test_development_key(self, launch: Callable[..., EngineProcess]) -> None:
        engine = launch(ENGINE_KEY_HASH=None, ENGINE_API_KEY="simple").ready()
        assert engine.accepts("simple")
        assert not engine.accepts(KEY)

    def test_overlap_ends_by_itself(self, engine: EngineProcess) -> None:
        assert engine.rotate("second", 2, 0.5).status_code == 204
        assert engine.accepts("second")
        deadline = time.monotonic() + GIVE_UP_S
        while engine.accepts(KEY):
            assert time.monotonic() < deadline
        assert engine.accepts("second")

    def test_no_request_fails_during_rotations_with_overlap(self, engine: EngineProcess) -> None:
        stop = threading.Event()
        answers: queue.Queue[int] = queue.Queue()
        seen: set[int] = set()

        def hammer() -> None:
            with httpx.Client(base_url=engine.client.base_url, headers={"X-Engine-Key": KEY}) as client:
                while not stop.is_set():
                    answers.put(client.get("/skills").status_code)

        thread = threading.Thread(target=hammer)
        thread.start()
        using = KEY
        try:
            for generation in range(2, 12):
                key = f"key {generation}"
                assert engine.rotate(key, generation, 300, using=using).status_code == 204
                assert engine.accepts(key)
                using = key
                for _ in range(answers.qsize() + 1):  # every answer so far, and one that is still to come
                    seen.add(answers.get(timeout=GIVE_UP_S))
        finally:
            stop.set()
            thread.join()
        assert seen == {200}
        assert all(engine.accepts(f"key {generation}") for generation in range(2, 12))

    def test_survives_a_kill_and_wins_over_an_older_environment(
        self, engine: EngineProcess, launch: Callable[..., EngineProcess], tmp_path: Path
    ) -> None:
        engine.rotate("second", 2, 300)
        engine.rotate("third", 3, 0, using="second")
        assert not engine.accepts("second")
        engine.kill()
        assert (tmp_path / ".engine-key.json").stat().st_mode & 0o777 == 0o600
        again = launch().ready()
        assert [again.accepts(key) for key in (KEY, "second", "third")] == [True, False, True]

    def test_a_newer_environment_wins(self, engine: EngineProcess, launch: Callable[..., EngineProcess]) -> None:
        engine.rotate("second", 2, 0)
        engine.terminate()
        again = launch(ENGINE_KEY_HASH=sha256("third"), ENGINE_KEY_GENERATION="3").ready()
        assert [again.accepts(key) for key in (KEY, "second", "third")] == [False, False, True]
        stale = again.rotate("second", 2, 0, using="third")
        assert (stale.status_code, stale.json()["details"]) == (409, {"generation": 3})

    def test_a_tie_goes_to_the_environment(self, engine: EngineProcess, launch: Callable[..., EngineProcess]) -> None:
        engine.rotate("second", 2, 0)
        engine.terminate()
        again = launch(ENGINE_KEY_HASH=sha256("other"), ENGINE_KEY_GENERATION="2").ready()
        assert [again.accepts(key) for key in (KEY, "second", "other")] == [False, False, True]

    def test_nothing_secret_is_printed(self, launch: Callable[..., EngineProcess]) -> None:
        engine = launch(ENGINE_LOG_LEVEL="debug").ready()
        engine.execute("a private message")
        engine.rotate("second key", 2, 300)
        engine.accepts("wrong key")
        engine.execute("x", key="wrong key")
        assert engine.terminate() == 0
        code, stderr = engine.outcome()
        assert code == 0
        engine._reader.join()
        printed = "".join(engine.raw) + stderr
        for secret in (KEY, "second key", "wrong key", "a private message", sha256(KEY), sha256("second key")):
            assert secret not in printed


def test_it_is_light(engine: EngineProcess) -> None:
    """The memory only: a start that must not take longer than so many milliseconds fails on a busy machine."""
    status = Path(f"/proc/{engine.process.pid}/status").read_text()
    (rss,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
    assert rss <= 60 * 1024
