"""What ships for containers, and the document that installs a node: valid, and in agreement with the daemon."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from cpe_daemon import __version__
from cpe_daemon.cli import main
from cpe_daemon.config import ArenaConfig, Config, DeadlinesConfig, load_config
from cpe_daemon.config.section import GIB
from cpe_daemon.config.units import parse_bytes
from cpe_daemon.core.roles import Role
from cpe_daemon.daemon.drain import longest_stop_seconds
from cpe_daemon.links.allowed import AllowedFile, Client, allow
from cpe_daemon.links.keys import DAEMON_NAME, SECRET_SUFFIX, load_pair, new_pair, write_pair
from tests.programs import program

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "deploy" / "container"
CONTAINERFILE = FOLDER / "Containerfile"
OPERATIONS = ROOT / "docs" / "OPERATIONS.md"
EIGHT_GPUS = ROOT / "configs" / "h200-8gpu.yaml"

SWITCHES = {"as they are": "", "CUDA": "#CUDA: ", "CUDA and RDMA": "#CUDA: |#RDMA: "}
"""What the seds at the head of the manifests take away."""

PROCESS_BYTES = 2 * GIB
HOST_RESERVE_BYTES = 128 * GIB
LINK_BYTES_PER_SECOND = 55e9


def manifests(name: str, switch: str = "") -> list[dict[str, Any]]:
    text = (FOLDER / name).read_text()
    return list(yaml.safe_load_all(re.sub(switch, "", text) if switch else text))


def one(kind: str, switch: str = "") -> dict[str, Any]:
    (found,) = [document for document in manifests("daemonset.yaml", switch) if document["kind"] == kind]
    return found


def daemon_pod(switch: str = "") -> dict[str, Any]:
    found: dict[str, Any] = one("DaemonSet", switch)["spec"]["template"]["spec"]
    return found


def engine_pod(switch: str = "") -> dict[str, Any]:
    (found,) = manifests("engine-pod.yaml", switch)
    spec: dict[str, Any] = found["spec"]
    return spec


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    checked: dict[str, Any] = found
    return checked


def mounts(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {mount["mountPath"]: mount for mount in part["volumeMounts"]}


def volumes(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {volume["name"]: volume for volume in pod["volumes"]}


def quantity(text: str) -> int:
    matched = re.fullmatch(r"(\d+)(Mi|Gi)", text)
    assert matched, text
    return int(matched[1]) * {"Mi": 2**20, "Gi": 2**30}[matched[2]]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """What the DaemonSet's daemon is configured with."""
    path = tmp_path / "config.yaml"
    path.write_text(one("ConfigMap")["data"]["config.yaml"])
    return load_config(path, environ={})


def table(document: str, header: str) -> list[list[str]]:
    """The cells of the table that begins with ``header``."""
    rows = document.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    assert rows, header
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
@pytest.mark.parametrize("name", ["daemonset.yaml", "engine-pod.yaml"])
def test_manifests_fit_the_schemas_of_kubernetes(name: str, switch: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in manifests(name, switch):
        validate.validate(document, "1.31", strict=True)


def test_switches_turn_on_what_they_say() -> None:
    plain, cuda, rdma = (daemon_pod(switch) for switch in SWITCHES.values())
    assert not {"runtimeClassName", "hostIPC", "hostPID"} & plain.keys()
    for pod in (cuda, engine_pod(SWITCHES["CUDA"])):
        assert (pod["runtimeClassName"], pod["hostIPC"], pod["hostPID"]) == ("nvidia", True, True)
    environment = {variable["name"]: variable.get("value") for variable in container(cuda)["env"]}
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    claimed = [set(container(pod)["resources"]["limits"]) for pod in (plain, cuda, rdma)]
    assert claimed == [{"cpu", "memory"}, {"cpu", "memory"}, {"cpu", "memory", "rdma/hca"}]  # and no GPU
    assert "nvidia.com/gpu" in container(engine_pod(SWITCHES["CUDA"]))["resources"]["limits"]


def test_sed_for_gpus_has_the_daemon_use_them(tmp_path: Path) -> None:
    kinds = []
    for switch in SWITCHES.values():
        path = tmp_path / "config.yaml"
        path.write_text(one("ConfigMap", switch)["data"]["config.yaml"])
        kinds.append(load_config(path, environ={}).device.kind)
    assert kinds == ["shm", "cuda", "cuda"]


def test_daemon_is_given_what_its_configuration_names(config: Config) -> None:
    pod, daemon = daemon_pod(), container(daemon_pod())
    given, kept = mounts(daemon), volumes(pod)
    assert daemon["args"] == ["serve", "--config", given["/etc/cpe-daemon/config.yaml"]["mountPath"]]
    for directory in (config.runtime_dir, config.state_dir):
        assert kept[given[str(directory)]["name"]]["hostPath"]["path"] == str(directory)
    assert given[str(config.security.keys_dir)]["readOnly"]
    ports = {port["name"]: port for port in daemon["ports"]}
    assert config.http.address == ("0.0.0.0", ports["http"]["containerPort"])
    assert config.ingest.listen == (f"tcp://0.0.0.0:{ports['trainers']['containerPort']}",)
    assert not config.ingest.insecure
    annotations = one("DaemonSet")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["http"]["containerPort"])
    assert daemon["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert daemon["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


def test_daemon_is_killed_later_than_it_stops(config: Config) -> None:
    longest = longest_stop_seconds(config.deadlines, config.arena.size_bytes, pinned=True)  # as the seds have it
    assert daemon_pod()["terminationGracePeriodSeconds"] >= longest + 10
    by_default = longest_stop_seconds(DeadlinesConfig(), ArenaConfig().size_bytes, pinned=False)
    assert by_default + 10 <= 75
    assert f"{by_default:g} s by default" in OPERATIONS.read_text()


def test_container_that_is_run_by_hand_is_killed_later_than_it_stops() -> None:
    shown = (FOLDER / "README.md").read_text()
    (timeout,) = re.findall(r"--stop-timeout (\d+) ", shown)
    (arena,) = re.findall(r"CPE_ARENA__SIZE_BYTES=(\w+) ", shown)
    longest = longest_stop_seconds(DeadlinesConfig(), parse_bytes(arena), pinned=False)
    assert int(timeout) >= longest + 10


def test_liveness_probe_is_more_patient_than_the_daemon_with_a_copy(config: Config) -> None:
    probe = container(daemon_pod())["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > config.deadlines.stuck_seconds


def test_memory_limit_holds_all_that_the_daemon_takes(config: Config) -> None:
    limit = quantity(container(daemon_pod())["resources"]["limits"]["memory"])
    slots = config.device.gpus * config.device.slots * config.device.slot_bytes
    rings = 8 * config.ingest.landing_credits * config.ingest.landing_chunk_bytes
    frames = 8 * config.ingest.credits * config.ingest.chunk_bytes
    assert config.arena.size_bytes + slots + rings + frames + PROCESS_BYTES <= limit


def test_daemon_has_few_rights() -> None:
    pod = daemon_pod()
    for part in [*pod["initContainers"], *pod["containers"]]:
        context = part["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"]["drop"] == ["ALL"]
    rooted = [part["name"] for part in pod["initContainers"] if part["securityContext"].get("runAsUser") == 0]
    assert rooted == ["directories"]  # and it only makes directories
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False


def test_engine_reaches_the_daemon(config: Config) -> None:
    engine, daemon = engine_pod(), daemon_pod()
    mount = mounts(container(engine))[str(config.runtime_dir)]
    assert volumes(engine)[mount["name"]]["hostPath"]["path"] == str(config.runtime_dir)
    assert daemon["securityContext"]["runAsGroup"] in engine["securityContext"]["supplementalGroups"]
    assert engine["nodeSelector"] == daemon["nodeSelector"]
    shm = volumes(engine)[mounts(container(engine))["/dev/shm"]["name"]]["emptyDir"]
    assert shm["medium"] == "Memory"


def test_keys_of_a_secret_are_laid_out_so_that_the_daemon_takes_them(tmp_path: Path) -> None:
    """As the kubelet mounts a Secret: links through a directory that is swapped, and files that a group can read."""
    (script,) = next(part for part in daemon_pod()["initContainers"] if part["name"] == "keys")["args"]
    secret, keys = tmp_path / "secret", tmp_path / "keys"
    first, second = secret / "..1", secret / "..2"
    for directory in (first, second, keys):
        directory.mkdir(parents=True)
    pair, trainer = new_pair(), new_pair()
    for directory in (first, second):
        write_pair(directory, DAEMON_NAME, pair)
        allow(directory / "allowed", Client("run-7", trainer.public, frozenset({Role.TRAINER})))
    allow(second / "allowed", Client("ann", new_pair().public, frozenset({Role.OPERATOR})))
    for path in [*first.iterdir(), *second.iterdir()]:
        path.chmod(0o440)
    (secret / "..data").symlink_to(first.name)
    for name in ("daemon.key_secret", "daemon.key", "allowed"):
        (secret / name).symlink_to(f"..data/{name}")

    there = script.replace("/etc/cpe-daemon/secret", str(secret)).replace("/etc/cpe-daemon/keys", str(keys))
    for _ in range(2):  # it may run again in the same pod
        subprocess.run(["sh", "-ec", there], check=True, timeout=60)

    assert load_pair(keys / f"{DAEMON_NAME}{SECRET_SUFFIX}") == pair
    followed = AllowedFile(keys / "allowed")
    assert {client.name for client in (followed.read_if_changed() or {}).values()} == {"run-7"}
    (secret / "..new").symlink_to(second.name)
    (secret / "..new").rename(secret / "..data")
    assert {client.name for client in (followed.read_if_changed() or {}).values()} == {"run-7", "ann"}


# --- the image -------------------------------------------------------------------------------------------------------


def test_hadolint_finds_no_fault() -> None:
    ran = subprocess.run(
        [program("hadolint"), str(CONTAINERFILE)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_the_image_copies_exists_and_is_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (FOLDER / "Containerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", CONTAINERFILE.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert {source.split("/")[0] for source in copied} == sent
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_image_and_manifest_speak_of_the_same_user_version_and_port(config: Config) -> None:
    text, context = CONTAINERFILE.read_text(), daemon_pod()["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in text
    assert f'image.version="{__version__}"' in text
    assert container(daemon_pod())["image"] == f"cpe-daemon:{__version__}"
    assert one("DaemonSet")["metadata"]["labels"]["app.kubernetes.io/version"] == __version__
    assert Config().http.listen == "127.0.0.1:9845"
    assert "http://127.0.0.1:9845/healthz" in text
    assert config.http.address is not None
    assert f"EXPOSE {config.http.address[1]} 5555" in text


def test_base_image_is_pinned() -> None:
    text = CONTAINERFILE.read_text()
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["docker.io/library/python:${PYTHON}"] * 2


# --- the document ----------------------------------------------------------------------------------------------------


def test_eight_gpu_configuration_loads_and_has_the_room_that_it_says() -> None:
    config = load_config(EIGHT_GPUS, environ={})
    assert (config.device.kind, config.device.uuids) == ("cuda", ())
    sizes = {(row[0], row[1]): row for row in table(OPERATIONS.read_text(), "| model | type |")}
    three = int(sizes["671B", "fp8"][5].replace(",", ""))
    assert config.arena.size_bytes == three * GIB <= 2048 * GIB - HOST_RESERVE_BYTES


def test_sizing_table_follows_its_formulas() -> None:
    rows = table(OPERATIONS.read_text(), "| model | type |")
    assert len(rows) == 10
    for model, dtype, *cells in rows:
        billions = float(model[:-1]) * {"B": 1, "T": 1000}[model[-1]]
        weights = billions * 1e9 * {"bf16": 2, "fp8": 1}[dtype]
        arenas = [math.ceil(versions * weights * 1.01 / GIB) for versions in (1, 2, 3)]
        kept = [int((host * GIB - HOST_RESERVE_BYTES) / (weights * 1.01)) for host in (1024, 2048)]
        seconds = weights / (8 * LINK_BYTES_PER_SECOND)
        expected = [f"{weights / 1e9:,.0f}", *(f"{value:,}" for value in [*arenas, *kept]), f"{seconds:.2f}"]
        assert cells == expected, (model, dtype)


def test_other_memory_follows_the_defaults() -> None:
    default, eight = Config(), load_config(EIGHT_GPUS, environ={})
    shown = {row[0]: row[2:] for row in table(OPERATIONS.read_text(), "| what | formula |")}
    slots = [config.device.slots * config.device.slot_bytes for config in (default, eight)]
    named = "slots, of each GPU's memory (of the host's with `kind: shm`)"
    assert shown[named] == [f"{slots[0] >> 20} MiB", f"{slots[1] >> 30} GiB"]
    rings = [config.ingest.landing_credits * config.ingest.landing_chunk_bytes for config in (default, eight)]
    assert shown["landing ring, each trainer rank of this host"] == [f"{ring >> 20} MiB" for ring in rings]
    frames = default.ingest.credits * default.ingest.chunk_bytes
    assert shown["chunks under way, each rank of another host"][0] == f"{frames >> 20} MiB"
    assert shown["file descriptors"][0] == f"{256 + 4 * default.ingest.max_trainers:,}"


def test_every_alert_has_something_to_do() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    assert [row[0].strip("`") for row in table(OPERATIONS.read_text(), "| alert | do |")] == alerts


def commands(text: str) -> Iterator[list[str]]:
    """The commands of ours that a document shows, in blocks and in lines, as words without `cpe`."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    inline = re.findall(r"`(cpe [^`]+)`", re.sub(r"^```\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*blocks.splitlines(), *inline]:
        for part in re.split(r" (?:&&|\||>|#) ", line):
            if matched := re.search(r"(?:^|-- |exec cpe-daemon |/bin/)cpe ([a-z].*)", part):
                yield shlex.split(matched[1])


@pytest.mark.parametrize(
    "document", [OPERATIONS, ROOT / "deploy" / "systemd" / "README.md"], ids=lambda path: path.name
)
def test_daemons_are_installed_without_the_gigabytes_of_cuda(document: Path) -> None:
    installed = re.findall(r"(.*)\n *(/opt/\S+/bin/pip install .*)", document.read_text())
    assert installed
    for before, command in installed:
        assert before == "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu \\", command


@pytest.mark.parametrize("document", [OPERATIONS, FOLDER / "README.md"], ids=lambda path: path.name)
def test_commands_that_a_document_shows_exist(document: Path) -> None:
    shown = list(commands(document.read_text()))
    assert len(shown) >= 5
    for words in shown:
        command: click.Command = main
        rest = list(words)
        while isinstance(command, click.Group) and rest:
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert [word for word in rest if word.startswith("--") and word not in known] == [], words
