"""One engine on a stage: the steps of rounds as a daemon asks for them, and what must be true after each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from cpe_daemon.core.types import VersionId
from cpe_daemon.wire.messages import Abort, Begin, Check, Expect, Finish, Halt, Load, Pause, Resume, TensorPart
from inference_plugins.testing.attached import SLOTS, Attached
from inference_plugins.testing.errors import ConformanceError, StepRefusedError
from inference_plugins.testing.plugin import Plugin
from inference_plugins.testing.version import GARBAGE, Version, bytes_of, spec_of

Spoilt = Mapping[int, Sequence[TensorPart]]


class Stage(Attached):
    """An engine that serves, and the daemon that it is attached to. A context manager.

    Whatever a step promises is looked at here, so that a scenario only says what happens. A slot is overwritten with
    garbage as soon as the worker has said that it may be.

    Args:
        plugin: what is tried.
        slot_bytes: of each of the two slots; 0: as large as the largest module group.
    """

    def __init__(self, plugin: Plugin[Any], slot_bytes: int = 0) -> None:
        super().__init__(plugin, slot_bytes)
        specs = [spec_of(name, tensor) for name, tensor in plugin.checkpoint(0).items()]
        self.needed = plugin.needed or max(specs, key=lambda spec: spec.nbytes).name
        self.overwrites = True
        """Whether a slot is overwritten at once."""
        self.round = 0
        self._numbers = 0

    # --- versions and rounds -----------------------------------------------------------------------------------------

    def version(self, tensors: Mapping[str, torch.Tensor] | None = None) -> Version:
        """The next version: of these tensors, or of the plugin's own by the next seed."""
        self._numbers += 1
        return Version(self._numbers, tensors or self.plugin.checkpoint(self._numbers), self.slot_bytes)

    def push(self, version: Version, *, announced: bool = True, fits: bool = True) -> None:
        """One round from its question to its end; the engine holds the version and serves then.

        Args:
            version: what is loaded.
            announced: its tensors are told before the pause, as they are unless they are those of the version before.
            fits: its weights have to be the version's.

        Raises:
            StepRefusedError: a step failed; nothing was asked for after it.
        """
        self.round += 1
        if announced:
            self.check(version, self.round)
        self.pause()
        self.begin(version)
        self.load(version, range(len(version.buckets)))
        self.finish()
        self.resume(version.id)
        if fits:
            self.must_hold(version)

    def check(self, version: Version, number: int) -> None:
        """Ask whether a version fits; the engine goes on as it is."""
        served = self.serves
        self.daemon.say(Expect(number, 0, len(version.specs), version.specs))
        try:
            self.ask(Check(number))
        finally:
            if self.serves is not served:
                raise ConformanceError("it stopped or began to serve because it was asked whether a version fits")

    def pause(self) -> None:
        """Have it stop, as workers do whose siblings wait for them, if it has some."""
        passes = self.ask(Halt(self.round)).passes if self.hello.world_size > 1 else None
        self.ask(Pause(self.round, self.plugin.patience_seconds / 2, passes))
        self.must_not_serve("it was paused")

    def begin(self, version: Version) -> None:
        """Announce buckets."""
        begin = Begin(self.round, version.id, len(version.specs), version.nbytes, version.fold, version.digest)
        self.ask(begin)
        self.must_not_serve("an update was begun")

    def load(self, version: Version, buckets: Iterable[int], spoilt: Spoilt = MappingProxyType({})) -> None:
        """Have buckets loaded, as many at a time as there are slots.

        Args:
            version: whose.
            buckets: by number.
            spoilt: what is said of some of them in place of the truth.
        """
        due, free, loading = deque(buckets), deque(range(SLOTS)), dict[int, int]()
        failed: StepRefusedError | None = None
        while loading or (due and failed is None):
            while due and free and failed is None:
                seq, slot = due.popleft(), free.popleft()
                loading[seq] = slot
                version.fill(seq, self.slots[slot])
                self.daemon.say(Load(self.round, seq, slot, list(spoilt.get(seq, version.buckets[seq]))))
            answer = self.answer(f"answer to buckets {sorted(loading)}")
            if answer.seq not in loading:
                raise ConformanceError(f"buckets {sorted(loading)} were to be loaded, and {answer} came")
            slot = loading.pop(answer.seq)
            if self.overwrites:
                self.slots[slot].fill_(GARBAGE)
            free.append(slot)
            self.must_not_serve("buckets were loaded")
            try:
                self.judged(answer, self.round, "load")
            except StepRefusedError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def finish(self) -> None:
        """End the loading."""
        self.ask(Finish(self.round))
        self.must_not_serve("an update was finished, and it was not resumed yet")

    def resume(self, content: VersionId | None) -> None:
        """Let it serve."""
        self.ask(Resume(self.round, content))
        if not self.serves:
            raise ConformanceError("it was resumed, and does not serve")

    def give_up(self) -> bool:
        """Abort the round; whether the weights may be others than before it, as the worker says."""
        touched = self.ask(Abort(self.round, "the scenario gives it up")).touched
        self.must_not_serve("its round was given up")
        return touched

    def undo(self, held: Version) -> bool:
        """Give the round up, and have the engine serve what it held; True if that had to be loaded again.

        Raises:
            ConformanceError: it said that nothing was touched, and holds something else; or it can be resumed although
                its weights may be a mixture.
        """
        touched = self.give_up()
        if touched:
            self.must_refuse_to_resume(held)
            self.push(held)
        else:
            self.must_hold(held, "it said that no weight had been touched")
            self.resume(held.id)
        return touched

    # --- what must be true -------------------------------------------------------------------------------------------

    def must_serve(self, when: str) -> None:
        """Raise unless it serves."""
        if not self.serves:
            raise ConformanceError(f"it does not serve, although {when}")

    def must_not_serve(self, when: str) -> None:
        """Raise if it serves."""
        if self.serves:
            raise ConformanceError(f"it serves, although {when}")

    def must_refuse_to_resume(self, version: Version) -> None:
        """Raise if it can be resumed with weights that may be a mixture."""
        self.refused(Resume(self.round, version.id), "although its weights may be a mixture")
        self.must_not_serve("its weights may be a mixture")

    def must_hold(self, version: Version, because: str = "it was loaded") -> None:
        """Raise unless its weights are a version's, bit by bit."""
        wrong = self.differences(version)
        if wrong:
            named = ", ".join(wrong[:10])
            raise ConformanceError(f"its weights are not those of {version}, although {because}: {named}")

    def differences(self, version: Version) -> list[str]:
        """What is not as it is when a version is loaded: its names, each with the reason."""
        found = self.plugin.weights(self.engine)
        wrong = []
        for name, wanted in self.plugin.expected(version.tensors).items():
            have = found.get(name)
            if have is None:
                wrong.append(f"{name} is not there")
            elif have.shape != wanted.shape:
                wrong.append(f"{name} is {list(have.shape)}, not {list(wanted.shape)}")
            elif not torch.equal(bytes_of(have), bytes_of(wanted.to(have.dtype))):
                wrong.append(f"{name} has other values")
        return wrong
