"""Checks of the network: RDMA, and the endpoints that the daemon shall listen at."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

from cpe_daemon.doctor.finding import Judgement, fail, ok, skip, warn, worst
from cpe_daemon.doctor.host import PYTHON, Host
from cpe_daemon.doctor.subject import Subject

DEVICES: Final = "/sys/class/infiniband"
VERBS: Final = (PYTHON, "-P", "-c", "import ctypes; ctypes.CDLL('libibverbs.so.1')")

_LOAD_SECONDS: Final = 10.0
_EVERY_ADDRESS: Final = ("0.0.0.0", "[::]")  # noqa: S104 - as sockets say it


def judge_rdma(subject: Subject) -> Judgement:
    """Whether RDMA devices have a port that is up, and a process can use them."""
    host = subject.host
    devices = host.names(DEVICES)
    if not devices:
        return skip("there is no RDMA device: versions from other nodes would come over tcp")
    ports = [port for device in devices for port in _ports(host, device)]
    judged: list[Judgement] = []
    if down := [text for text, active in ports if not active]:
        judged.append(
            warn(
                f"{', '.join(down)}{'' if len(down) < len(ports) else ': no port is up'}",
                "look at cable and switch (`rdma link`); an InfiniBand port in INIT waits for a subnet manager",
            )
        )
    if not any(name.startswith("uverbs") for name in host.names("/dev/infiniband") or []):
        judged.append(
            warn(
                "there is no /dev/infiniband/uverbs*: no process here can use the devices",
                "`modprobe ib_uverbs`; give a container the directory (`--device /dev/infiniband`)",
            )
        )
    loaded = host.run(VERBS, _LOAD_SECONDS)
    if loaded is not None and loaded.status != 0:
        judged.append(
            warn(
                "libibverbs.so.1 cannot be loaded, and without it RDMA is not used",
                "`apt install libibverbs1 ibverbs-providers`; elsewhere the package is rdma-core or libibverbs",
            )
        )
    return worst(judged, ", ".join(text for text, _ in ports))


def _ports(host: Host, device: str) -> list[tuple[str, bool]]:
    """Each port of a device: what to say of it, and whether it is up."""
    found = []
    for port in host.names(f"{DEVICES}/{device}/ports") or []:
        here = f"{DEVICES}/{device}/ports/{port}"
        # "4: ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand"
        state = (host.read(f"{here}/state") or "unknown").strip().rpartition(": ")[2]
        rate = (host.read(f"{here}/rate") or "").strip()
        layer = (host.read(f"{here}/link_layer") or "").strip()
        about = ", ".join(part for part in (layer, rate) if part)
        found.append((f"{device} port {port} is {state}" + (f" ({about})" if about else ""), state == "ACTIVE"))
    return found


def judge_endpoints(subject: Subject) -> Judgement:
    """Whether the configured endpoints are free, or held by this daemon."""
    if subject.needs is None:
        return skip("the settings are not valid: see config")
    if (owner := subject.silent()) is not None:
        return skip(f"process {owner} may hold them, and does not answer: see daemon")
    own = subject.status().get("daemon")
    held = [str(endpoint) for endpoint in own.get("endpoints") or []] if isinstance(own, dict) else None
    judged = [
        one for endpoint in subject.needs.endpoints if (one := _judge_endpoint(subject, endpoint, held)) is not None
    ]
    names = ", ".join(subject.needs.endpoints)
    if not names:
        return ok("none besides the daemon's own sockets")
    return worst(judged, f"{names}: {'free' if held is None else 'held by the daemon'}")


def _judge_endpoint(subject: Subject, endpoint: str, held: list[str] | None) -> Judgement | None:
    """What is wrong with one; None if nothing. ``held``: what the daemon listens at, None if none runs."""
    if endpoint.startswith("ipc://"):
        if held is not None and endpoint in held:
            return None
        return _judge_path(subject.host, endpoint.removeprefix("ipc://"))
    address, _, port = endpoint.partition("://")[2].rpartition(":")
    if port == "0" or not port.isdigit():
        return None  # any free one
    if held is not None and any(_covers(other, address, port) for other in held):
        return None
    interface = _interface(address)
    if interface and interface not in (subject.host.names("/sys/class/net") or [interface]):
        return fail(f"{endpoint}: there is no interface {interface}", "`ip link` names those that there are")
    error = subject.host.refuses("0.0.0.0" if interface or address == "*" else address.strip("[]"), int(port))  # noqa: S104
    if error is None:
        return (
            None
            if held is None
            else warn(f"the daemon that runs does not listen at {endpoint}", "restart it, for it has older settings")
        )
    return _refusal(endpoint, port, error)


def _covers(held: str, address: str, port: str) -> bool:
    """Whether ``held`` is an address, or every one; a name may stand for any."""
    other, _, other_port = held.partition("://")[2].rpartition(":")
    named = address == "*" or bool(_interface(address))
    return other_port == port and (named or other in (address, *_EVERY_ADDRESS))


def _refusal(endpoint: str, port: str, error: str) -> Judgement:
    """Why nothing can listen there."""
    if error == "EADDRINUSE":
        return fail(
            f"{endpoint}: another process listens there",
            f"`ss -ltnp 'sport = :{port}'` names it; or choose another port",
        )
    if error == "EADDRNOTAVAIL":
        return fail(f"{endpoint}: this host does not have that address", "`ip address` lists those that it has")
    if error == "EACCES":
        return fail(f"{endpoint}: this user may not listen below port 1024", "choose a higher port")
    return fail(f"{endpoint}: nothing can listen there ({error})", "choose another endpoint")


def _interface(address: str) -> str:
    """The interface that an address names; empty if it is a number, or every address."""
    return "" if address == "*" or address.startswith("[") or address[:1].isdigit() else address


def _judge_path(host: Host, path: str) -> Judgement | None:
    """What is wrong with the path of a socket that the daemon does not have yet."""
    parent = str(PurePosixPath(path).parent)
    directory = host.entry(parent)
    if directory is None:
        return fail(f"{path}: there is no directory {parent}", f"`mkdir -p {parent}`")
    if not directory.writable:
        return fail(f"{path}: this user may not write to {parent}", "choose another directory, or change its owner")
    if host.entry(path) is not None:
        return warn(
            f"{path} is there already, and the daemon would take its place", "remove it, unless somebody uses it"
        )
    return None
