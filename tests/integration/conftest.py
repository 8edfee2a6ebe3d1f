"""A local S3-compatible server, and waiting for things."""

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from medray.testbed.fake_cluster import free_port

BIN = Path(sys.executable).parent
BUCKET = "medray-tests"


def wait_for(ready, what, seconds=600, pause=0.3):
    until = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < until, f"no {what} after {seconds} s"
        time.sleep(pause)
    return value


def answer_of(url):
    """What a GET of it is answered; None where nobody listens yet."""
    try:
        return httpx.get(url, timeout=60)
    except httpx.TransportError:
        return None


def wait_until_served(process, url, seconds=600, log=None):
    """Until a GET of it is answered with 200 by the process, which must not end before; the file `log` is
    what it says.
    """

    def served():
        assert process.poll() is None, log and log.read_text()[-3000:]
        answer = answer_of(url)
        return answer is not None and answer.status_code == 200

    wait_for(served, f"answer from {url}", seconds)


@pytest.fixture(scope="session")
def s3():
    """A local S3-compatible server with one empty bucket; yields the environment that leads to it, and
    its filesystem.
    """
    import s3fs

    port = free_port()
    server = subprocess.Popen(
        [BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    # fsspec keeps file systems by their arguments, which do not say the server: one of another module's
    # server is not ours.
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        fs = s3fs.S3FileSystem(
            key="test", secret="test", endpoint_url=environment["AWS_ENDPOINT_URL"], use_listings_cache=False
        )
        wait_until_served(server, environment["AWS_ENDPOINT_URL"])
        fs.mkdir(BUCKET)
        yield environment, fs
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.terminate()
        server.wait()
