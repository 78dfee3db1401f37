"""Databases for tests: SQLite in a file, and a PostgreSQL server of the test's own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _program(name: str) -> str:
    """Of Debian's package or on the path, whichever is the newest."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    program = str(found[-1]) if found else shutil.which(name)
    assert program is not None, f"{name} is missing; install Debian's package postgresql"
    return program


class Postgres:
    """A server in a folder, which can be stopped and started again. It refuses to run as root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._user = "postgres" if os.getuid() == 0 else None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        folder.mkdir(mode=0o700)
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", str(folder / "data"), "-U", "quire", "--auth=trust", "--no-sync")
        self.start()

    def _run(self, name: str, *arguments: str) -> None:
        command = [_program(name), *arguments]
        plain = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        done = subprocess.run(command, user=self._user, cwd="/", capture_output=True, text=True, env=plain)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def start(self) -> None:
        """Answers when this returns."""
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        data, log = str(self._folder / "data"), str(self._folder / "log")
        self._run("pg_ctl", "start", "-w", "-D", data, "-l", log, "-o", options)

    def stop(self) -> None:
        """At once."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", str(self._folder / "data"))

    def fresh(self) -> str:
        """The address of a new, empty database."""
        name = f"test_{time.monotonic_ns()}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "quire", name)
        return f"postgresql://quire@127.0.0.1:{self.port}/{name}"


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """Where its user may go."""
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.stop()
