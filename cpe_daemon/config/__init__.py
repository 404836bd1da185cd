"""Settings: what they are, where they come from, and what is wrong with them.

`model` alone says what is valid. `sources` and `yamlfile` read raw values with the places they were written
at, `load` joins and judges them, `render` writes them out for people. The rest of the daemon sees the
immutable `Config`.
"""

from cpe_daemon.config.bootstrap import BootstrapConfig
from cpe_daemon.config.deadlines import DeadlinesConfig
from cpe_daemon.config.http import HttpConfig
from cpe_daemon.config.load import Loaded, load_config, load_with_origins
from cpe_daemon.config.model import (
    ArenaConfig,
    Config,
    DeviceConfig,
    IngestConfig,
    LogConfig,
    RetentionConfig,
)
from cpe_daemon.config.models import ModelConfig
from cpe_daemon.config.paths import (
    ENGINES_FILE,
    ENGINES_SOCKET,
    FRONT_SOCKET,
    HANDOFF_SOCKET,
    JOURNAL_FILE,
    default_runtime_dir,
    default_state_dir,
)
from cpe_daemon.config.push import PushConfig
from cpe_daemon.config.render import annotated_default, effective
from cpe_daemon.config.security import SecurityConfig

__all__ = [
    "ENGINES_FILE",
    "ENGINES_SOCKET",
    "FRONT_SOCKET",
    "HANDOFF_SOCKET",
    "JOURNAL_FILE",
    "ArenaConfig",
    "BootstrapConfig",
    "Config",
    "DeadlinesConfig",
    "DeviceConfig",
    "HttpConfig",
    "IngestConfig",
    "Loaded",
    "LogConfig",
    "ModelConfig",
    "PushConfig",
    "RetentionConfig",
    "SecurityConfig",
    "annotated_default",
    "default_runtime_dir",
    "default_state_dir",
    "effective",
    "load_config",
    "load_with_origins",
]
