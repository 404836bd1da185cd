"""Plays the daemon's half in a process of its own: holds slots in a GPU's memory, and fills them as it is told.

``python -m tests.gpu.slot_holder NUMBER COUNT SLOT_BYTES`` takes the slots on a GPU and says its UUID and the handle.
Then each line ``SLOT NBYTES`` on its standard input, with so many bytes after it, fills a slot from its beginning; it
answers when they are there. It needs no torch, as the daemon does not.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from cpe_daemon.devices.cuda.driver import driver
from cpe_daemon.wire.messages import SlotSet

_ROOT = Path(__file__).parent.parent.parent
_END_SECONDS = 20.0


def main(number: int, count: int, slot_bytes: int) -> None:
    cuda = driver()
    device = cuda.devices()[number]
    cuda.use(cuda.retain(device))
    address, stream, event = cuda.allocate(count * slot_bytes), cuda.create_stream(), cuda.create_event()
    print(cuda.uuid(device), cuda.export(address).hex(), flush=True)
    while line := sys.stdin.buffer.readline():
        slot, nbytes = map(int, line.split())
        content = bytearray(sys.stdin.buffer.read(nbytes))
        source = ctypes.addressof(ctypes.c_char.from_buffer(content))
        cuda.copy_to_device(address + slot * slot_bytes, source, nbytes, stream)
        cuda.record(event, stream)
        cuda.wait(event)
        print("filled", flush=True)
    cuda.free(address)


class SlotHolder:
    """The process, as a test uses it."""

    def __init__(self, number: int, count: int, slot_bytes: int) -> None:
        command = [sys.executable, "-m", "tests.gpu.slot_holder", str(number), str(count), str(slot_bytes)]
        self._process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        uuid, handle = self._read().split()
        self.slots = SlotSet("cuda", uuid, count, slot_bytes, [bytes.fromhex(handle)])

    def fill(self, slot: int, content: bytes) -> None:
        """Overwrite a slot; returns when the bytes are there."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d %d\n" % (slot, len(content)) + content)
        self._process.stdin.flush()
        assert self._read() == "filled"

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        assert line, f"the process that holds the slots ended with {self._process.wait(_END_SECONDS)}"
        return line

    def __enter__(self) -> SlotHolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; it frees its memory, so whoever opened that has closed it by now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(_END_SECONDS)
        finally:
            self._process.kill()
            self._process.stdout.close()
        assert code == 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
