"""The leak check finds what it is for: a check that never fails protects nothing."""

import asyncio
import os
import threading
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from tests.leaks import Holdings


def test_leaks_is_empty_when_all_was_given_back() -> None:
    before = Holdings.take()
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.close(write_end)
    assert before.leaks(wait_seconds=0) == []


def test_leaks_names_a_descriptor_that_stays_open() -> None:
    before = Holdings.take()
    descriptor = os.memfd_create("leaked")
    try:
        (leak,) = before.leaks(wait_seconds=0)
    finally:
        os.close(descriptor)
    assert leak.startswith(f"fd {descriptor} -> /memfd:leaked")


def test_leaks_names_a_descriptor_whose_number_was_reused() -> None:
    descriptor = os.memfd_create("first")
    before = Holdings.take()
    os.dup2(second := os.memfd_create("second"), descriptor)
    os.close(second)
    try:
        (leak,) = before.leaks(wait_seconds=0)
    finally:
        os.close(descriptor)
    assert "second" in leak


def test_leaks_names_a_thread_that_runs_on() -> None:
    before = Holdings.take()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="runs-on")
    thread.start()
    try:
        assert before.leaks(wait_seconds=0) == ["thread runs-on"]
    finally:
        stop.set()
        thread.join()


def test_leaks_waits_for_a_thread_that_is_ending() -> None:
    before = Holdings.take()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    threading.Timer(0.05, stop.set).start()
    assert before.leaks(wait_seconds=10) == []


def test_leaks_names_shared_memory() -> None:
    before = Holdings.take()
    left = Path("/dev/shm") / f"cpe-left-{os.getpid()}"
    left.touch()
    segment = shared_memory.SharedMemory(create=True, size=4096)
    segment.close()
    try:
        leaks = before.leaks(wait_seconds=0)
        assert str(left) in leaks
        assert f"/dev/shm/{segment.name}" not in leaks, "engines of other programs make such"
    finally:
        left.unlink()
        segment.unlink()


async def test_no_leaks_passes_a_coroutine_that_uses_the_loops_own_threads(no_leaks: None) -> None:
    assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()


@pytest.mark.gpu
def test_gpu_marker_means_a_gpu_is_there() -> None:
    import torch

    assert torch.cuda.device_count() > 0
