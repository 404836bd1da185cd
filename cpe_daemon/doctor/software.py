"""Checks of what is installed: the daemon's own packages, torch, ZeroMQ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cpe_daemon.doctor.finding import Judgement, fail, listed, ok, skip, warn
from cpe_daemon.doctor.gpus import SMI_SECONDS, gpus
from cpe_daemon.doctor.host import PYTHON, Host
from cpe_daemon.doctor.subject import Subject

_OURS: Final = "cpe-daemon"
_LOOK_SECONDS: Final = 20.0

_LOOK: Final = """
import importlib.metadata, importlib.util, json, pathlib, sys
found = {}
for one in importlib.metadata.distributions():
    found.setdefault(one.name, one.version)
try:
    requires = importlib.metadata.requires("cpe-daemon") or []
except importlib.metadata.PackageNotFoundError:
    requires = []
torch = importlib.util.find_spec("torch")
places = list(torch.submodule_search_locations or []) if torch else []
version = pathlib.Path(places[0], "version.py") if places else None
text = version.read_text() if version and version.exists() else ""
print(json.dumps({"python": sys.version.split()[0], "packages": found, "requires": requires, "torch": text}))
"""
INSTALLED: Final = (PYTHON, "-P", "-c", _LOOK)
"""Looks without importing: torch alone would take seconds, and a broken package would break the looking."""

ZEROMQ: Final = (PYTHON, "-P", "-c", "import zmq; print(zmq.__version__, zmq.zmq_version(), zmq.has('curve'))")
SMI_VERSION: Final = ("nvidia-smi", "--version")


@dataclass(frozen=True, slots=True)
class Installed:
    """What the daemon's interpreter has.

    Args:
        python: its version.
        packages: versions by normalised name.
        requires: what cpe-daemon says that it needs.
        cuda: the CUDA that torch was built for; empty for a build without.
    """

    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    cuda: str = ""


def installed(host: Host) -> Installed:
    """Ask the interpreter; nothing is known if it does not say."""
    ran = host.run(INSTALLED, _LOOK_SECONDS)
    if ran is None or ran.status != 0:
        return Installed()
    said: dict[str, Any] = json.loads(ran.out)
    cuda = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", said["torch"], re.MULTILINE)
    return Installed(
        said["python"],
        {_normal(name): version for name, version in said["packages"].items() if name},
        tuple(said["requires"]),
        cuda[1] if cuda else "",
    )


def release(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: "0.3.13.post1" is (0, 3, 13)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def driver_cuda(host: Host) -> tuple[int, ...]:
    """Return the newest CUDA that the GPUs' driver runs; () if nobody says."""
    ran = host.run(SMI_VERSION, SMI_SECONDS)
    found = re.search(r"CUDA (?:UMD )?Version\s*:\s*([\d.]+)", ran.out) if ran is not None and ran.status == 0 else None
    return release(found[1]) if found else ()


def judge_python(subject: Subject) -> Judgement:
    """Whether what the daemon needs is installed, and new enough."""
    here = installed(subject.host)
    if not here.python:
        return skip("the interpreter does not say what it has")
    lacking = [text for one in here.requires if (text := _lacks(here, one))]
    if lacking:
        return fail(
            f"Python {here.python} lacks {listed(lacking)}",
            f"`pip install {_OURS}` into this environment again, with its dependencies",
        )
    return ok(f"Python {here.python}, {_OURS} {here.packages.get(_OURS, 'not installed as a package')}")


def _lacks(here: Installed, requirement: str) -> str:
    """Say what of one requirement is missing. torch is judged on its own; extras are nobody's need."""
    found = re.fullmatch(r"([A-Za-z0-9._-]+)(?:>=([\d.]+))?", requirement.replace(" ", ""))
    if found is None or found[1] == "torch":
        return ""
    version = here.packages.get(_normal(found[1]))
    if version is None:
        return found[1]
    return f"{found[1]} {found[2]} (it has {version})" if found[2] and release(version) < release(found[2]) else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def judge_torch(subject: Subject) -> Judgement:
    """Whether torch fits the GPUs and their driver. The daemon of a CPU host does not need it."""
    here, host = installed(subject.host), subject.host
    seen = gpus(host).found
    version = here.packages.get("torch")
    if not here.python:
        return skip("the interpreter does not say what it has")
    if version is None:
        if seen:
            return warn("torch is not installed beside the daemon", "install the build for this driver's CUDA")
        return skip("torch is not installed; the daemon of a CPU host does without")
    if not here.cuda:
        found = f"torch {version} is a build without CUDA"
        if seen:
            return warn(f"{found}, and there are GPUs", "install the build for this driver's CUDA (pytorch.org)")
        return ok(found)
    driver = driver_cuda(host)
    if driver and release(here.cuda)[:1] > driver[:1]:
        newest = ".".join(str(part) for part in driver)
        return fail(
            f"torch {version} is built for CUDA {here.cuda}, and the driver runs CUDA {newest} at most",
            f"upgrade the driver, or install torch for CUDA {driver[0]}",
        )
    return ok(f"torch {version} for CUDA {here.cuda}")


def judge_zeromq(subject: Subject) -> Judgement:
    """Whether ZeroMQ can be loaded, and can encrypt."""
    ran = subject.host.run(ZEROMQ, _LOOK_SECONDS)
    if ran is None or ran.status != 0:
        return fail(
            f"pyzmq cannot be imported: {ran.said if ran else 'no interpreter'}",
            "`pip install --force-reinstall pyzmq`",
        )
    pyzmq, libzmq, curve = (*ran.out.split(), "", "", "")[:3]
    found = f"pyzmq {pyzmq} on libzmq {libzmq}"
    if curve == "True":
        return ok(f"{found}, with CURVE")
    mend = "install a wheel of pyzmq, all of which have it, or build libzmq with libsodium"
    if subject.needs is not None and subject.needs.wants_curve:
        return fail(f"{found} has no CURVE, which the daemon's tcp endpoints need", mend)
    return warn(f"{found} has no CURVE: no tcp endpoint could be protected", mend)
