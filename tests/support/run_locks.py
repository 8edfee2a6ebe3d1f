"""Processes that race for the locks of runs."""

import multiprocessing
import time

import fsspec

from medray.errors import RunHeld
from medray.running.run_lock import RunLock


def try_all(fs, roots, local, number, barrier, results):
    """Try to take each run at the same moment as the others; hold it until all have tried."""
    held = []
    for turn, root in enumerate(roots):
        lock = RunLock(fs, root, root, local)
        barrier.wait(60)
        try:
            lock.acquire()
            held.append((turn, lock))
            results.put((turn, number))
        except RunHeld as refused:
            results.put((turn, str(refused)))
        barrier.wait(60)  # the next run while this one is held
    for _, lock in held:
        lock.release()


def race(fs, roots, local=True, processes=4):
    """For each run: the number of processes that got it, and what the others were told."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    racers = [
        context.Process(target=try_all, args=(fs, roots, local, number, barrier, results))
        for number in range(processes)
    ]
    for racer in racers:
        racer.start()
    found = {turn: [] for turn in range(len(roots))}
    for _ in range(processes * len(roots)):
        turn, said = results.get(timeout=60)
        found[turn].append(said)
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    return [
        (
            [said for said in found[turn] if isinstance(said, int)],
            [said for said in found[turn] if isinstance(said, str)],
        )
        for turn in found
    ]


def beating(lock_file, fs=None):
    """Touch a lock's file for ever, as an owner on another machine does."""
    while True:
        (fs or fsspec.filesystem("file")).touch(lock_file, truncate=False)
        time.sleep(0.05)
