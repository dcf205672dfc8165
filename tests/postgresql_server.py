"""A PostgreSQL server of the tests' own."""

import os
import shutil
import subprocess
from pathlib import Path

from bento_server import free_port


class PostgreSql:
    """A database server of the tests' own."""

    def __init__(self, folder: Path) -> None:
        self.data, self.port = folder / "data", free_port()
        # The server refuses to run as root.
        self._as_user = (
            ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        )
        if self._as_user:
            for path in (folder, *folder.parents):
                if path.stat().st_uid == os.geteuid() and path != Path("/"):
                    path.chmod(path.stat().st_mode | 0o011)
            shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "-D", str(self.data), "-U", "slateloop", "--auth=trust", "--no-sync")
        self.start()
        self._n_databases = 0

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._n_databases += 1
        name = f"log{self._n_databases}"
        address = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "slateloop")
        self._run("psql", *address, "-c", f"CREATE DATABASE {name}", "postgres")
        return f"postgresql+psycopg://slateloop@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self._run("pg_ctl", "-D", str(self.data), "-o", options, "-l", str(self.data / "server.log"), "-w", "start")

    def stop(self, how: str = "fast") -> None:
        """Stop it; `immediate` is as a crash."""
        self._run("pg_ctl", "-D", str(self.data), "-m", how, "-w", "stop")

    def _run(self, *command: str) -> None:
        done = subprocess.run([*self._as_user, *command], capture_output=True, text=True, cwd="/", timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
