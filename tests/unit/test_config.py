"""Settings: units, sources and their precedence, what is refused and how it is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cpe_daemon.config import Config, annotated_default, effective, load_config, load_with_origins
from cpe_daemon.config.endpoints import SOCKET_PATH_BYTES
from cpe_daemon.config.paths import default_keys_dir, default_runtime_dir, default_state_dir
from cpe_daemon.config.units import format_bytes, format_seconds, parse_bytes, parse_seconds
from cpe_daemon.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def refused(text: str, tmp_path: Path, **sources: dict[str, str]) -> list[str]:
    """Load ``text`` as a file and return the lines of the error, with the file called F."""
    path = tmp_path / "cpe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ=sources.get("environ", {}), overrides=sources.get("overrides", {}))
    lines = str(caught.value).replace(str(path), "F").splitlines()
    if len(lines) > 1:
        assert lines.pop(0) == f"{len(lines)} problems in the configuration:"
    return [line.strip() for line in lines]


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("256MiB", 256 << 20),
        ("1.5GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        (" 4 kib ", 4096),
        ("0.5KB", 500),
        ("7B", 7),
        ("1TiB", 1 << 40),
    ],
)
def test_size_is_read(written: object, nbytes: int) -> None:
    assert parse_bytes(written) == nbytes


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("4G", "GiB"),
        ("4m", "MiB"),
        ("0.3KiB", "whole number of bytes"),
        ("5 bananas", "no unit"),
        ("much", "256MiB"),
        ("", "is empty"),
        ("1e9", "not a size"),
        (1.5, "not a size"),
        (True, "not a size"),
        (None, "not a size"),
        ("٣GiB", "not a size"),
    ],
)
def test_size_is_refused(written: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_bytes(written)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(30, 30.0), (0.5, 0.5), ("30", 30.0), ("500ms", 0.5), ("30s", 30.0), ("5m", 300.0), ("1.5h", 5400.0)],
)
def test_duration_is_read(written: object, seconds: float) -> None:
    assert parse_seconds(written) == seconds


@pytest.mark.parametrize("written", ["5d", "soon", "", "1:30", True, None, [1]])
def test_duration_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match=r"duration|unit|empty"):
        parse_seconds(written)


@given(st.integers(0, 1 << 45))
def test_size_round_trips(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == nbytes


@given(st.floats(0.001, 86_400.0))
def test_duration_round_trips(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == seconds


# --- sources -------------------------------------------------------------------------------------


def test_defaults_are_valid_and_frozen() -> None:
    config = load_config(environ={})
    assert (config.arena.size_bytes, config.device.slots, config.device.slot_bytes) == (4 << 30, 3, 256 << 20)
    assert config.front_endpoints == (f"ipc://{config.runtime_dir}/front.sock",)
    with pytest.raises(ValidationError):
        config.device.slots = 4


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "cpe.yaml"
    path.write_text("device:\n  slots: 4\n  gpus: 2\n  slot_bytes: 1MiB\nnode: a\n")
    environ = {"CPE_DEVICE__SLOTS": "5", "CPE_DEVICE__GPUS": "3", "CPE_NODE": "b", "HOME": "/"}
    loaded = load_with_origins(path, environ=environ, overrides={"device.slots": "6"})
    device = loaded.config.device
    assert (device.slots, device.gpus, device.slot_bytes, loaded.config.node) == (6, 3, 1 << 20, "b")
    shown = effective(loaded)
    assert re.search(r"slots: 6 +# --set device.slots\n", shown)
    assert re.search(r"gpus: 3 +# environment variable CPE_DEVICE__GPUS\n", shown)
    assert re.search(rf"slot_bytes: 1MiB +# {re.escape(str(path))}:4\n", shown)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("GPU-9c1f, GPU-77a0", ("GPU-9c1f", "GPU-77a0")),
        ('["GPU-9c1f", "GPU-77a0"]', ("GPU-9c1f", "GPU-77a0")),
        ("[GPU-9c1f,GPU-77a0]", ("GPU-9c1f", "GPU-77a0")),  # what a shell leaves of it without quotes around it
        ("[]", ()),
        ("", ()),
    ],
)
def test_list_may_be_written_as_json_or_with_commas(written: str, read: tuple[str, ...]) -> None:
    assert load_config(environ={}, overrides={"device.uuids": written}).device.uuids == read
    assert load_config(environ={"CPE_DEVICE__UUIDS": written}).device.uuids == read


def test_endpoints_may_be_written_as_in_the_file() -> None:
    listen = load_config(
        environ={}, overrides={"ingest.listen": '["tcp://[::1]:0", "tcp://0.0.0.0:5555"]'}
    ).ingest.listen
    assert listen == ("tcp://[::1]:0", "tcp://0.0.0.0:5555")
    with pytest.raises(ConfigError, match="must be text"):
        load_config(environ={}, overrides={"device.uuids": "[1]"})


def test_flag_is_named_once_in_what_is_wrong_with_it() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={}, overrides={"device.slots": "x"})
    assert str(caught.value).startswith("--set device.slots: must be")


def test_environment_is_read_as_the_file_is() -> None:
    config = load_config(
        environ={
            "CPE_INGEST__INSECURE": "true",
            "CPE_INGEST__LISTEN": "tcp://0.0.0.0:5555, tcp://[::1]:0",
            "CPE_DEADLINES__PAUSE_SECONDS": "500ms",
            "CPE_ARENA__SIZE_BYTES": "1.5GiB",
            "CPE_RUNTIME_DIR": "/tmp/x",
        }
    )
    assert config.front_endpoints == ("ipc:///tmp/x/front.sock", "tcp://0.0.0.0:5555", "tcp://[::1]:0")
    assert (config.deadlines.pause_seconds, config.arena.size_bytes) == (0.5, 3 << 29)


def test_other_variables_with_the_prefix_are_left_alone() -> None:
    load_config(environ={"CPE_PORT": "tcp://10.0.0.1:80", "CPE_SERVICE_HOST": "10.0.0.1", "CPE_DEBUG": "1"})


def test_empty_file_and_empty_section_mean_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cpe.yaml"
    for text in ("", "# nothing\n", "log:\n  # level: debug\n"):
        path.write_text(text)
        assert load_config(path, environ={}) == load_config(environ={})


def test_yaml_dates_and_names_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "cpe.yaml"
    path.write_text("node: 2024-01-01\n")
    assert load_config(path, environ={}).node == "2024-01-01"


# --- what is refused -----------------------------------------------------------------------------


def test_every_problem_is_reported_at_once_in_order(tmp_path: Path) -> None:
    text = """\
arena:
  sizes_bytes: 4GiB
  prefault_threads: 9999
device:
  slot_bytes: 1000001
  slots: three
  kind: tpu
deadlines: {bucket_seconds: 100000}
nod: x
"""
    environ = {"CPE_DEVICE__GPUS": "12", "CPE_LOG_LEVEL": "debug", "CPE_LOG__LEVL": "debug"}
    overrides = {"deadlines.pause": "3s", "retention.versions": "-1"}
    assert refused(text, tmp_path, environ=environ, overrides=overrides) == [
        "F:2: arena.sizes_bytes: is no setting; did you mean arena.size_bytes?",
        "F:3: arena.prefault_threads: must be at most 256, not 9999",
        "F:5: device.slot_bytes: 1000001 is not a multiple of 256; write 999936 or 1000192",
        "F:6: device.slots: must be a whole number, not 'three'",
        "F:7: device.kind: must be one of shm, cuda, not 'tpu'",
        "F:8: deadlines.bucket_seconds: must be at most 24h, not 100000",
        "F:9: nod: is no setting; did you mean node?",
        "environment variable CPE_LOG_LEVEL: names no setting; did you mean CPE_LOG__LEVEL?",
        "environment variable CPE_LOG__LEVL: names no setting; did you mean CPE_LOG__LEVEL?",
        "--set deadlines.pause: names no setting; did you mean deadlines.pause_seconds?",
        "environment variable CPE_DEVICE__GPUS: device.gpus: must be at most 8, not '12'",
        "--set retention.versions: must be at least 0, not '-1'",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1,\n", r"F:2: is not YAML: .*"),
        ("a: 1\n\tb: 2\n", r"F:2: is not YAML: .*"),
        ("a: 1\n---\nb: 2\n", r"F:2: is not YAML: .*document.*"),
        ("- a\n", r"F:1: holds no settings.*"),
        (
            "device:\n  slots: 4\n  slots: 5\n",
            r"F:3: device.slots: is set twice \(first at line 2\); remove one",
        ),
        ("device: 3\n", r"F:1: device: is a section; .*"),
        ("device:\n  slots:\n", r"F:2: device.slots: has no value; .*"),
        ("device:\n  slots: true\n", r"F:2: device.slots: is a number, not true"),
        ("device:\n  slots: 4.5\n", r"F:2: device.slots: must be a whole number, not 4.5"),
        ("node: 17\n", r"F:1: node: must be text; write it in quotes, not 17"),
        ("ingest:\n  insecure: maybe\n", r"F:2: ingest.insecure: must be true or false, not 'maybe'"),
        ("ingest:\n  listen: {a: b}\n", r"F:2: ingest.listen: must be a list.*"),
        ("slot_bytes: 1MiB\n", r"F:1: slot_bytes: is no setting; did you mean device.slot_bytes\?"),
        ("log:\n  zzz: 1\n", r"F:2: log.zzz: is no setting; there are level, format"),
        ("log:\n  level: loud\n", r"F:2: log.level: must be one of debug, info, warning, error, not 'loud'"),
        (
            "deadlines:\n  hello_seconds: .inf\n",
            r"F:2: deadlines.hello_seconds: must be finite, not inf",
        ),
        ("deadlines:\n  hello_seconds: .nan\n", r"F:2: deadlines.hello_seconds: must be finite, not nan"),
        (
            "deadlines:\n  heartbeat_lost_seconds: 1s\n",
            r"F:2: .*less than two heartbeats of 1s; .*at least 2s.*",
        ),
        (
            "deadlines:\n  receive_total_seconds: 9s\n",
            r"F:2: .*shorter than deadlines.receive_idle_seconds.*",
        ),
        ("runtime_dir: run/cpe\n", r"F:1: runtime_dir: 'run/cpe' is relative; .*"),
        ("state_dir: state\n", r"F:1: state_dir: 'state' is relative; .*"),
        ("a: &a\n  b: *a\n", r"F:1: a: is nested too deeply"),
        ("node: !!python/object:os.system x\n", r"F:1: node: has the tag !!python/object:os.system, .*"),
    ],
)
def test_file_is_refused_with_its_line(text: str, line: str, tmp_path: Path) -> None:
    lines = refused(text, tmp_path)
    assert re.fullmatch(line, lines[0]), lines


def test_flag_for_a_section_names_its_settings() -> None:
    with pytest.raises(ConfigError, match=r"--set arena: names a section; set arena.size_bytes, arena.pre"):
        load_config(environ={}, overrides={"arena": "4GiB"})


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml", environ={})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(binary, environ={})


def test_setting_below_a_scalar_does_not_hide_the_scalar(tmp_path: Path) -> None:
    lines = refused("device: 3\n", tmp_path, environ={"CPE_DEVICE__SLOTS": "4"})
    assert lines == ["F:1: device: is a section; write its settings below it, indented (got 3)"]


# --- endpoints and paths -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:5555",
        "tcp://*:5555",
        "tcp://127.0.0.1:0",
        "tcp://[::]:1",
        "tcp://eth0:5555",
        "ipc:///run/a.sock",
    ],
)
def test_endpoint_is_taken(endpoint: str) -> None:
    config = Config.model_validate({"ingest": {"listen": [endpoint], "insecure": True}})
    assert config.ingest.listen == (endpoint,)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("udp://1.2.3.4:5", "not an endpoint"),
        ("1.2.3.4:5", "not an endpoint"),
        ("tcp://1.2.3.4", "address and a port"),
        ("tcp://:5", "address and a port"),
        ("tcp://1.2.3.4:70000", "no valid port"),
        ("tcp://1.2.3.4:http", "no valid port"),
        ("tcp://::1:5", "brackets"),
        ("tcp://localhost:5", "names are not resolved"),
        ("tcp://gpu-17.cluster.example.com:5", "names are not resolved"),
        ("tcp://300.1.1.1:5", "names are not resolved"),
        ("ipc://@cpe", "abstract"),
        ("ipc://front.sock", "absolute path"),
        ("ipc://*", "absolute path"),
        ("ipc:///" + "x" * SOCKET_PATH_BYTES, "unix socket allows"),
    ],
)
def test_endpoint_is_refused(endpoint: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(environ={}, overrides={"ingest.listen": [endpoint], "ingest.insecure": "true"})


@pytest.mark.parametrize("insecure", [False, True])
def test_tcp_may_be_listened_on_with_keys_and_without(insecure: bool) -> None:
    endpoint = "tcp://0.0.0.0:5555"
    config = load_config(environ={}, overrides={"ingest.listen": endpoint, "ingest.insecure": insecure})
    assert config.front_endpoints[1:] == (endpoint,)
    assert config.ingest.insecure is insecure


def test_keys_are_kept_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.getuid", lambda: 1000)
    monkeypatch.setattr("cpe_daemon.config.paths.SYSTEM_KEYS_DIR", tmp_path / "system")
    assert default_keys_dir({"HOME": "/home/me"}) == Path("/home/me/.config/cpe/keys")
    assert default_keys_dir({"HOME": "/home/me", "XDG_CONFIG_HOME": "/conf"}) == Path("/conf/cpe/keys")
    assert default_keys_dir({"HOME": "/home/me", "XDG_CONFIG_HOME": "relative"}) == Path("/home/me/.config/cpe/keys")
    assert default_keys_dir({"HOME": "/", "CONFIGURATION_DIRECTORY": "/etc/cpe"}) == Path("/etc/cpe/keys")
    assert default_keys_dir({"HOME": "/h", "CONFIGURATION_DIRECTORY": "/a:/b"}) == Path("/h/.config/cpe/keys")
    (tmp_path / "system").mkdir()
    assert default_keys_dir({"HOME": "/home/me"}) == tmp_path / "system"


def test_root_keeps_keys_in_etc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert default_keys_dir({"XDG_CONFIG_HOME": "/conf"}) == Path("/etc/cpe-daemon/keys")


def test_keys_dir_is_absolute(tmp_path: Path) -> None:
    (line,) = refused("security:\n  keys_dir: keys\n", tmp_path)
    assert line.startswith("F:2: security.keys_dir: ")


def test_endpoint_named_twice_is_refused() -> None:
    own = [[f"ipc:///run/x/{name}.sock"] for name in ("front", "engines", "handoff")]
    for listen in (*own, ["ipc:///run/y.sock", "ipc:///run/y.sock"]):
        with pytest.raises(ConfigError, match="there already"):
            load_config(environ={}, overrides={"runtime_dir": "/run/x", "ingest.listen": listen})


def test_runtime_dir_leaves_room_for_sockets() -> None:
    longest = "/" + "d" * (SOCKET_PATH_BYTES - 25)
    config = load_config(environ={}, overrides={"runtime_dir": longest})
    assert len(config.front_endpoint.removeprefix("ipc://").encode()) <= SOCKET_PATH_BYTES
    with pytest.raises(ConfigError, match="choose a shorter one"):
        load_config(environ={}, overrides={"runtime_dir": longest + "d"})


def test_default_runtime_dir_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cpe_daemon.config.paths.SYSTEM_DIR", tmp_path / "absent")
    monkeypatch.setattr("os.getuid", lambda: 1000)
    assert default_runtime_dir({"XDG_RUNTIME_DIR": "/run/user/1000"}) == Path("/run/user/1000/cpe")
    assert default_runtime_dir({}) == Path("/tmp/cpe-1000")
    assert default_runtime_dir({"XDG_RUNTIME_DIR": "relative"}) == Path("/tmp/cpe-1000")
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert default_runtime_dir({"XDG_RUNTIME_DIR": "/run/user/0"}) == tmp_path / "absent"


def test_default_state_dir_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cpe_daemon.config.paths.SYSTEM_STATE_DIR", tmp_path / "lib")
    monkeypatch.setattr("os.getuid", lambda: 1000)
    home = {"HOME": "/home/ann"}
    assert default_state_dir({"XDG_STATE_HOME": "/home/ann/state", **home}) == Path("/home/ann/state/cpe")
    assert default_state_dir(home) == Path("/home/ann/.local/state/cpe")
    assert default_state_dir({"XDG_STATE_HOME": "relative", **home}) == Path("/home/ann/.local/state/cpe")
    (tmp_path / "lib").mkdir()
    assert default_state_dir(home) == tmp_path / "lib"
    with monkeypatch.context() as others:
        others.setattr("os.access", lambda path, mode: False)
        assert default_state_dir(home) == Path("/home/ann/.local/state/cpe"), "it is the service's, and not for ann"
    (tmp_path / "lib").rmdir()
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert default_state_dir(home) == tmp_path / "lib"


def test_default_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cpe_daemon.config.paths.SYSTEM_DIR", tmp_path / "absent")
    monkeypatch.setattr("os.getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/x" * 60)
    with pytest.raises(ConfigError, match=r"^runtime_dir: the path has"):
        load_config(environ={})


# --- what is shipped -----------------------------------------------------------------------------


def test_shipped_default_is_the_annotated_default() -> None:
    assert (CONFIGS / "default.yaml").read_text() == annotated_default(), (
        "regenerate: cpe config --default > configs/default.yaml"
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_file_loads(path: Path) -> None:
    config = load_config(path, environ={})
    if path.name == "default.yaml":
        assert config == load_config(environ={})


def test_effective_configuration_loads_back(tmp_path: Path) -> None:
    overrides = {
        "ingest.insecure": True,
        "ingest.listen": ["tcp://[::1]:6"],
        "arena.size_bytes": "3.25GiB",
        "node": "on",
    }
    loaded = load_with_origins(environ={}, overrides=overrides)
    path = tmp_path / "cpe.yaml"
    path.write_text(effective(loaded))
    assert load_config(path, environ={}) == loaded.config
