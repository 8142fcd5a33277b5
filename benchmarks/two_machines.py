"""Two machines on one: an address of its own for each, and a client of its own of a network file
system, with its own caches, under the same path. As root, with glusterfs-server and iproute2."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import ONE_THREAD

from checkout import ROOT

NAME = "strata-far"
"""Of the second machine's namespace, and of the volume."""
NEAR, FAR = "10.77.0.1", "10.77.0.2"
PATIENCE = 600.0


def ran(*line: object) -> None:
    done = subprocess.run([str(word) for word in line], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, line))}: {(done.stderr or done.stdout).decode()}")


def _answers(*line: str) -> bool:
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


def until(what: Callable[[], Any], patience: float = PATIENCE) -> Any:
    end = time.monotonic() + patience
    while not (found := what()):
        if time.monotonic() > end:
            raise SystemExit(f"not within {patience:.0f} s")
        time.sleep(0.2)
    return found


@dataclass
class Machines:
    """Two of them."""

    place: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def shared(self) -> Path:
        """Where both see the volume."""
        return self.place / "shared"

    def near(self, *line: object) -> subprocess.Popen[bytes]:
        """Begin something on the first machine."""
        return self._begin([str(word) for word in line])

    def far(self, *line: object) -> subprocess.Popen[bytes]:
        """Begin something on the second, with its own client of the file system."""
        own = f'umount -l {self.shared}; {self._mount()}; exec "$@"'
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", own, "sh"]
        return self._begin(["ip", "netns", "exec", NAME, *inside, *map(str, line)])

    def plug(self, *, into: bool) -> None:
        """The second machine's network."""
        ran("ip", "netns", "exec", NAME, "ip", "link", "set", "far", "up" if into else "down")

    def clients(self) -> list[int]:
        """Of the file system, on the second machine."""
        ours = _network("self")
        found = subprocess.run(["pgrep", "-x", "glusterfs"], capture_output=True, check=False)
        return [pid for pid in map(int, found.stdout.split()) if _network(pid) not in (ours, None)]

    def _mount(self) -> str:
        return f"mount -t glusterfs {NEAR}:/{NAME} {self.shared}"

    def _begin(self, line: list[str]) -> subprocess.Popen[bytes]:
        env = (
            os.environ | ONE_THREAD | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT / "typings")}
        )
        with (self.place / "log").open("ab") as log:
            process = subprocess.Popen(
                line, cwd=self.place, env=env, stdout=log, stderr=log, start_new_session=True
            )
        self.running.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _network(pid: int | str) -> Path | None:
    with suppress(OSError):
        return Path(f"/proc/{pid}/ns/net").readlink()
    return None


@contextmanager
def machines(place: Path) -> Iterator[Machines]:
    found = Machines(place)
    found.shared.mkdir()
    try:
        ran("ip", "netns", "add", NAME)
        ran("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", NAME)
        ran("ip", "addr", "add", f"{NEAR}/24", "dev", "near")
        ran("ip", "link", "set", "near", "up")
        ran("ip", "netns", "exec", NAME, "ip", "addr", "add", f"{FAR}/24", "dev", "far")
        ran("ip", "netns", "exec", NAME, "ip", "link", "set", "lo", "up")
        found.plug(into=True)
        found.near("glusterd", "--no-daemon")
        until(lambda: _answers("gluster", "pool", "list"))
        gluster = ("gluster", "--mode=script", "volume")
        ran(*gluster, "create", NAME, f"{NEAR}:{place / 'brick'}", "force")
        ran(*gluster, "start", NAME)
        ran("sh", "-c", found._mount())
        yield found
    finally:
        for process in reversed(found.running[1:]):
            found.end(process)
        for line in (
            f"umount -l {found.shared}",
            f"gluster --mode=script volume stop {NAME} force",
            f"gluster --mode=script volume delete {NAME}",
            "pkill -x glusterfs",
            f"ip netns del {NAME}",
            "ip link del near",
        ):
            subprocess.run(line.split(), capture_output=True, check=False)
        for process in found.running[:1]:  # glusterd
            found.end(process)


def file_system() -> str:
    """Its name and version."""
    said = subprocess.run(["glusterfs", "--version"], capture_output=True, check=True).stdout
    return said.decode().splitlines()[0].strip()
