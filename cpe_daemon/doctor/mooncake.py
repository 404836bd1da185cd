"""The check of Mooncake: three distributions provide one import name, and each needs other libraries of the host."""

from __future__ import annotations

from typing import Final

from cpe_daemon.doctor.finding import Judgement, fail, ok, skip, warn
from cpe_daemon.doctor.gpus import gpus
from cpe_daemon.doctor.host import PYTHON, Ran
from cpe_daemon.doctor.software import installed, release
from cpe_daemon.doctor.subject import Subject

WHEELS: Final = {
    "mooncake-transfer-engine": "12",
    "mooncake-transfer-engine-cuda13": "13",
    "mooncake-transfer-engine-non-cuda": "",
}
"""The CUDA that each is built for; empty for none."""

IMPORT: Final = (PYTHON, "-P", "-c", "import mooncake.engine")

_WITHOUT_CUDA: Final = "mooncake-transfer-engine-non-cuda"
_IMPORT_SECONDS: Final = 30.0
_OLDEST: Final = (0, 3, 13)
"""Older ones have no MC_TCP_PROGRESS_TIMEOUT_SEC: a read from a peer that has stopped does not end."""

_LIBRARIES: Final = (
    ("libibverbs.so", "`apt install libibverbs1`, or rdma-core elsewhere"),
    ("libmlx5.so", "`apt install ibverbs-providers`, or rdma-core elsewhere"),
    ("librdmacm.so", "`apt install librdmacm1`, or rdma-core elsewhere"),
    ("libnuma.so", "`apt install libnuma1`, or numactl-libs elsewhere"),
    ("libcurl.so", "`apt install libcurl4`, or libcurl elsewhere"),
)


def judge_mooncake(subject: Subject) -> Judgement:
    """Whether exactly one wheel is installed, of the right CUDA, and can be imported."""
    here = installed(subject.host)
    if not here.python:
        return skip("the interpreter does not say what it has")
    wheels = [name for name in WHEELS if name in here.packages]
    if not wheels:
        return skip("not installed; only fetching versions from other nodes needs it")
    if len(wheels) > 1:
        one = _fitting(here.cuda)
        return fail(
            f"{' and '.join(wheels)} are installed, and overwrite one another's files",
            f"`pip uninstall -y {' '.join(wheels)}`, then `pip install {one}`",
        )
    (wheel,) = wheels
    version = here.packages[wheel]
    ran = subject.host.run(IMPORT, _IMPORT_SECONDS)
    if ran is None or ran.status != 0:
        return _broken(wheel, version, ran, here.cuda)
    if WHEELS[wheel] and here.cuda and here.cuda.partition(".")[0] != WHEELS[wheel]:
        return warn(
            f"{wheel} {version} is for CUDA {WHEELS[wheel]}, and torch here for CUDA {here.cuda}",
            f"`pip uninstall -y {wheel}`, then `pip install {_fitting(here.cuda)}`",
        )
    if release(version) < _OLDEST:
        return warn(
            f"{wheel} {version} waits for ever for a peer that has stopped",
            f"`pip install '{wheel}>=0.3.13.post1'`",
        )
    remark = (
        "; the arena is host memory, for which it is enough" if not WHEELS[wheel] and gpus(subject.host).found else ""
    )
    return ok(f"{wheel} {version} can be imported{remark}")


def _fitting(cuda: str) -> str:
    """The wheel for torch's CUDA, or for none."""
    return next((name for name, built in WHEELS.items() if built and cuda.startswith(f"{built}.")), _WITHOUT_CUDA)


def _broken(wheel: str, version: str, ran: Ran | None, cuda: str) -> Judgement:
    """Why a wheel cannot be imported, and what it lacks."""
    whose = f"{wheel} {version} cannot be imported"
    if ran is None or ran.status is None:
        return fail(f"{whose} within {_IMPORT_SECONDS:g} s", f"install {_fitting(cuda)} instead, or none")
    if ran.status < 0:
        return fail(
            f"{whose}: it kills the interpreter (signal {-ran.status})", f"install {_fitting(cuda)} instead, or none"
        )
    found = f"{whose}: {ran.said}"
    if "libcudart.so" in ran.said or "libcuda.so" in ran.said:
        return fail(found, f"`pip uninstall -y {wheel}`, then `pip install {_fitting(cuda)}`")
    mend = next(
        (mend for library, mend in _LIBRARIES if library in ran.said), f"`pip install --force-reinstall {wheel}`"
    )
    return fail(found, mend)
