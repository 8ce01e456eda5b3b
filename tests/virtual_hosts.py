"""Hosts with network, hostname and process table of their own on one machine, joined by a bridge: Linux namespaces.

    host0  eth0 10.77.0.1 --- port0 \
                                     bridge (a namespace of its own)
    host1  eth0 10.77.0.2 --- port1 /

Every namespace belongs to processes started here and has no name, so nothing can be left behind: it ends with them, and
they end with `close`, or by themselves after LIFETIME. Root is not needed where users may make namespaces.

As on many a real machine, a host's own name leads to 127.0.1.1 in /etc/hosts, and those of the others to the network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

LIFETIME = 120  # seconds after which a host ends, whatever became of the process that made it
TOOLS = ("unshare", "nsenter", "ip", "mount")
INTERFACE = "eth0"


class CannotMakeHosts(Exception):
    """What stands in the way on this machine."""


def address(host: int) -> str:
    return f"10.77.0.{host + 1}"


class VirtualHosts:
    """`count` hosts named host0, host1, ... that reach each other through `INTERFACE`; use it in a with statement.

    Args:
        count: number of hosts.
        folder: where their /etc/hosts are written.
    Raises:
        CannotMakeHosts: the machine has no namespaces, virtual links or bridges, or this user may not make them.
    """

    def __init__(self, count: int, folder: Path):
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise CannotMakeHosts(f"{', '.join(missing)} not found")
        self._holders: list[subprocess.Popen[str]] = []
        self._inits: list[int] = []  # first process of each host, seen from here: when it ends, so do the others
        self._user = [] if os.geteuid() == 0 else ["--user"]
        try:
            self._build(count, folder)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VirtualHosts:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills every process of every host and waits for the end of what was started here."""
        for holder in self._holders:
            holder.kill()  # its child, the host's first process, dies with it and takes the rest along
        for holder in self._holders:
            holder.wait()
            assert holder.stdout is not None
            holder.stdout.close()

    def start(self, host: int, command: Sequence[str], environment: Mapping[str, str],
              log: IO[str]) -> subprocess.Popen[bytes]:
        """Starts a command on a host, with output to `log`; it ends at the latest with `close`."""
        return subprocess.Popen(
            [*self._enter(self._inits[host], "--net", "--mount", "--uts", "--pid"), *command],
            env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )

    def cut(self, host: int) -> None:
        """Takes the host's link down: packets vanish, and no connection is told of it."""
        self._switch(f"ip link set port{host} down")

    def _build(self, count: int, folder: Path) -> None:
        mapped = [*self._user, "--map-root-user"] if self._user else []
        self._hold(["unshare", *mapped, "--net"], "ip link add bridge type bridge && ip link set bridge up")
        for host in range(count):
            names = [f"127.0.1.1 host{i}" if i == host else f"{address(i)} host{i}" for i in range(count)]
            hosts = folder / f"hosts{host}"
            hosts.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
            spaces = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
            holder = self._hold(
                [*self._enter(self._holders[0].pid), *spaces] if self._user else spaces,
                f"mount --bind '{hosts}' /etc/hosts && ip link set lo up && "
                f"'{sys.executable}' -c 'import socket; socket.sethostname(\"host{host}\")'",
            )
            self._inits.append(_only_child(holder.pid))
            self._switch(
                f"ip link add port{host} type veth peer name {INTERFACE} netns {self._inits[host]} && "
                f"ip link set port{host} master bridge up"
            )
            _run([*self._enter(self._inits[host], "--net"), "sh", "-c",
                  f"ip address add {address(host)}/24 dev {INTERFACE} && ip link set {INTERFACE} up"])

    def _hold(self, command: list[str], script: str) -> subprocess.Popen[str]:
        """Starts a process that keeps namespaces alive, once `script` has run in them."""
        holder = subprocess.Popen(
            [*command, "sh", "-c", f"{{ {script} && echo ready && exec sleep {LIFETIME}; }} 2>&1"],
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        self._holders.append(holder)
        assert holder.stdout is not None
        lines = []
        for line in holder.stdout:
            if line.strip() == "ready":
                return holder
            lines.append(line.strip())
        raise CannotMakeHosts(f"{command[0]} failed: {'; '.join(lines)}")

    def _switch(self, script: str) -> None:
        _run([*self._enter(self._holders[0].pid, "--net"), "sh", "-c", script])

    def _enter(self, target: int, *spaces: str) -> list[str]:
        user = [*self._user, "--preserve-credentials"] if self._user else []
        return ["nsenter", "--target", str(target), *user, *spaces]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise CannotMakeHosts(f"'{command[-1]}' failed: {done.stderr.strip()}")


def _only_child(pid: int) -> int:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise CannotMakeHosts("unshare started no process")
