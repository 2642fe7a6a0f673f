"""Does an engine keep its contract? Asks it over HTTP; any engine, whatever it is written in.

`check_url` asks one that runs, and leaves it as it was. `check_command` starts one of its own, on a brain of its own,
and so can also rotate its key, stop it, start it again and freeze it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx

from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Finding", "check_command", "check_url", "holds"]

Rule = Literal["must", "may", "should"]
Result = Literal["holds", "fails", "not offered", "not tested"]

TIMEOUT_S = 15.0
BOOT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
FROZEN_S = 1.0
NEEDS_COMMAND = "needs --command, which starts an engine of its own"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. What an engine may leave out is `not offered`, which is no failure."""

    check: str
    rule: Rule
    result: Result
    detail: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


class _Broken(Exception):
    """What was asked for does not hold; the text says what came instead."""


class _Absent(Exception):
    """An ability that the engine does not offer, or that cannot be tried here."""

    def __init__(self, detail: str, result: Result = "not offered") -> None:
        super().__init__(detail)
        self.result = result


def holds(findings: list[Finding]) -> bool:
    """Whether the orchestrator can run this engine as it is."""
    return not any(finding.result == "fails" and finding.rule != "should" for finding in findings)


def check_url(url: str, key: str) -> list[Finding]:
    """Checks a running engine. It is quiesced for a moment if it can be; its key stays what it is."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigurationError("The engine's URL must look like http://127.0.0.1:9001.")
    with _Engine(url.rstrip("/"), key) as engine:
        findings = _over_http(engine)
    if findings[0].result == "holds":
        for check, rule in _ALONE:
            findings.append(Finding(check, rule, "not tested", NEEDS_COMMAND))
    return findings


def check_command(command: str) -> list[Finding]:
    """Starts an engine by a command, as a subprocess engine is started, checks it and ends it."""
    arguments = shlex.split(command)
    if not arguments:
        raise ConfigurationError("--command is empty: give the command that starts the engine.")
    with tempfile.TemporaryDirectory(prefix="engine-check-") as folder, _Own(arguments, Path(folder)) as own:
        return [own.started(), *_over_http(own.engine), *_alone(own)]


# --- what can be asked of any engine ----------------------------------------------------------------------


class _Engine:
    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT_S, follow_redirects=False)

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_error: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, *, key: str | None = None, body: object = None) -> httpx.Response:
        headers = {} if key is None else {"X-Engine-Key": key}
        try:
            return self._client.request(method, path, headers=headers, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Broken(f"{method} {path}: no answer ({type(error).__name__})") from None

    def accepts(self, key: str) -> bool:
        return self.ask("GET", _nowhere(), key=key).status_code != 401

    def health(self) -> dict[str, Any]:
        answer = self.ask("GET", "/health")
        if answer.status_code != 200:
            raise _Broken(f"GET /health without a key answers {answer.status_code}, not 200")
        try:
            body = answer.json()
        except ValueError:
            raise _Broken("GET /health does not answer JSON") from None
        if not isinstance(body, dict):
            raise _Broken("GET /health does not answer a JSON object")
        return body

    def activity(self) -> dict[str, Any]:
        subsystems = self.health().get("subsystems")
        activity = subsystems.get("activity") if isinstance(subsystems, dict) else None
        if activity is None:
            raise _Absent("no subsystems.activity: only admits and leases will keep it awake")
        if not isinstance(activity, dict):
            raise _Broken("subsystems.activity is not an object")
        return activity


def _nowhere() -> str:
    return f"/engine-check-{secrets.token_hex(8)}"


def _over_http(engine: _Engine) -> list[Finding]:
    checks: list[tuple[str, Rule, Callable[[_Engine], str]]] = [
        ("health without a key", "must", _health_is_open),
        ("health says what it must", "must", _health_shape),
        ("401 without a key", "must", _no_key),
        ("401 for a wrong key", "must", _wrong_key),
        ("the right key is accepted", "must", _right_key),
        ("reports its activity", "may", _activity),
        ("live key rotation", "may", _offers_rotation),
        ("quiesce and resume", "may", _quiesce),
    ]
    findings = []
    for check, rule, look in checks:
        findings.append(_found(check, rule, lambda look=look: look(engine)))  # type: ignore[misc]  # bound at once
        if len(findings) == 1 and findings[0].result != "holds":
            break  # Nothing else can be told of an engine that does not answer.
    return findings


def _found(check: str, rule: Rule, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, rule, "holds", look())
    except _Broken as broken:
        return Finding(check, rule, "fails", str(broken))
    except _Absent as absent:
        return Finding(check, rule, absent.result, str(absent))


def _health_is_open(engine: _Engine) -> str:
    status = engine.health().get("status")
    if status != "ok":
        raise _Broken(f"status is {status!r}, not 'ok'")
    return "200, status ok"


def _health_shape(engine: _Engine) -> str:
    first = engine.health()
    uptime = _number(first, "uptime_seconds")
    if not isinstance(first.get("subsystems"), dict):
        raise _Broken("subsystems is not an object")
    if _number(engine.health(), "uptime_seconds") < uptime:
        raise _Broken("uptime_seconds goes back")
    return f"status, uptime_seconds ({uptime:g}), subsystems ({', '.join(first['subsystems']) or 'none'})"


def _number(body: dict[str, Any], name: str) -> float:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _Broken(f"{name} is {value!r}, not a number of 0 or more")
    return float(value)


_PROTECTED = (("GET", "/"), ("POST", "/execute"), ("POST", "/admin/key"), ("POST", "/admin/quiesce"))


def _no_key(engine: _Engine) -> str:
    return _refuses(engine, [None])


def _wrong_key(engine: _Engine) -> str:
    # Who compares the wrong things accepts the hash itself, a beginning, or nothing at all.
    digest = hashlib.sha256(engine.key.encode()).hexdigest()
    return _refuses(engine, ["sk-sept-" + secrets.token_urlsafe(32), digest, engine.key[:-1], engine.key + "x", ""])


def _refuses(engine: _Engine, keys: list[str | None]) -> str:
    asked = [*_PROTECTED, ("GET", _nowhere()), ("DELETE", _nowhere())]
    for key in keys:
        for method, path in asked:
            answer = engine.ask(method, path, key=key, body={} if method == "POST" else None)
            if answer.status_code != 401:
                raise _Broken(f"{method} {path} answers {answer.status_code}, not 401")
    return f"on {len(asked)} paths, known and unknown"


def _right_key(engine: _Engine) -> str:
    answer = engine.ask("GET", _nowhere(), key=engine.key)
    if answer.status_code == 401:
        raise _Broken("an unknown path answers 401 with the right key")
    if answer.status_code >= 500:
        raise _Broken(f"an unknown path answers {answer.status_code}")
    if engine.key in answer.text:
        raise _Broken("the answer repeats the key")
    return f"an unknown path answers {answer.status_code}"


def _activity(engine: _Engine) -> str:
    activity = engine.activity()
    in_flight = activity.get("in_flight")
    if type(in_flight) is not int or in_flight < 0:
        raise _Broken(f"in_flight is {in_flight!r}, not a whole number of 0 or more")
    return f"in_flight {in_flight}, idle_seconds {_number(activity, 'idle_seconds'):g}"


def _offers_rotation(engine: _Engine) -> str:
    status = engine.ask("POST", "/admin/key", key=engine.key, body={}).status_code
    if status == 404:
        raise _Absent("a rotation re-creates it: a short stop")
    if status == 401:
        raise _Broken("POST /admin/key does not accept the key")
    if not 400 <= status < 500:
        raise _Broken(f"POST /admin/key with an empty object answers {status}")
    return f"POST /admin/key is there (an empty object: {status})"


def _quiesce(engine: _Engine) -> str:
    status = engine.ask("POST", "/admin/quiesce", key=engine.key, body={"ttl_s": 5}).status_code
    if status == 404:
        raise _Absent("it is frozen for a snapshot instead")
    if status == 409:
        raise _Absent("a turn is in flight: ask again when it is idle", "not tested")
    if status != 204:
        raise _Broken(f"POST /admin/quiesce answers {status}, not 204")
    try:
        _health_is_open(engine)
    finally:
        status = engine.ask("POST", "/admin/resume", key=engine.key).status_code
    if status != 204:
        raise _Broken(f"POST /admin/resume answers {status}, not 204")
    return "204, healthy meanwhile, 204"


# --- what only an engine of one's own can be put through ----------------------------------------------------

_ALONE: list[tuple[str, Rule]] = [
    ("a rotation holds", "may"),
    ("no turn for a caller who has gone", "should"),
    ("exits within 30 s of SIGTERM", "must"),
    ("starts again on its data", "must"),
]


class _Own:
    """An engine started for the check, in a session of its own, so that nothing of it is left afterwards."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._key = "sk-sept-" + secrets.token_urlsafe(32)
        (folder / "data").mkdir(mode=0o700)
        (folder / "catalog").mkdir()
        self.port = _free_port()
        self.engine = _Engine(f"http://127.0.0.1:{self.port}", self._key)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Own:
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.__exit__()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def started(self) -> Finding:
        return _found("comes up", "must", self.start)

    def start(self) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith("ORCH_")}
        env |= {
            "ENGINE_KEY_HASH": hashlib.sha256(self._key.encode()).hexdigest(),
            "ENGINE_KEY_GENERATION": "1",
            "SQLITE_DB_PATH": str(self._folder / "data" / "brain.sqlite"),
            "CATALOG_DIR": str(self._folder / "catalog"),
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
        }
        began = time.monotonic()
        with (self._folder / "log").open("ab") as log:
            try:
                self.process = subprocess.Popen(  # noqa: S603 - the command is the caller's own
                    self._arguments, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                raise _Broken(f"cannot be started: {error.strerror}") from None
        while time.monotonic() < began + BOOT_TIMEOUT_S:
            if self.process.poll() is not None:
                raise _Broken(f"ended with exit code {self.process.returncode}: {self._last_words()}")
            with contextlib.suppress(_Broken):
                if self.engine.health().get("status") == "ok":
                    return f"healthy after {(time.monotonic() - began) * 1000:.0f} ms"
            time.sleep(0.01)
        raise _Broken(f"not healthy within {BOOT_TIMEOUT_S:g} s: {self._last_words()}")

    def stop(self) -> str:
        process = self._running()
        began = time.monotonic()
        process.terminate()
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise _Broken(f"still there {STOP_TIMEOUT_S:g} s after SIGTERM") from None
        return f"exit code {code} after {(time.monotonic() - began) * 1000:.0f} ms"

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        group = self._running().pid
        os.killpg(group, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(group, signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            raise _Broken("it does not run any more")
        return self.process

    def _last_words(self) -> str:
        lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


def _alone(own: _Own) -> list[Finding]:
    if own.process is None or own.process.poll() is not None:
        return []
    looks: list[Callable[[], str]] = [
        lambda: _rotation(own.engine),
        lambda: _gone_caller(own),
        own.stop,
        lambda: _again(own),
    ]
    return [_found(check, rule, look) for (check, rule), look in zip(_ALONE, looks, strict=True)]


def _rotation(engine: _Engine) -> str:
    _offers_rotation(engine)
    first = engine.key
    second, third = ("sk-sept-" + secrets.token_urlsafe(32) for _ in range(2))

    def rotate(key: str, generation: int, overlap: float, *, using: str, wanted: int = 204) -> None:
        body = {
            "key_hash": hashlib.sha256(key.encode()).hexdigest(),
            "generation": generation,
            "overlap_seconds": overlap,
        }
        status = engine.ask("POST", "/admin/key", key=using, body=body).status_code
        if status != wanted:
            raise _Broken(f"generation {generation} answers {status}, not {wanted}")

    rotate(second, 2, 600, using=first)
    engine.key = second
    if not (engine.accepts(first) and engine.accepts(second)):
        raise _Broken("with an overlap, both keys must be accepted")
    rotate(second, 2, 600, using=second)
    rotate(first, 1, 600, using=second, wanted=409)
    rotate(third, 3, 0, using=second)
    engine.key = third
    if not engine.accepts(third):
        raise _Broken("the newest key is not accepted")
    if engine.accepts(second):
        raise _Broken("without an overlap, the former key must be refused at once")
    if not engine.accepts(first):
        raise _Broken("a key must be accepted until its own overlap ends, also after a later rotation")
    return "overlaps, repeats and generations as agreed"


def _gone_caller(own: _Own) -> str:
    engine = own.engine
    status = engine.ask("POST", "/execute", key=engine.key, body={}).status_code
    if status == 404:
        raise _Absent("it has no POST /execute", "not tested")
    try:
        engine.activity()
    except _Absent:
        raise _Absent("it does not report its activity", "not tested") from None
    body = b'{"message": "nobody waits for this", "task_id": "engine-check"}'
    head = (
        f"POST /execute HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Engine-Key: {engine.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    idle_before, before = _number(engine.activity(), "idle_seconds"), time.monotonic()
    with own.frozen():
        with socket.create_connection(("127.0.0.1", own.port), timeout=TIMEOUT_S) as connection:
            connection.sendall(head.encode() + body)
        time.sleep(FROZEN_S)
    # A later request is answered, and then some: what came before it has been decided.
    engine.accepts(engine.key)
    time.sleep(FROZEN_S / 2)
    for _ in range(100):
        asked = time.monotonic()
        activity = engine.activity()
        if time.monotonic() - asked < FROZEN_S / 2:
            break  # a slower answer cannot tell an idle time that began before the freeze from one that began after it
    else:
        raise _Absent("its /health is too slow to tell", "not tested")
    # Without a turn it has been idle since before the freeze.
    if activity.get("in_flight") or _number(activity, "idle_seconds") < idle_before + asked - before - 0.1:
        raise _Broken("after a thaw it ran the request of a caller who had hung up meanwhile")
    return "frozen, asked, hung up, thawed: no turn"


def _again(own: _Own) -> str:
    up = own.start()
    engine = own.engine
    if not engine.accepts(engine.key):
        raise _Broken("after a restart the newest key is refused: its record must outlive the process")
    own.stop()
    return f"{up}, with the newest key"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
