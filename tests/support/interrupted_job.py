"""A job whose second stage does what the first argument says. Prints "now" when it is there.

    python tests/support/interrupted_job.py CASE RUN GRACE

GRACE is medray.running.interrupts.GRACE_SECONDS, so that a test of an end by force need not wait for it.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import medray.running.interrupts
from medray.commands.command_line import run_job
from medray.config import ClusterConfig
from medray.errors import StageError
from medray.running.ray_session import ray_session
from medray.running.run import Run
from medray.running.run_hold import held

CASE, RUN, GRACE = sys.argv[1:]


def now():
    print("now", flush=True)


def ignore(*_):
    """A library's handler, which drops the signal."""


def sleeping():
    now()
    time.sleep(600)


def handlers_replaced():
    signal.signal(signal.SIGINT, ignore)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    now()
    while True:
        time.sleep(1)


def in_c_code():
    now()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)


def interrupt_dropped():
    """As in a callback or a destructor, whose exceptions Python only prints."""

    class Dropping:
        def __del__(self):
            now()
            time.sleep(3)

    Dropping()
    time.sleep(600)


def interrupt_made_an_error():
    now()
    try:
        time.sleep(600)
    except KeyboardInterrupt as interrupt:
        raise StageError("a library says that something failed") from interrupt


def waiting_for_http():
    server = socket.create_server(("127.0.0.1", 0))
    now()
    urllib.request.urlopen(f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout=600)


def in_another_thread():
    thread = threading.Thread(target=time.sleep, args=(600,), daemon=True)
    thread.start()
    now()
    thread.join()


def shutdown_hangs():
    try:
        sleeping()
    finally:
        time.sleep(600)


def nobody_reads():
    """Standard error is a pipe that is full."""
    os.dup2(os.pipe()[1], 2)
    now()
    while True:
        os.write(2, b"x" * 65536)


def nobody_reads_why_it_failed():
    """The pipe is full when the job has failed."""
    pipe = os.pipe()[1]
    os.dup2(pipe, 2)
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(2, True)
    now()
    raise StageError("no pair is left")


def with_a_child():
    subprocess.Popen(["sleep", "614"])
    sleeping()


def ray_starts():
    now()
    with ray_session(ClusterConfig(num_cpus=1)):
        time.sleep(600)


def trained(seconds):
    import ray.train

    from medray.train.trainer import Trainer

    begun = f"{RUN}/training"

    def loop():
        open(begun, "w").close()
        time.sleep(seconds)

    def wait():
        while not os.path.exists(begun):
            time.sleep(0.1)
        now()

    if seconds:
        threading.Thread(target=wait, daemon=True).start()
    Trainer(
        loop,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="t", storage_path=f"{RUN}/t"),
    ).fit()


def training():
    with ray_session(ClusterConfig(num_cpus=2)):
        trained(600)


def after_a_training():
    with ray_session(ClusterConfig(num_cpus=2)):
        trained(0)
        sleeping()


def ray_data():
    import ray

    def slow(row):
        time.sleep(600)
        return row

    with ray_session(ClusterConfig(num_cpus=2)):
        threading.Timer(3, now).start()
        ray.data.range(4).map(slow).materialize()


def raylet_dies():
    import psutil
    import ray

    @ray.remote
    def task():
        return 1

    with ray_session(ClusterConfig(num_cpus=1)):
        ray.get(task.remote())
        for process in psutil.Process().children(recursive=True):
            if "raylet/raylet" in " ".join(process.cmdline()):
                process.kill()
        while True:
            ray.get(task.remote())
            time.sleep(0.1)


def work():
    run = Run(RUN)
    with held(run):
        run.stage("01-first", {}, lambda _: {})
        run.stage("02-second", {}, lambda _: globals()[CASE]() or {})
    return {}


if __name__ == "__main__":
    medray.running.interrupts.GRACE_SECONDS = float(GRACE)
    sys.exit(run_job(work, f"--run {RUN}"))
