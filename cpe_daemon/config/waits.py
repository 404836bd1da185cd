"""One table of every wait: how long it may take, what then happens, and which test exercises it.

docs/DEADLINES.md is written out of it. Tests hold it against the code: no deadline of the settings and no constant that
ends in ``_SECONDS`` may be missing.
"""

from __future__ import annotations

import importlib
from typing import Final, NamedTuple

from cpe_daemon.config.deadlines import DeadlinesConfig

DEADLINE: Final = "deadline"
"""The code of a `cpe_daemon.errors.DeadlineError`."""

_VERSIONS: Final = "cpe_failures_total"
_ENGINES: Final = "cpe_engine_failures_total"
_NONE: Final = "-"


class Wait(NamedTuple):
    """One wait.

    Attributes:
        where: a setting, ``deadlines.NAME``, or a constant by its module.
        what: is waited for.
        then: what happens when it is over.
        error: its code; "-": none is raised.
        metric: that counts it; "-": none.
        test: that exercises it, as pytest names it without parameters.
    """

    where: str
    what: str
    then: str
    error: str
    metric: str
    test: str


def seconds_of(wait: Wait) -> float:
    """How long it is, by default.

    Raises:
        AttributeError: there is no such wait any more.
    """
    room, _, name = wait.where.rpartition(".")
    if room == "deadlines":
        return float(getattr(DeadlinesConfig(), name))
    return float(getattr(importlib.import_module(room), name))


_PHASE: Final = "tests/unit/test_deadlines.py::test_engine_that_hangs_in_a_phase_is_dropped_at_its_deadline"
_DROPPED: Final = "the engine leaves the round, and is restored if it was touched"

WAITS: Final = (
    # --- trainers
    Wait(
        "deadlines.receive_idle_seconds",
        "the next byte of a version from any rank",
        "the version fails, its bytes are let go",
        DEADLINE,
        _VERSIONS,
        "tests/unit/test_repeats.py::test_version_that_stalls_fails_at_its_deadline",
    ),
    Wait(
        "deadlines.receive_total_seconds",
        "a version, whole",
        "the version fails, its bytes are let go",
        DEADLINE,
        _VERSIONS,
        "tests/unit/test_repeats.py::test_version_that_takes_too_long_in_all_fails",
    ),
    Wait(
        "deadlines.reserve_seconds",
        "room in the arena that is about to be released",
        "the version fails, naming need and room",
        DEADLINE,
        _VERSIONS,
        "tests/integration/test_daemon_faults.py::test_room_that_does_not_come_in_time_is_a_deadline",
    ),
    Wait(
        "cpe_daemon.ingest.digesting._PATIENCE_SECONDS",
        "nothing to be received or pushed, so that what was only copied can be digested",
        "it is digested beside that",
        _NONE,
        _NONE,
        "tests/unit/test_digesting.py::test_node_that_is_never_quiet_digests_in_the_end",
    ),
    Wait(
        "cpe_daemon.publisher.session._WELCOME_SECONDS",
        "a daemon's welcome",
        "hello is said again, until the publish's own deadline",
        _NONE,
        _NONE,
        "tests/unit/test_publisher.py::test_absent_daemon_is_lost_after_the_connect_timeout",
    ),
    # --- engines
    Wait(
        "deadlines.hello_seconds",
        "the other ranks of an engine; the engines of before a restart; a client's handshake over tcp",
        "the engine gets no versions until they are there; the connection is cut",
        DEADLINE,
        _NONE,
        "tests/unit/test_registry.py::test_engine_that_lacks_workers_is_complained_of_once",
    ),
    Wait(
        "deadlines.heartbeat_lost_seconds",
        "any word of a client",
        "it counts as gone",
        "peer_lost",
        _NONE,
        "tests/unit/test_registry.py::test_silent_worker_is_given_up",
    ),
    Wait("deadlines.check_seconds", "whether a version fits an engine", _DROPPED, DEADLINE, _ENGINES, _PHASE),
    Wait(
        "deadlines.arrive_seconds",
        "a server that starts to take calls, where no other engine takes a version",
        "the version is pushed all the same, and has failed",
        "-",
        _NONE,
        "tests/unit/test_arrival.py::test_server_that_never_takes_calls_costs_a_deadline",
    ),
    Wait(
        "deadlines.wake_seconds",
        "an engine that sleeps to be awake",
        "the engine is left out of the round",
        DEADLINE,
        _ENGINES,
        "tests/unit/test_deadlines.py::test_engine_that_does_not_wake_up_is_passed_over_at_its_deadline",
    ),
    Wait("deadlines.pause_seconds", "an engine to stop serving", _DROPPED, DEADLINE, _ENGINES, _PHASE),
    Wait(
        "deadlines.begin_seconds", "workers to be ready; to open or close slots", _DROPPED, DEADLINE, _ENGINES, _PHASE
    ),
    Wait("deadlines.bucket_seconds", "a bucket to be loaded", _DROPPED, DEADLINE, _ENGINES, _PHASE),
    Wait("deadlines.finish_seconds", "weights to be post-processed and verified", _DROPPED, DEADLINE, _ENGINES, _PHASE),
    Wait("deadlines.resume_seconds", "an engine to serve again", _DROPPED, DEADLINE, _ENGINES, _PHASE),
    Wait(
        "deadlines.abort_seconds",
        "workers to let go of a round that has failed",
        "the engine is in doubt, and is restored or stays paused",
        DEADLINE,
        _ENGINES,
        "tests/unit/test_deadlines.py::test_engine_that_does_not_let_go_of_a_failed_round_is_in_doubt_after_a_deadline",
    ),
    Wait(
        "deadlines.stuck_seconds",
        "one copy in host memory or to a GPU",
        "the daemon is not healthy, and its watchdog is not fed",
        _NONE,
        "cpe_copy_stuck_seconds",
        "tests/integration/test_service.py::test_watchdog_is_not_fed_while_a_copy_is_stuck",
    ),
    Wait(
        "cpe_daemon.devices.cuda.device._ISSUE_SECONDS",
        "another GPU's copies to be issued",
        "the bucket's copies fail, and with them the round",
        "resource",
        _VERSIONS,
        "tests/unit/test_cuda_device.py::test_exchange_does_not_wait_for_ever_for_a_fetch_that_is_not_issued",
    ),
    # --- in an engine
    Wait(
        "inference_plugins.receiver._HELLO_EVERY_SECONDS",
        "a welcome",
        "hello is said again",
        _NONE,
        _NONE,
        "tests/unit/test_receiver.py::test_void_welcome_is_passed_over_without_another_hello",
    ),
    Wait(
        "inference_plugins.gated._ENTER_SECONDS",
        "a server's own thread to be in the update",
        "the step fails",
        "engine",
        _ENGINES,
        "tests/unit/test_vllm_loader.py::test_begin_waits_for_vllms_thread",
    ),
    Wait(
        "inference_plugins.torch.loader._REST_SECONDS",
        "GPUs to come to rest where no deadline is given",
        "the step fails",
        DEADLINE,
        _ENGINES,
        "tests/unit/test_torch_gpus.py::test_gpu_that_does_not_come_to_rest_is_a_deadline_and_no_hang",
    ),
    # --- the state directory and keys
    Wait(
        "deadlines.journal_seconds",
        "what is about to be done to be on the disk",
        "the push goes on; status and the log say that the journal is behind",
        DEADLINE,
        "cpe_journal_failing",
        "tests/unit/test_journal.py::test_stuck_disk_costs_rounds_one_deadline_and_not_one_each",
    ),
    Wait(
        "cpe_daemon.statefile._WRITE_SECONDS",
        "a file of the state directory to be written",
        "what was asked for fails",
        DEADLINE,
        _NONE,
        "tests/unit/test_expected.py::test_stuck_disk_is_a_deadline",
    ),
    Wait(
        "cpe_daemon.links.curve._READ_SECONDS",
        "the allowed keys to be read",
        "those that were read last count, and status says so",
        DEADLINE,
        _NONE,
        "tests/unit/test_curve.py::test_revocation_counts_after_reads_that_hang",
    ),
    # --- connections
    Wait(
        "cpe_daemon.links.handoff._CLAIM_SECONDS",
        "a claim of memory to be made, or answered",
        "the connection is cut",
        "peer",
        _NONE,
        "tests/unit/test_handoff.py::test_claim_of_a_mute_daemon_ends_at_its_deadline",
    ),
    Wait(
        "cpe_daemon.observe.http.CONNECTION_SECONDS",
        "a request, its answer and the client to take it",
        "the connection is cut",
        _NONE,
        _NONE,
        "tests/unit/test_http.py::test_page_that_hangs_ends_with_its_connection",
    ),
    Wait(
        "cpe_daemon.wire.operator.WAIT_FORGOTTEN_SECONDS",
        "a client that waits for a version to say that it still does",
        "it is forgotten",
        _NONE,
        _NONE,
        "tests/unit/test_waiting.py::test_operator_who_does_not_say_it_again_is_forgotten",
    ),
    # --- the end
    Wait(
        "deadlines.drain_seconds",
        "the push in flight to end by itself",
        "it is undone",
        _NONE,
        _NONE,
        "tests/integration/test_service.py::test_push_that_does_not_end_in_time_is_undone",
    ),
    Wait(
        "deadlines.undo_seconds",
        "the push in flight to be undone",
        "the daemon stops; the engines that are in doubt stay paused, and are named",
        _NONE,
        _NONE,
        "tests/integration/test_service.py::test_push_that_does_not_end_in_time_is_undone",
    ),
    Wait(
        "cpe_daemon.daemon.drain.FAREWELL_SECONDS",
        "trainers and workers to let go",
        "the daemon stops all the same",
        _NONE,
        _NONE,
        "tests/integration/test_service.py::test_farewell_is_no_reason_to_worry",
    ),
    Wait(
        "cpe_daemon.daemon.drain.CLOSE_SECONDS",
        "threads to end",
        "the process ends without them",
        _NONE,
        _NONE,
        "tests/integration/test_service.py::test_daemon_with_a_stuck_copy_ends_all_the_same",
    ),
    Wait(
        "cpe_daemon.publisher.publisher._CLOSE_SECONDS",
        "a publisher's thread to end",
        "close returns without it",
        _NONE,
        _NONE,
        "tests/unit/test_publisher.py::test_close_returns_though_nobody_answers",
    ),
)
"""All of them, in the order of a version's way."""
