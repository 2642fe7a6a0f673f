"""The mimic: a tiny engine for tests, started in about 20 ms as `python -I -S tests/mimic.py`.

It obeys the engine contract (`/health` with activity, `X-Engine-Key`, `POST /admin/key` with generations and
overlap) and misbehaves on demand. A flag is set, the later the stronger, by

- an argument: `--boot-delay=0.5`, `--ignore-sigterm`;
- the environment: `MIMIC_BOOT_DELAY=0.5`, `MIMIC_IGNORE_SIGTERM=1`;
- `mimic.json` in its data directory: `{"boot_delay": 0.5, "ignore_sigterm": true}`, read again when it changes.

Calls, all but `/health` under the key: `GET /read`, `POST /write` (text kept in the data directory), `POST /work`
(`{"seconds": 1}`: a turn in flight), `POST /say` (a line for the log), `POST /exit` (`{"code": 3}`), `GET /env` (its
environment), `GET /me` (pid, children, and a token of this very run).

Written with C modules and late imports, because `import socket` alone doubles its start time.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` without its enum; typeshed lacks it
import _socket
import _thread
import os
import sys
import time

TYPE_CHECKING = False  # as in `typing`, without its cost
if TYPE_CHECKING:
    from typing import Any

FLAGS: dict[str, Any] = {
    "boot_delay": 0.0,  # seconds before it listens
    "unready_for": 0.0,  # seconds after that with `starting` (503)
    "health_delay": 0.0,  # seconds that each answer of /health takes
    "fail_health": False,  # /health answers 500
    "busy": 0,  # in_flight that /health shows
    "no_activity": False,  # /health without subsystems.activity
    "crash_after": 0.0,  # seconds after which it exits with code 3; 0: never
    "ignore_sigterm": False,
    "drain": 0.0,  # seconds between SIGTERM and exit
    "leak": 0.0,  # MiB a second
    "no_admin": False,  # 404 for /admin/key
    "children": 0,  # processes of its own that sleep, and ignore SIGTERM
    "children_let_go": False,  # they close what they inherited
    "say": "",  # a line for the log at start
}
MAX_BODY = 1024 * 1024

STARTED = time.monotonic()
RUN = os.urandom(8).hex()
DATA = os.path.dirname(os.environ.get("SQLITE_DB_PATH", "")) or os.getcwd()


class Mimic:
    def __init__(self) -> None:
        self.given = flags_of(sys.argv[1:])
        self.flags = self.given
        self.flags_seen: tuple[int, int] | None = None
        self.read_flags()
        self.draining = False
        self.ready_at = 0.0
        self.in_flight = 0
        self.last_work = time.monotonic()
        self.children: list[int] = []
        self.guard = _thread.allocate_lock()
        self.keys = Keys()

    def read_flags(self) -> None:
        path = os.path.join(DATA, "mimic.json")
        try:
            status = os.stat(path)
        except OSError:
            return
        if self.flags_seen == (status.st_mtime_ns, status.st_ino):
            return
        import json

        with open(path) as file:
            self.flags = {**self.given, **json.load(file)}
        self.flags_seen = (status.st_mtime_ns, status.st_ino)

    # --- life -----------------------------------------------------------------------------------------

    def run(self) -> None:
        _signal.signal(_signal.SIGTERM, self.on_sigterm)
        time.sleep(self.flags["boot_delay"])
        listener = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        listener.bind((os.environ.get("HOST", "127.0.0.1"), int(os.environ["PORT"])))
        listener.listen(256)
        self.ready_at = time.monotonic() + self.flags["unready_for"]
        for _ in range(int(self.flags["children"])):
            self.spawn_child()
        if self.flags["crash_after"]:
            _thread.start_new_thread(self.crash, ())
        if self.flags["leak"]:
            _thread.start_new_thread(self.leak, ())
        if self.flags["say"]:
            say(self.flags["say"])
        say(f"mimic listens on port {os.environ['PORT']}")
        while True:
            number, _peer = listener._accept()  # type: ignore[attr-defined]  # what `socket.accept` calls
            connection = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, number)
            connection.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            _thread.start_new_thread(self.serve, (connection,))

    def on_sigterm(self, number: int, frame: object) -> None:
        self.read_flags()
        if self.flags["ignore_sigterm"]:
            return
        say("mimic ends")
        if not self.flags["drain"]:
            os._exit(0)
        self.draining = True
        _thread.start_new_thread(self.end, ())

    def end(self) -> None:
        time.sleep(self.flags["drain"])
        os._exit(0)

    def crash(self) -> None:
        time.sleep(max(0.0, self.flags["crash_after"]))
        say("mimic crashes")
        os._exit(3)

    def leak(self) -> None:
        hoard = []
        while True:
            hoard.append(b"x" * int(self.flags["leak"] * 1024 * 1024 / 10))
            time.sleep(0.1)

    def spawn_child(self) -> None:
        pid = os.fork()
        if pid == 0:
            _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
            if self.flags["children_let_go"]:
                os.closerange(3, 256)
            while True:
                time.sleep(3600)
        self.children.append(pid)

    # --- HTTP -----------------------------------------------------------------------------------------

    def serve(self, connection: _socket.socket) -> None:
        try:
            buffered = b""
            while True:
                while b"\r\n\r\n" not in buffered:
                    received = connection.recv(65536)
                    if not received or len(buffered) > MAX_BODY:
                        return
                    buffered += received
                head, _, buffered = buffered.partition(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                method, path, _version = first.split(" ", 2)
                headers = {}
                for line in lines:
                    name, _, value = line.partition(":")
                    headers[name.strip().lower()] = value.strip()
                length = int(headers.get("content-length", "0"))
                if length > MAX_BODY:
                    return
                while len(buffered) < length:
                    received = connection.recv(65536)
                    if not received:
                        return
                    buffered += received
                body, buffered = buffered[:length], buffered[length:]
                status, content = self.answer(method, path.partition("?")[0], headers, body)
                reply = f"HTTP/1.1 {status} x\r\n"
                if status != 204:
                    reply += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
                connection.sendall(f"{reply}\r\n".encode() + content)
                if headers.get("connection", "").lower() == "close":
                    return
        except (OSError, ValueError):
            return  # the caller went away, or does not speak HTTP
        finally:
            connection.close()

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        self.read_flags()
        if path == "/health":
            return self.health()
        if not self.keys.accepts(headers.get("x-engine-key", "")):
            return 401, b'{"error": "unauthorized"}'
        note = os.path.join(DATA, "note.txt")
        if (method, path) == ("POST", "/write"):
            with open(note + ".new", "wb") as file:
                file.write(body)
            os.replace(note + ".new", note)
            say("mimic wrote")
            return 204, b""
        if (method, path) == ("GET", "/read"):
            try:
                with open(note, "rb") as file:
                    return 200, file.read()
            except FileNotFoundError:
                return 404, b""
        if (method, path) == ("POST", "/work"):
            return self.work(body)
        if (method, path) == ("POST", "/admin/key") and not self.flags["no_admin"]:
            return self.keys.change(body), b""
        if (method, path) == ("POST", "/say"):
            say(body.decode())
            return 204, b""
        if (method, path) == ("POST", "/exit"):
            import json

            os._exit(int(json.loads(body)["code"]))
        if (method, path) == ("GET", "/me"):
            return 200, f'{{"pid": {os.getpid()}, "children": {self.children}, "run": "{RUN}"}}'.encode()
        if (method, path) == ("GET", "/env"):
            import json

            return 200, json.dumps(dict(os.environ)).encode()
        return 404, b'{"error": "not found"}'

    def health(self) -> tuple[int, bytes]:
        time.sleep(self.flags["health_delay"])
        now = time.monotonic()
        status, code = "ok", 200
        if self.draining:
            status, code = "draining", 503
        elif now < self.ready_at:
            status, code = "starting", 503
        elif self.flags["fail_health"]:
            status, code = "error", 500
        busy = self.in_flight + int(self.flags["busy"])
        idle = 0.0 if busy else now - self.last_work
        activity = f'"activity": {{"in_flight": {busy}, "idle_seconds": {idle:.3f}}}'
        if self.flags["no_activity"]:
            activity = ""
        uptime = now - STARTED
        return code, f'{{"status": "{status}", "uptime_seconds": {uptime:.3f}, "subsystems": {{{activity}}}}}'.encode()

    def work(self, body: bytes) -> tuple[int, bytes]:
        import json

        with self.guard:
            self.in_flight += 1
        try:
            time.sleep(float(json.loads(body or b"{}").get("seconds", 0)))
        finally:
            with self.guard:
                self.in_flight -= 1
                self.last_work = time.monotonic()
        return 200, b"{}"


class Keys:
    """The keys in force: `ENGINE_KEY_HASH`, unless `.engine-key.json` has a higher generation, and overlaps."""

    def __init__(self) -> None:
        self.path = os.path.join(DATA, ".engine-key.json")
        self.current = os.environ.get("ENGINE_KEY_HASH", "")
        self.generation = int(os.environ.get("ENGINE_KEY_GENERATION") or 0)
        self.former: list[tuple[str, float]] = []
        self.guard = _thread.allocate_lock()
        if os.path.exists(self.path):
            import json

            with open(self.path) as file:
                record = json.load(file)
            self.former = [(former["key_hash"], former["until"]) for former in record["former"]]
            if record["generation"] > self.generation:
                self.current, self.generation = record["key_hash"], record["generation"]

    def accepts(self, key: str) -> bool:
        digest = sha256(key.encode("latin-1"))
        now = time.time()
        hashes = [self.current, *(former for former, until in self.former if until > now)]
        return any([same(digest, known) for known in hashes])  # noqa: C419 (all are compared)

    def change(self, body: bytes) -> int:
        import json

        try:
            wish = json.loads(body)
            key_hash, generation = str(wish["key_hash"]), int(wish["generation"])
            overlap = float(wish.get("overlap_seconds", 0))
        except (ValueError, KeyError, TypeError):
            return 400
        with self.guard:
            if generation < self.generation or (generation == self.generation and key_hash != self.current):
                return 409
            if generation > self.generation:
                now = time.time()
                self.former = [(former, until) for former, until in self.former if until > now]
                if overlap > 0:
                    self.former.append((self.current, now + overlap))
                self.current, self.generation = key_hash, generation
                former_keys = [{"key_hash": former, "until": until} for former, until in self.former]
                record = {"key_hash": key_hash, "generation": generation, "former": former_keys}
                with open(os.open(self.path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                    json.dump(record, file)
                os.replace(self.path + ".new", self.path)
        return 204


def flags_of(arguments: list[str]) -> dict[str, Any]:
    flags = dict(FLAGS)
    for argument in arguments:
        name, given, value = argument.removeprefix("--").partition("=")
        flags[known(name)] = typed(known(name), value if given else "1")
    for name in FLAGS:
        set_by_environment = os.environ.get(f"MIMIC_{name.upper()}")
        if set_by_environment is not None:
            flags[name] = typed(name, set_by_environment)
    return flags


def known(name: str) -> str:
    name = name.replace("-", "_")
    if name not in FLAGS:
        raise SystemExit(f"mimic: unknown flag {name}; known: {', '.join(FLAGS)}")
    return name


def typed(name: str, value: str) -> Any:
    kind = type(FLAGS[name])
    return value not in ("", "0", "false") if kind is bool else kind(value)


def say(line: str) -> None:
    os.write(1, (line + "\n").encode())


def sha256(data: bytes) -> str:
    try:
        from _sha256 import sha256 as digest  # type: ignore[import-not-found]  # until Python 3.11
    except ImportError:
        from _sha2 import sha256 as digest  # type: ignore[import-not-found]  # from Python 3.12 on
    return str(digest(data).hexdigest())


def same(one: str, other: str) -> bool:
    from _operator import _compare_digest

    return bool(_compare_digest(one, other))


if __name__ == "__main__":
    Mimic().run()
