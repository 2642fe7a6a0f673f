"""A second Docker Engine in a network namespace of its own: its loopback is not ours, and it may be stopped."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING

from tests.docker.daemon import IMAGE, build_images, docker, missing

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SecondDaemon", "second_daemon"]


@dataclass(slots=True)
class SecondDaemon:
    folder: Path
    namespace: str
    address: str  # of its host, as seen from here
    gateway: str  # of ours, as seen from there
    process: subprocess.Popen[bytes] | None = None
    live_restore: bool = True  # its containers outlive it

    @property
    def socket(self) -> str:
        return str(self.folder / "d.sock")

    @property
    def cli_host(self) -> str:
        return f"unix://{self.socket}"

    @property
    def runs(self) -> Path:
        """Where its containerd has a folder for each container that runs."""
        return self.folder / "run/containerd/daemon/io.containerd.runtime.v2.task/moby"

    @property
    def certificates(self) -> Path:
        return self.folder / "client"

    def start(self) -> None:
        """With TLS on its address."""
        server = self.folder / "server"
        arguments = [
            "nsenter",
            f"--net=/run/netns/{self.namespace}",
            "dockerd",
            *(["--live-restore"] if self.live_restore else []),
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/run",
            f"--pidfile={self.folder}/d.pid",
            f"--host={self.cli_host}",
            f"--host=tcp://{self.address}:2376",
            "--tlsverify",
            f"--tlscacert={server}/ca.pem",
            f"--tlscert={server}/cert.pem",
            f"--tlskey={server}/key.pem",
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(AssertionError):
                docker("version", host=self.cli_host)
                return
            time.sleep(0.1)
        raise AssertionError(f"the second daemon did not start: {(self.folder / 'log').read_text()[-1500:]}")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            # All its threads: one that still runs would answer.
            deadline = time.monotonic() + 30
            while any(_state(task) != "T" for task in Path(f"/proc/{self.process.pid}/task").iterdir()):
                assert time.monotonic() < deadline, "the daemon does not stand still"
                time.sleep(0.01)

    def restart(self, *, live_restore: bool) -> None:
        if self.live_restore is not live_restore or self.process is None:
            self.stop()
            self.live_restore = live_restore
            self.start()

    def stop(self, by: int = SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(by)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


@contextlib.contextmanager
def second_daemon() -> Iterator[SecondDaemon]:
    for tool in ("dockerd", "nsenter", "ip", "openssl"):
        if shutil.which(tool) is None:
            missing(f"a second Docker Engine needs {tool}")
    if os.geteuid() != 0:
        missing("a second Docker Engine needs root")
    build_images()
    name = f"orch{secrets.token_hex(3)}"
    subnet = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(250)}"
    # Short: sockets lie in it.
    folder = Path(tempfile.mkdtemp(prefix="orch", dir="/var/tmp"))
    made = SecondDaemon(folder, name, f"{subnet}.2", f"{subnet}.1")
    inside = ("ip", "-n", name)
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", f"{name}h", "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "address", "add", f"{made.gateway}/30", "dev", f"{name}h")
        _run("ip", "link", "set", f"{name}h", "up")
        _run(*inside, "address", "add", f"{made.address}/30", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "link", "set", "lo", "up")
        _certificates(folder, made.address)
        made.start()
        image = subprocess.run(["docker", "save", IMAGE], capture_output=True, check=True, timeout=100).stdout
        docker("load", given=image, host=made.cli_host)
        yield made
    finally:
        if made.process is not None:
            with contextlib.suppress(ProcessLookupError):
                made.signal(signal.SIGCONT)
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                if left := docker("ps", "--all", "--quiet", host=made.cli_host).split():
                    docker("rm", "--force", *left, host=made.cli_host)
            made.stop()
        _run("ip", "netns", "del", name, check=False)
        _run("ip", "link", "del", f"{name}h", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _certificates(folder: Path, address: str) -> None:
    """One authority, one certificate for the daemon, one for its client."""
    authority = folder / "ca"
    authority.mkdir()
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    _run(*new, "-subj", "/CN=tests", "-keyout", f"{authority}/ca-key.pem", "-out", f"{authority}/ca.pem")
    for name, use in (("server", "serverAuth"), ("client", "clientAuth")):
        target = folder / name
        target.mkdir(mode=0o700)
        shutil.copy(authority / "ca.pem", target / "ca.pem")
        _run(
            *new,
            *("-subj", f"/CN={name}", "-CA", f"{authority}/ca.pem", "-CAkey", f"{authority}/ca-key.pem"),
            *("-addext", f"subjectAltName=IP:{address}", "-addext", f"extendedKeyUsage={use}"),
            *("-addext", "basicConstraints=critical,CA:false"),
            *("-keyout", f"{target}/key.pem", "-out", f"{target}/cert.pem"),
        )


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, timeout=60)
    if check and done.returncode:
        raise AssertionError(f"{command[0]}: {done.stderr.decode()[-500:]}")


def _state(task: Path) -> str:
    """`T`: stopped."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "T"  # a thread that has ended meanwhile
