"""`cpe doctor` on recorded hosts: memory, the kernel, the installation, the network and what is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from cpe_daemon.doctor import Needs
from cpe_daemon.doctor.host import Entry, Ran
from cpe_daemon.doctor.mooncake import IMPORT, WHEELS
from cpe_daemon.doctor.network import VERBS
from cpe_daemon.doctor.software import INSTALLED, SMI_VERSION, ZEROMQ
from cpe_daemon.doctor.systemd import _COMMAND as SHOW
from tests.unit.doctor_hosts import (
    GIB,
    NEEDS,
    PCI,
    RUNTIME,
    RecordedHost,
    container,
    examined,
    exec_start,
    h200,
    infiniband,
    installed,
    is_,
    laptop,
    limits,
    meminfo,
    process_status,
    service,
    status,
    with_daemon,
)

BIG = Needs(arena_bytes=1024 * GIB)
NO_SETTINGS: dict[str, Any] = {"needs": None}


def asking(**changes: Any) -> dict[str, Any]:
    """Settings that ask for something else."""
    return {"needs": dataclasses.replace(NEEDS, **changes)}


# (check, host, terms, verdict, words that are said)
Case = tuple[str, RecordedHost, Mapping[str, Any], str, tuple[str, ...]]


def run(case: Case) -> None:
    name, host, terms, verdict, words = case
    is_(examined(name, host, **terms), verdict, *words)


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", cases, ids=[f"{number}-{case[0]}-{case[3]}" for number, case in enumerate(cases)]
    )


STRICT = laptop().but(files={"/proc/sys/vm/overcommit_memory": "2\n", "/proc/meminfo": meminfo(32, 20, commit_gib=4)})
OLD_GROUPS = laptop().but(
    files={
        "/proc/self/cgroup": "4:memory:/pods/a\n3:cpuset:/\n0::/\n",
        "/sys/fs/cgroup/memory/pods/a/memory.limit_in_bytes": f"{2 * GIB}\n",
        "/sys/fs/cgroup/memory/pods/a/memory.usage_in_bytes": f"{GIB}\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    }
)
LOW = limits(locked="8388608", files="1024")


@named(
    [
        ("memory", laptop(), {}, "ok", ("need 4.8 GiB", "leaves 20.0 GiB", "/dev/shm")),
        ("memory", laptop(), asking(arena_bytes=18 * GIB), "warn", ("little is left", "128.0 MiB for each trainer")),
        ("memory", laptop(), asking(arena_bytes=18 * GIB, ring_bytes=0), "warn", ("landing rings and for",)),
        (
            "memory",
            laptop(),
            asking(arena_bytes=30 * GIB),
            "fail",
            ("MemAvailable", "lower arena.size_bytes", "nr_huge"),
        ),
        (
            "memory",
            container(),
            asking(arena_bytes=14 * GIB),
            "fail",
            ("/sys/fs/cgroup/memory.max", "13.0 GiB", "MemoryMax"),
        ),
        ("memory", container(), {}, "ok", ("leaves 13.0 GiB",)),
        ("memory", OLD_GROUPS, {}, "fail", ("memory/pods/a/memory.limit_in_bytes", "1.0 GiB")),
        ("memory", STRICT, {}, "fail", ("commit limit", "overcommit_memory=0")),
        ("memory", laptop().but(files={"/proc/meminfo": None}), {}, "skip", ("cannot be read",)),
        ("memory", laptop(), NO_SETTINGS, "skip", ("see config",)),
        ("memory", with_daemon(laptop()), {"status": status(), **NO_SETTINGS}, "ok", ("has its arena of 4.0 GiB",)),
        ("memory", with_daemon(laptop()), {}, "skip", ("process 4242 has taken its arena, or is taking it",)),
        ("memlock", h200(), {}, "ok", ("cpe-daemon.service may lock any amount",)),
        ("memlock", h200().but(commands={SHOW: None}), {}, "ok", ("CAP_IPC_LOCK",)),
        ("memlock", with_daemon(h200()), {"status": status()}, "ok", ("the daemon (pid 4242) may lock any amount",)),
        (
            "memlock",
            h200().but(commands={SHOW: Ran(0, service(LimitMEMLOCK="8388608"))}),
            {},
            "fail",
            ("8.0 MiB", "mlx5_0"),
        ),
        (
            "memlock",
            container(),
            {},
            "fail",
            ("this user's processes may lock 0.1 MiB", "mlx5_0", "--ulimit memlock=-1"),
        ),
        (
            "memlock",
            laptop().but(files={"/proc/driver/nvidia/gpus/0000:1b:00.0/information": ""}),
            {},
            "warn",
            ("pinning it for the GPUs", "LimitMEMLOCK=infinity"),
        ),
        ("memlock", laptop(), asking(wants_gpu=True), "warn", ("pinning",)),
        ("memlock", laptop(), {}, "ok", ("nothing here locks memory",)),
        ("memlock", laptop().but(files={"/proc/self/limits": limits("8589934592")}), {}, "ok", ("may lock 8.0 GiB",)),
        ("memlock", laptop().but(files={"/proc/self/limits": None}), {}, "skip", ("Max locked memory",)),
        ("memlock", laptop(), NO_SETTINGS, "skip", ("see config",)),
        ("hugepages", h200(), {"needs": BIG}, "ok", ("within_size",)),
        ("hugepages", laptop(), {}, "ok", ("never", "does without")),
        ("hugepages", laptop(), {"needs": BIG}, "warn", ("268,435,456 pages", "echo within_size")),
        (
            "hugepages",
            laptop().but(
                files={
                    "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled": "[always] inherit never\n",
                }
            ),
            {"needs": BIG},
            "ok",
            ("always",),
        ),
        (
            "hugepages",
            laptop().but(
                files={"/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled": "always [inherit] never\n"}
            ),
            {"needs": BIG},
            "warn",
            ("never",),
        ),
        (
            "hugepages",
            laptop().but(files={"/proc/meminfo": meminfo(32, 4, huge_pages=8192)}),
            {},
            "warn",
            ("16.0 GiB of 32",),
        ),
        (
            "hugepages",
            laptop().but(files={"/sys/kernel/mm/transparent_hugepage/shmem_enabled": None}),
            {},
            "skip",
            ("no transparent",),
        ),
        ("hugepages", laptop(), NO_SETTINGS, "skip", ("see config",)),
    ]
)
def test_memory(case: Case) -> None:
    run(case)


def kernel(release: str) -> RecordedHost:
    return laptop().but(files={"/proc/sys/kernel/osrelease": f"{release}\n"})


def cores(allowed: str, memories: str = "0-1") -> RecordedHost:
    return h200().but(files={"/proc/self/status": process_status(allowed, memories=memories)})


@named(
    [
        ("kernel", laptop(), {}, "ok", ("6.1.0-28-amd64",)),
        ("kernel", kernel("5.10.0-32-amd64"), {}, "warn", ("MADV_POPULATE_WRITE", "5.14")),
        ("kernel", kernel("4.18.0-553.el8_10.x86_64"), {}, "fail", ("F_SEAL_FUTURE_WRITE", "5.1")),
        ("kernel", laptop().but(files={"/proc/sys/vm/memfd_noexec": "2\n"}), {}, "fail", ("memfd_noexec",)),
        ("kernel", laptop().but(files={"/proc/sys/vm/memfd_noexec": "1\n"}), {}, "ok", ()),
        ("kernel", laptop().but(files={"/proc/sys/kernel/osrelease": None}), {}, "skip", ("cannot be read",)),
        ("files", laptop(), {}, "ok", ("1048576 files", "4352 are enough")),
        ("files", laptop().but(files={"/proc/self/limits": limits(files="unlimited")}), {}, "ok", ("any number",)),
        (
            "files",
            laptop().but(files={"/proc/self/limits": LOW}),
            {},
            "warn",
            ("about 192 trainer", "LimitNOFILE=65536"),
        ),
        ("files", laptop().but(files={"/proc/self/limits": LOW}), asking(max_trainers=64), "ok", ("512 are enough",)),
        ("files", laptop().but(files={"/proc/self/limits": limits(files="256")}), {}, "fail", ("too few",)),
        ("files", h200(), {}, "ok", ("cpe-daemon.service may open 1048576",)),
        ("files", laptop().but(files={"/proc/self/limits": None}), {}, "skip", ("Max open files",)),
        ("files", laptop(), NO_SETTINGS, "skip", ("see config",)),
        ("numa", laptop(), {}, "ok", ("one NUMA node", "cores 0-7, 32.0 GiB")),
        ("numa", h200(), {}, "ok", ("GPUs 0, 1, 2, 3 at node 0; GPUs 4, 5, 6, 7 at node 1",)),
        ("numa", with_daemon(h200()), {"status": status()}, "ok", ("the daemon (pid 4242) may run beside every GPU",)),
        (
            "numa",
            cores("0-55"),
            {},
            "warn",
            ("cores beside GPUs 4, 5, 6, 7 (56-111,168-223)", "CPUAffinity=0-111,168-223"),
        ),
        ("numa", cores("0-223", memories="0"), {}, "warn", ("memory of node 1", "AllowedMemoryNodes")),
        ("numa", cores(""), {}, "skip", ("on which cores",)),
        (
            "numa",
            h200().but(files={f"{PCI}/0000:1b:00.0/numa_node": "-1\n"}),
            {},
            "warn",
            ("nobody says beside which NUMA node GPU 0 is", "SRAT"),
        ),
        (
            "numa",
            laptop().but(files={"/sys/devices/system/node/node1/cpulist": "8-15\n"}),
            {},
            "ok",
            ("2 NUMA nodes and no GPU",),
        ),
        ("numa", laptop().but(files={"/sys/devices/system/node/node0/cpulist": "\n"}), {}, "skip", ("no NUMA",)),
    ]
)
def test_kernel(case: Case) -> None:
    run(case)


def directory(**terms: Any) -> RecordedHost:
    return laptop().but(entries={RUNTIME: Entry("directory", **{"uid": 1000, "mode": 0o750, **terms})})


def unit(**changes: str) -> RecordedHost:
    return h200().but(commands={SHOW: Ran(0, service(**changes))})


KILLED = laptop().but(
    entries={f"{RUNTIME}/front.sock": Entry("socket"), f"{RUNTIME}/daemon.lock": Entry("file", inode=77)},
    files={f"{RUNTIME}/daemon.lock": "4242\n"},
)
STARTING = with_daemon(laptop()).but(entries={f"{RUNTIME}/front.sock": None})
OTHER_FILE_SYSTEM = STARTING.but(
    entries={
        f"{RUNTIME}/daemon.lock": Entry("file", inode=77, device="00:2b"),
        f"{RUNTIME}/engines.sock": None,
        f"{RUNTIME}/handoff.sock": None,
    }
)
NO_DIRECTORY = laptop().but(entries={RUNTIME: None})
FRESH = unit(User="cpe").but(entries={RUNTIME: None, "/run": Entry("directory", writable=False)}, uid=990)
SERVED = unit(ExecStart=exec_start("/usr/bin/cpe", "serve", "--config", "/etc/cpe-daemon/config.yaml"))
CALLED = with_daemon(laptop()).but(
    files={"/proc/4242/cmdline": "python\0-m\0cpe_daemon\0serve\0--config\0/srv/a.yaml\0"}
)


@named(
    [
        ("config", laptop(), {"settings": "x.yaml is valid"}, "ok", ("x.yaml is valid",)),
        (
            "config",
            laptop(),
            {"settings": "x.yaml:3: device.slots: must", **NO_SETTINGS},
            "fail",
            ("x.yaml:3", "cpe config"),
        ),
        (
            "config",
            SERVED,
            {"settings": "the defaults"},
            "warn",
            ("cpe-daemon.service has /etc/cpe-daemon/config.yaml",),
        ),
        ("config", SERVED, {"settings": "valid", "config_path": "/etc/cpe-daemon/config.yaml"}, "ok", ("valid",)),
        (
            "config",
            CALLED,
            {"settings": "the defaults", "status": status()},
            "warn",
            ("cpe doctor --config /srv/a.yaml",),
        ),
        ("config", CALLED, {"settings": "a", "config_path": "/srv/a.yaml", "status": status()}, "ok", ("a",)),
        (
            "config",
            CALLED.but(
                files={"/proc/4242/cmdline": "cpe\0serve\0", "/proc/4242/environ": "A=1\0CPE_CONFIG=/srv/b.yaml\0"}
            ),
            {"settings": "the defaults", "status": status()},
            "warn",
            ("--config /srv/b.yaml",),
        ),
        (
            "config",
            with_daemon(laptop()),
            {"settings": "the defaults", "status": status(arena={"size_bytes": 64 * GIB})},
            "warn",
            ("arena of 4.0 GiB", "has one of 64.0 GiB"),
        ),
        ("runtime-dir", laptop(), {}, "ok", ("/run/cpe is this user's alone (mode 0750)",)),
        ("runtime-dir", NO_DIRECTORY, {}, "fail", ("may not make it in /run", "RuntimeDirectory=")),
        ("runtime-dir", NO_DIRECTORY.but(entries={"/run": Entry("directory")}), {}, "ok", ("the daemon makes it",)),
        ("runtime-dir", NO_DIRECTORY.but(entries={"/run": None, "/": None}), {}, "skip", ("nothing on the way",)),
        ("runtime-dir", FRESH, {}, "ok", ("cpe-daemon.service makes it",)),
        ("runtime-dir", FRESH.but(commands={SHOW: Ran(0, service(LoadState="not-found"))}), {}, "fail", ("in /run",)),
        ("runtime-dir", FRESH.but(commands={SHOW: Ran(0, service(RuntimeDirectory="x"))}), {}, "fail", ("in /run",)),
        ("runtime-dir", laptop().but(entries={RUNTIME: Entry("link")}), {}, "fail", ("is a link",)),
        ("runtime-dir", directory(mode=0o777), {}, "fail", ("everybody", "chmod 0750")),
        (
            "runtime-dir",
            directory(uid=990),
            {},
            "fail",
            ("is cpe's, and a daemon of ann refuses it", "run the daemon as cpe"),
        ),
        ("runtime-dir", directory(uid=77).but(uid=0), {}, "warn", ("is uid 77's", "of root refuses")),
        (
            "runtime-dir",
            unit(User="cpe").but(entries={RUNTIME: Entry("directory", uid=990)}),
            {},
            "ok",
            ("cpe's, the user of cpe-daemon.service",),
        ),
        ("runtime-dir", with_daemon(laptop()), {"status": status()}, "ok", ("held by the daemon (pid 4242)",)),
        ("runtime-dir", with_daemon(laptop()), {}, "fail", ("process 4242, which does not answer", "ps -fp 4242")),
        ("runtime-dir", OTHER_FILE_SYSTEM, {}, "ok", ("this user's alone",)),
        (
            "runtime-dir",
            OTHER_FILE_SYSTEM.but(files={f"{RUNTIME}/daemon.lock": "4242\n"}),
            {},
            "ok",
            ("process 4242, which starts",),
        ),
        ("runtime-dir", STARTING, {}, "ok", ("process 4242, which starts",)),
        ("runtime-dir", KILLED, {}, "warn", ("front.sock of a daemon that was killed", "start the daemon")),
        ("systemd", laptop(), {}, "skip", ("does not run here",)),
        ("systemd", h200().but(commands={SHOW: None}), {}, "skip", ("does not answer",)),
        ("systemd", h200().but(commands={SHOW: Ran(1, "", "Failed to connect to bus: Host is down")}), {}, "skip", ()),
        ("systemd", unit(LoadState="not-found"), {}, "skip", ("is not installed", "install the unit")),
        ("systemd", unit(LoadState="bad-setting"), {}, "fail", ("bad-setting", "systemctl status")),
        ("systemd", h200(), {}, "ok", ("enabled, active", "LimitMEMLOCK=infinity")),
        ("systemd", unit(UnitFileState="disabled"), {}, "warn", ("not started at boot", "systemctl enable")),
        ("systemd", unit(LimitMEMLOCK="8388608"), {}, "warn", ("LimitMEMLOCK=8.0 MiB", "LimitMEMLOCK=infinity")),
        ("systemd", unit(MemoryMax=str(GIB)), {}, "fail", ("MemoryMax=1.0 GiB is less than the 4.8 GiB",)),
        ("systemd", unit(ActiveState="failed", Result="exit-code"), {}, "fail", ("(exit-code)", "journalctl")),
        ("systemd", unit(PrivateDevices="yes", UnitFileState="disabled"), {}, "fail", ("hides the GPUs", "at boot")),
    ]
)
def test_installation(case: Case) -> None:
    run(case)


TCP = asking(endpoints=("tcp://10.0.0.7:5555",))
HELD = {**TCP, "status": status()}


def listening(*endpoints: str) -> dict[str, Any]:
    """A daemon that runs listens there, and the settings want another address."""
    daemon = {**status()["daemon"], "endpoints": list(endpoints)}
    return {**TCP, "status": status(daemon=daemon)}


@named(
    [
        ("rdma", laptop(), {}, "skip", ("no RDMA device", "tcp")),
        ("rdma", h200(), {}, "ok", ("mlx5_0 port 1 is ACTIVE (InfiniBand, 400 Gb/sec (4X NDR)), mlx5_1",)),
        ("rdma", h200().but(files=infiniband("mlx5_1", "1: DOWN")), {}, "warn", ("mlx5_1 port 1 is DOWN", "rdma link")),
        (
            "rdma",
            h200().but(files={**infiniband("mlx5_0", "2: INIT"), **infiniband("mlx5_1", "1: DOWN")}),
            {},
            "warn",
            ("mlx5_0 port 1 is INIT", "no port is up", "subnet manager"),
        ),
        ("rdma", container(), {}, "warn", ("/dev/infiniband/uverbs*", "--device /dev/infiniband")),
        (
            "rdma",
            h200().but(commands={VERBS: Ran(1, "", "OSError: x")}),
            {},
            "warn",
            ("libibverbs.so.1", "ibverbs-providers"),
        ),
        ("endpoints", laptop(), {}, "ok", ("none besides",)),
        ("endpoints", laptop(), NO_SETTINGS, "skip", ("see config",)),
        ("endpoints", with_daemon(laptop()), TCP, "skip", ("process 4242 may hold them",)),
        ("endpoints", laptop(), TCP, "ok", ("tcp://10.0.0.7:5555: free",)),
        ("endpoints", with_daemon(laptop()), HELD, "ok", ("held by the daemon",)),
        ("endpoints", with_daemon(laptop()), listening("tcp://10.0.0.7:5555"), "ok", ("held by the daemon",)),
        ("endpoints", with_daemon(laptop()), listening("tcp://[::]:5555"), "ok", ("held by the daemon",)),
        (
            "endpoints",
            with_daemon(laptop()),
            listening("tcp://10.0.0.8:5555"),
            "warn",
            ("does not listen at tcp://10",),
        ),
        (
            "endpoints",
            with_daemon(laptop()).but(refused={("10.0.0.7", 5555): "EADDRINUSE"}),
            listening("http://127.0.0.1:5555"),
            "fail",
            ("another process listens there",),
        ),
        ("endpoints", laptop().but(refused={("10.0.0.7", 5555): "EADDRINUSE"}), TCP, "fail", ("another", "ss -ltnp")),
        (
            "endpoints",
            laptop().but(refused={("10.0.0.7", 5555): "EADDRNOTAVAIL"}),
            TCP,
            "fail",
            ("does not have that",),
        ),
        ("endpoints", laptop().but(refused={("10.0.0.7", 5555): "ENOBUFS"}), TCP, "fail", ("ENOBUFS",)),
        (
            "endpoints",
            laptop().but(refused={("0.0.0.0", 80): "EACCES"}),
            asking(endpoints=("tcp://*:80",)),
            "fail",
            ("below port 1024",),
        ),
        (
            "endpoints",
            laptop().but(refused={("::1", 5555): "EADDRINUSE"}),
            asking(endpoints=("tcp://[::1]:5555",)),
            "fail",
            ("another process",),
        ),
        ("endpoints", laptop(), asking(endpoints=("tcp://*:0",)), "ok", ("tcp://*:0",)),
        (
            "endpoints",
            laptop().but(refused={("127.0.0.1", 9845): "EADDRINUSE"}),
            asking(endpoints=("tcp://10.0.0.7:5555", "http://127.0.0.1:9845")),
            "fail",
            ("http://127.0.0.1:9845: another process",),
        ),
        ("endpoints", laptop(), asking(endpoints=("tcp://eth0:5555",)), "ok", ("free",)),
        ("endpoints", laptop(), asking(endpoints=("tcp://ib0:5555",)), "fail", ("no interface ib0", "ip link")),
        (
            "endpoints",
            with_daemon(laptop()),
            {**asking(endpoints=("tcp://10.0.0.7:6666",)), "status": status()},
            "warn",
            ("does not listen at tcp://10.0.0.7:6666", "restart it"),
        ),
        ("endpoints", laptop(), asking(endpoints=("ipc:///srv/a.sock",)), "fail", ("no directory /srv", "mkdir -p")),
        ("endpoints", laptop(), asking(endpoints=("ipc:///run/a.sock",)), "fail", ("may not write to /run",)),
        (
            "endpoints",
            laptop().but(entries={"/srv": Entry("directory"), "/srv/a.sock": Entry("socket")}),
            asking(endpoints=("ipc:///srv/a.sock",)),
            "warn",
            ("is there already",),
        ),
        (
            "endpoints",
            laptop().but(entries={"/srv": Entry("directory")}),
            asking(endpoints=("ipc:///srv/a.sock",)),
            "ok",
            ("free",),
        ),
        (
            "endpoints",
            with_daemon(laptop()),
            {**asking(endpoints=("ipc:///run/cpe/front.sock",)), "status": status()},
            "ok",
            ("held",),
        ),
    ]
)
def test_network(case: Case) -> None:
    run(case)


def python(torch: str = "2.13.0+cpu", cuda: str = "", **packages: str | None) -> RecordedHost:
    return laptop().but(commands={INSTALLED: installed(torch, cuda, packages)})


def on_gpus(torch: str, cuda: str = "") -> RecordedHost:
    return h200().but(commands={INSTALLED: installed(torch, cuda)})


def mooncake(ran: Ran | None, *wheels: str, version: str = "0.3.13.post1", cuda: str = "12.8") -> RecordedHost:
    """A host with wheels of Mooncake, and how it went to import one."""
    return h200().but(
        commands={INSTALLED: installed("2.9.0", cuda, dict.fromkeys(wheels, version)), IMPORT: ran},
    )


def lacks(library: str) -> Ran:
    error = f"ImportError: {library}: cannot open shared object file: No such file or directory"
    return Ran(1, "", f'Traceback (most recent call last):\n  File "<string>", line 1, in <module>\n{error}\n')


SILENT = laptop().but(commands={INSTALLED: None, ZEROMQ: None})
CUDA12, CUDA13, PLAIN = WHEELS
CPU_HOST = laptop().but(commands={INSTALLED: installed(packages={PLAIN: "0.3.13.post1"}), IMPORT: Ran(0)})


@named(
    [
        ("python", laptop(), {}, "ok", ("Python 3.11.7",)),
        ("python", python(uvloop=None), {}, "fail", ("lacks uvloop", "pip install cpe-daemon")),
        ("python", python(pyzmq="24.0.1"), {}, "fail", ("pyzmq 25.1 (it has 24.0.1)",)),
        ("python", SILENT, {}, "skip", ("does not say",)),
        ("torch", laptop(), {}, "ok", ("without CUDA",)),
        ("torch", h200(), {}, "ok", ("2.9.0 for CUDA 12.8",)),
        ("torch", on_gpus("2.13.0+cpu"), {}, "warn", ("without CUDA, and there are GPUs", "pytorch.org")),
        ("torch", on_gpus("2.13.0", "13.0"), {}, "fail", ("CUDA 13.0", "CUDA 12.8 at most", "upgrade the driver")),
        (
            "torch",
            on_gpus("2.13.0", "13.0").but(commands={SMI_VERSION: Ran(0, "CUDA UMD Version     : 13.3\n")}),
            {},
            "ok",
            ("CUDA 13.0",),
        ),
        ("torch", on_gpus("2.13.0", "13.0").but(commands={SMI_VERSION: Ran(2)}), {}, "ok", ("CUDA 13.0",)),
        ("torch", python(torch=""), {}, "skip", ("CPU host does without",)),
        ("torch", on_gpus(""), {}, "warn", ("not installed beside",)),
        ("torch", SILENT, {}, "skip", ("does not say",)),
        ("zeromq", laptop(), {}, "ok", ("pyzmq 27.3.0 on libzmq 4.3.5, with CURVE",)),
        (
            "zeromq",
            laptop().but(commands={ZEROMQ: Ran(0, "27.3.0 4.3.5 False\n")}),
            {},
            "warn",
            ("no CURVE", "libsodium"),
        ),
        (
            "zeromq",
            laptop().but(commands={ZEROMQ: Ran(0, "27.3.0 4.3.5 False\n")}),
            asking(wants_curve=True),
            "fail",
            ("no CURVE, which the daemon's tcp endpoints need",),
        ),
        (
            "zeromq",
            laptop().but(commands={ZEROMQ: Ran(1, "", "ImportError: libzmq.so.5\n")}),
            {},
            "fail",
            ("libzmq.so.5",),
        ),
        ("zeromq", SILENT, {}, "fail", ("no interpreter",)),
        ("mooncake", laptop(), {}, "skip", ("not installed",)),
        ("mooncake", SILENT, {}, "skip", ("does not say",)),
        ("mooncake", mooncake(Ran(0), CUDA12), {}, "ok", ("mooncake-transfer-engine 0.3.13.post1 can be",)),
        ("mooncake", mooncake(Ran(0), PLAIN), {}, "ok", ("is enough",)),
        ("mooncake", CPU_HOST, {}, "ok", ("can be imported",)),
        (
            "mooncake",
            mooncake(Ran(0), CUDA12, CUDA13),
            {},
            "fail",
            ("overwrite", "pip uninstall -y mooncake-transfer-engine mooncake", "install mooncake-transfer-engine`"),
        ),
        ("mooncake", mooncake(Ran(0), CUDA12, cuda="13.0"), {}, "warn", ("for CUDA 12, and torch", "engine-cuda13`")),
        (
            "mooncake",
            mooncake(Ran(0), CUDA12, version="0.3.7"),
            {},
            "warn",
            ("waits for ever", "0.3.13.post1"),
        ),
        (
            "mooncake",
            mooncake(lacks("libcudart.so.12"), CUDA12, cuda="13.0"),
            {},
            "fail",
            ("pip install", "-cuda13`"),
        ),
        ("mooncake", mooncake(lacks("libcudart.so.12"), CUDA12, cuda=""), {}, "fail", ("engine-non-cuda`",)),
        ("mooncake", mooncake(lacks("libibverbs.so.1"), PLAIN), {}, "fail", ("apt install libibverbs1",)),
        ("mooncake", mooncake(lacks("libmlx5.so.1"), CUDA12), {}, "fail", ("apt install ibverbs-providers",)),
        ("mooncake", mooncake(lacks("libetcd.so"), CUDA12), {}, "fail", ("--force-reinstall",)),
        ("mooncake", mooncake(Ran(-11), CUDA12), {}, "fail", ("signal 11",)),
        ("mooncake", mooncake(Ran(None), CUDA12), {}, "fail", ("within 30 s",)),
    ]
)
def test_software(case: Case) -> None:
    run(case)
