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


def wait_for(ready, what, seconds=180, pause=0.3):
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


@pytest.fixture(scope="session")
def s3():
    """A local S3-compatible server with one empty bucket; yields the environment that leads to it, and its filesystem."""
    import s3fs

    port = free_port()
    server = subprocess.Popen([BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        fs = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=environment["AWS_ENDPOINT_URL"], use_listings_cache=False)

        def bucket_made():
            try:
                fs.mkdir(BUCKET)
            except OSError:
                return False
            return True

        wait_for(bucket_made, "S3 server")
        yield environment, fs
    finally:
        server.terminate()
        server.wait()
