"""Recorded hosts for `cpe doctor`: what their files, commands and ports say, in the words that real ones use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cpe_daemon import __version__
from cpe_daemon.doctor import Answer, Finding, Needs, Subject, Verdict, examine
from cpe_daemon.doctor.gpus import QUERY
from cpe_daemon.doctor.host import Entry, Ran
from cpe_daemon.doctor.interconnect import LINK_QUERY, PEERS, TOPOLOGY
from cpe_daemon.doctor.network import VERBS
from cpe_daemon.doctor.software import INSTALLED, SMI_VERSION, ZEROMQ
from cpe_daemon.doctor.systemd import _COMMAND as SHOW

GIB = 1 << 30
RUNTIME = "/run/cpe"
PCI = "/sys/bus/pci/devices"
DISPLAY = {"vendor": "0x10de\n", "class": "0x030200\n"}


@dataclass(frozen=True)
class RecordedHost:
    """A host as it once was. What is not recorded is not there."""

    files: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)
    commands: Mapping[Sequence[str], Ran] = field(default_factory=dict)
    refused: Mapping[tuple[str, int], str] = field(default_factory=dict)
    urls: Mapping[str, int | str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    uid: int = 0

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def names(self, path: str) -> list[str] | None:
        inside = f"{path}/"
        found = {
            known[len(inside) :].split("/")[0] for known in [*self.files, *self.entries] if known.startswith(inside)
        }
        return sorted(found) or None

    def entry(self, path: str) -> Entry | None:
        return self.entries.get(path)

    def run(self, command: Sequence[str], seconds: float) -> Ran | None:
        return self.commands.get(command)

    def refuses(self, address: str, port: int) -> str | None:
        return self.refused.get((address, port))

    def get(self, url: str, seconds: float) -> int | str:
        return self.urls.get(url, "Connection refused")

    def but(self, **changes: Any) -> Self:
        """The same host with other facts: mappings are laid over what there is, and None takes a fact away."""
        made = {}
        for name, value in changes.items():
            if isinstance(value, Mapping):
                value = {key: fact for key, fact in {**getattr(self, name), **value}.items() if fact is not None}
            made[name] = value
        return dataclasses.replace(self, **made)


NEEDS = Needs(arena_bytes=4 * GIB, slot_bytes=768 << 20, ring_bytes=128 << 20)


def examined(
    name: str,
    host: RecordedHost,
    *,
    needs: Needs | None = NEEDS,
    status: Mapping[str, Any] | None = None,
    answer: Answer | None = None,
    **terms: Any,
) -> Finding:
    """What one check says of a host; `status` is what its daemon answers."""
    said = answer or Answer(status, "" if status else "no answer", 0.003)
    subject = Subject(host, runtime_dir=RUNTIME, needs=needs, ask=lambda: said, **terms)
    (finding,) = examine(subject, only=[name], seconds=30)
    return finding


def is_(finding: Finding, verdict: str, *words: str) -> None:
    """Check a verdict, what is said, and that whoever has to act is told how."""
    text = f"{finding.found}\n{finding.mend}"
    assert finding.verdict == Verdict(verdict), text
    for word in words:
        assert word in text, text
    assert finding.found
    assert bool(finding.mend) or verdict in {"ok", "skip"}, text
    assert not (finding.mend and verdict == "ok"), text


# --- what a process, a memory and an interpreter look like -----------------------------------------------------------


def limits(locked: str = "8388608", files: str = "1024") -> str:
    return (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max cpu time              unlimited            unlimited            seconds   \n"
        f"Max open files            {files:<20} 1048576              files     \n"
        f"Max locked memory         {locked:<20} {locked:<20} bytes     \n"
        "Max realtime timeout      unlimited            unlimited            us        \n"
    )


def process_status(cores: str = "0-7", capabilities: str = "0000000000000000", memories: str = "0") -> str:
    return (
        f"Name:\tcpe\nUmask:\t0022\nCapPrm:\t{capabilities}\nCapEff:\t{capabilities}\nCapBnd:\t000001ffffffffff\n"
        f"Cpus_allowed:\tff\nCpus_allowed_list:\t{cores}\nMems_allowed_list:\t{memories}\n"
    )


def meminfo(total_gib: int, available_gib: float, *, huge_pages: int = 0, commit_gib: int = 0) -> str:
    return (
        f"MemTotal:       {total_gib << 20} kB\nMemFree:        1048576 kB\n"
        f"MemAvailable:   {int(available_gib * (1 << 20))} kB\nCommitLimit:    {commit_gib << 20} kB\n"
        f"Committed_AS:    1048576 kB\nHugePages_Total:   {huge_pages:>5}\nHugePages_Free:    {huge_pages:>5}\n"
        "Hugepagesize:       2048 kB\n"
    )


def installed(torch: str = "2.13.0+cpu", cuda: str = "", packages: Mapping[str, str | None] | None = None) -> Ran:
    """What the interpreter says; None for a package that is missing."""
    found: dict[str, str | None] = {
        "cpe-daemon": __version__,
        "PyYAML": "6.0.3",
        "pyzmq": "27.3.0",
        "uvloop": "0.23.0",
        "torch": torch,
    }
    found |= packages or {}
    version_py = f"from typing import Optional\n\n__version__ = '{torch}'\ndebug = False\n"
    version_py += f"cuda: Optional[str] = {cuda or None!r}\n"
    said = {
        "python": "3.11.7",
        "packages": {name: version for name, version in found.items() if version},
        "requires": ["pyyaml>=6.0.1", "pyzmq>=25.1", "torch>=2.6", "uvloop>=0.19", "mypy>=1.11; extra == 'dev'"],
        "torch": version_py if found["torch"] else "",
    }
    return Ran(0, json.dumps(said) + "\n")


# --- hosts -----------------------------------------------------------------------------------------------------------


def laptop() -> RecordedHost:
    """A user's, with one NUMA node, 32 GiB, and neither a GPU nor systemd."""
    return RecordedHost(
        uid=1000,
        files={
            "/proc/sys/kernel/osrelease": "6.1.0-28-amd64\n",
            "/proc/sys/vm/overcommit_memory": "0\n",
            "/proc/meminfo": meminfo(32, 20),
            "/proc/locks": "1: POSIX  ADVISORY  WRITE 871 00:1a:1042 0 EOF\n",
            "/proc/self/limits": limits(files="1048576"),
            "/proc/self/status": process_status(),
            "/proc/self/uid_map": "         0          0 4294967295\n",
            "/proc/self/cgroup": "0::/user.slice/user-1000.slice/session-2.scope\n",
            "/sys/fs/cgroup/user.slice/memory.max": "max\n",
            "/sys/fs/cgroup/user.slice/memory.current": "4096000\n",
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force\n",
            "/sys/devices/system/node/node0/cpulist": "0-7\n",
            "/sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       33554432 kB\nNode 0 MemFree: 9 kB\n",
            "/sys/class/net/lo/ifindex": "1\n",
            "/sys/class/net/eth0/ifindex": "2\n",
            f"{PCI}/0000:00:02.0/vendor": "0x8086\n",
            f"{PCI}/0000:00:02.0/class": "0x030000\n",
            "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\ncpe:x:990:990::/:/sbin/nologin\nann:x:1000:1000::/ann:\n",
        },
        entries={
            "/": Entry("directory", writable=False),
            "/run": Entry("directory", writable=False),
            RUNTIME: Entry("directory", uid=1000, mode=0o750),
        },
        commands={
            INSTALLED: installed(),
            ZEROMQ: Ran(0, "27.3.0 4.3.5 True\n"),
            VERBS: Ran(1, "", "OSError: libibverbs.so.1: cannot open shared object file: No such file or directory\n"),
        },
    )


H200_ADDRESSES = ("1b", "43", "52", "61", "9d", "c3", "d1", "df")


def smi_row(index: int, bus: str, *, mode: str = "Default", mig: str = "Disabled", name: str = "NVIDIA H200") -> str:
    uuid = f"GPU-{index:08x}-5a1f-8c2e-93d4-0b7e6f1a2c3d"
    return f"{index}, {uuid}, {name}, 00000000:{bus.upper()}:00.0, 570.124.06, {mode}, {mig}\n"


def link_row(index: int, width: int = 16, most: int = 16, generation: int = 5) -> str:
    return f"{index}, {generation}, {width}, {most}\n"


def peer_matrix(count: int, code: str = "OK", *, but: Mapping[tuple[int, int], str] | None = None) -> str:
    """What `nvidia-smi topo -p2p r` prints, with its underlined heading."""
    rows = [" \t\x1b[4m" + "\t".join(f"GPU{index}" for index in range(count)) + "\x1b[0m"]
    for row in range(count):
        cells = ["X" if row == column else (but or {}).get((row, column), code) for column in range(count)]
        rows.append(f" GPU{row}\t" + "\t".join(cells))
    legend = ("X    = Self", "OK   = Status Ok", "CNS  = Chipset not supported", "GNS  = GPU not supported")
    return "\n".join([*rows, "", "Legend:", "", *(f"  {line}" for line in legend)]) + "\n"


def topology(count: int, code: str) -> str:
    """What `nvidia-smi topo -m` prints, on a host with a network card."""
    names = "\t".join(f"GPU{index}" for index in range(count))
    rows = [f"\t\x1b[4m{names}\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m"]
    for row in range(count):
        cells = "\t".join(" X " if row == column else code for column in range(count))
        rows.append(f"GPU{row}\t{cells}\tPXB\t0-55,112-167\t0\t\tN/A")
    rows.append("NIC0\t" + "\t".join("PXB" for _ in range(count)) + "\t X \t\t\t\t")
    return "\n".join([*rows, "", "Legend:", "", "  X    = Self", "  NV#  = Connection traversing a bonded set"]) + "\n"


def h200() -> RecordedHost:
    """Eight H200 below two sockets, two InfiniBand cards, 2 TiB, systemd with our unit, and root who looks."""
    cards = {
        f"{PCI}/0000:{bus}:00.0/{name}": value
        for index, bus in enumerate(H200_ADDRESSES)
        for name, value in {
            **DISPLAY,
            "numa_node": f"{index // 4}\n",
            "max_link_speed": "32.0 GT/s PCIe\n",
            "max_link_width": "16\n",
            "current_link_speed": "32.0 GT/s PCIe\n",
            "current_link_width": "16\n",
            "../max_link_width": "16\n",
        }.items()
    }
    host = laptop().but(
        uid=0,
        files={
            **cards,
            **infiniband("mlx5_0"),
            **infiniband("mlx5_1"),
            "/proc/meminfo": meminfo(2048, 1980),
            "/proc/self/limits": limits(files="1024"),
            "/proc/self/status": process_status("0-223", "000001ffffffffff", "0-1"),
            "/proc/self/cgroup": "0::/user.slice/user-0.slice/session-7.scope\n",
            "/proc/driver/nvidia/gpus/0000:1b:00.0/information": "Model: NVIDIA H200\n",
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always [within_size] advise never deny force\n",
            "/sys/devices/system/node/node0/cpulist": "0-55,112-167\n",
            "/sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       1073741824 kB\n",
            "/sys/devices/system/node/node1/cpulist": "56-111,168-223\n",
            "/sys/devices/system/node/node1/meminfo": "Node 1 MemTotal:       1073741824 kB\n",
        },
        entries={"/run/systemd/system": Entry("directory"), RUNTIME: Entry("directory", uid=0, mode=0o750)},
        commands={
            QUERY: Ran(0, "".join(smi_row(index, bus) for index, bus in enumerate(H200_ADDRESSES))),
            LINK_QUERY: Ran(0, "".join(link_row(index) for index in range(8))),
            PEERS: Ran(0, peer_matrix(8)),
            TOPOLOGY: Ran(0, topology(8, "NV18")),
            SMI_VERSION: Ran(0, "NVIDIA-SMI version  : 570.124.06\nCUDA Version        : 12.8\n"),
            SHOW: Ran(0, service()),
            INSTALLED: installed("2.9.0", "12.8"),
            VERBS: Ran(0),
        },
    )
    return host.but(files={"/dev/infiniband/uverbs0": "", "/dev/infiniband/rdma_cm": ""})


def infiniband(device: str, state: str = "4: ACTIVE") -> dict[str, str]:
    here = f"/sys/class/infiniband/{device}/ports/1"
    return {
        f"{here}/state": f"{state}\n",
        f"{here}/rate": "400 Gb/sec (4X NDR)\n",
        f"{here}/link_layer": "InfiniBand\n",
    }


def service(**changes: str) -> str:
    """What `systemctl show` says of our unit."""
    properties = {
        "User": "",
        "Result": "success",
        "LoadState": "loaded",
        "ActiveState": "active",
        "UnitFileState": "enabled",
        "LimitMEMLOCK": "infinity",
        "LimitNOFILE": "1048576",
        "MemoryMax": "infinity",
        "PrivateDevices": "no",
        "RuntimeDirectory": "cpe",
        **changes,
    }
    return "".join(f"{name}={value}\n" for name, value in properties.items())


def exec_start(*words: str) -> str:
    """The ExecStart= that `systemctl show` prints for a command."""
    return (
        f"{{ path={words[0]} ; argv[]={' '.join(words)} ; ignore_errors=no ; start_time=[n/a] ; stop_time=[n/a] ;"
        " pid=0 ; code=(null) ; status=0/0 }"
    )


def container() -> RecordedHost:
    """A pod on such a host: two of its GPUs, a memory limit, 64 KiB that may be locked, root of its own namespace."""
    return h200().but(
        files={
            "/proc/self/limits": limits(locked="65536", files="1048576"),
            "/proc/self/uid_map": "         0     100000      65536\n",
            "/proc/self/cgroup": "0::/\n",
            "/sys/fs/cgroup/memory.max": f"{16 * GIB}\n",
            "/sys/fs/cgroup/memory.current": f"{4 * GIB}\n",
            "/sys/fs/cgroup/memory.stat": f"anon 1024\nfile {2 * GIB}\ninactive_file {1 * GIB}\nactive_file 1024\n",
            "/dev/infiniband/uverbs0": None,
            "/dev/infiniband/rdma_cm": None,
        },
        entries={"/run/systemd/system": None},
        commands={QUERY: Ran(0, smi_row(0, "1b") + smi_row(1, "9d")), SHOW: None},
    )


def with_daemon(host: RecordedHost, pid: int = 4242) -> RecordedHost:
    """The same host with a daemon that holds its runtime directory."""
    sockets = {
        f"{RUNTIME}/{name}": Entry("socket", mode=0o660) for name in ("front.sock", "engines.sock", "handoff.sock")
    }
    return host.but(
        entries={**sockets, f"{RUNTIME}/daemon.lock": Entry("file", mode=0o640, inode=77, device="00:1a")},
        files={
            "/proc/locks": (
                "1: FLOCK  ADVISORY  READ 98 00:1a:77 0 EOF\n"
                f"2: FLOCK  ADVISORY  WRITE {pid} 00:1a:77 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 99 00:1a:77 0 EOF\n"
            ),
            f"/proc/{pid}/limits": limits(locked="unlimited", files="1048576"),
            f"/proc/{pid}/status": process_status("0-223", memories="0-1"),
            f"/proc/{pid}/cmdline": "/usr/bin/python3\0-m\0cpe_daemon\0serve\0",
        },
    )


def status(**changes: Any) -> dict[str, Any]:
    """What a daemon answers."""
    return {
        "daemon": {
            "version": __version__,
            "node": "gpu-17",
            "pid": 4242,
            "endpoints": ["ipc:///run/cpe/front.sock", "tcp://0.0.0.0:5555", "ipc:///run/cpe/engines.sock"],
        },
        "arena": {"size_bytes": 4 * GIB, "free_bytes": GIB, "prefaulted": True},
        "engines": [],
        **changes,
    }


def engine(name: str = "e0", **changes: Any) -> dict[str, Any]:
    """One engine in a daemon's status."""
    return {
        "engine": name,
        "model": "qwen3",
        "kind": "vllm",
        "state": "current",
        "ready": True,
        "expected": False,
        "url": "",
        "world_size": 2,
        "workers": [{"rank": 0, "pid": 1, "present": True}, {"rank": 1, "pid": 2, "present": True}],
        "error": None,
        **changes,
    }
