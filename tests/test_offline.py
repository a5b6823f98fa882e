"""Offline means offline: with HF_HUB_OFFLINE=1 and no key for W&B, nothing is asked of the network."""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from pipeline.cli import main


class Network:
    """Sees every address that this process connects to, sends to or asks for, and those of its children (W&B's).

    An audit hook cannot be taken away again, so it looks on only while `on`; what it sees beyond loopback it forbids.
    """

    on = False
    beyond: list[str]

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or event not in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"):
            return
        address = args[0] if event == "socket.getaddrinfo" else args[1]
        host = address[0] if isinstance(address, tuple) else address
        # A path is a Unix socket; nothing at all stands for an address that was connected to before.
        if (isinstance(address, tuple) or event == "socket.getaddrinfo") and not _is_loopback(host):
            self.beyond.append(f"{event} {address}")
            raise PermissionError(f"{event} {address}")

    def watch_children(self, done: threading.Event) -> None:
        while not done.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                try:
                    there = [one.raddr.ip for one in child.net_connections("inet") if one.raddr]
                except psutil.Error:
                    continue
                self.beyond += [f"{child.name()} {ip}" for ip in there if not _is_loopback(ip)]


def _is_loopback(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in ("localhost", "", "None"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


NETWORK = Network()


@pytest.fixture(scope="module", autouse=True)
def hooked() -> None:
    sys.addaudithook(NETWORK.hook)


@pytest.fixture
def network() -> Iterator[Network]:
    NETWORK.beyond, NETWORK.on, done = [], True, threading.Event()
    watcher = threading.Thread(target=NETWORK.watch_children, args=(done,), daemon=True)
    watcher.start()
    yield NETWORK
    NETWORK.on = False
    done.set()
    watcher.join()


def test_the_hook_sees_a_connection_a_name_and_a_packet(network: Network) -> None:
    with pytest.raises(PermissionError):
        socket.create_connection(("192.0.2.1", 9), timeout=0.1)
    with pytest.raises(PermissionError):
        socket.getaddrinfo("example.org", 443)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as packets, pytest.raises(PermissionError):
        packets.sendto(b"x", ("192.0.2.1", 9))
    assert len(network.beyond) == 3
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


def test_a_whole_run_asks_nothing_of_the_network(
    network: Network, write_experiment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in a netrc
    wandb.teardown()  # its process keeps the environment that it was started in
    short = {"max_steps": 1, "warmup_steps": 0}
    path = write_experiment(sft=short, dpo=short, tracking={"wandb": {"mode": "auto"}})
    assert main(["align", str(path)]) == 0
    assert main(["plan", str(path)]) == 0
    assert main(["verify", "lights/dpo-001"]) == 0
    assert list(Path("checkpoints/lights/dpo-001/wandb").glob("offline-run-*"))
    assert network.beyond == []
