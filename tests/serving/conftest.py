"""The page on a real Ray Serve, and a real browser."""

import io
import os
import shutil

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medray.clinicians.import_export import import_items
from medray.records import CLINICIAN_ITEM
from medray.serving.tokens import add_holder
from medray.testbed.fake_cluster import free_port

NASTY = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> '); DROP "
    "TABLE judgement; --"
)


def ramp():
    """256 x 128 pixels: the grey value is the column."""
    return np.tile(np.arange(256, dtype=np.uint8), (128, 1))


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def write_items():
    """Writes so many clinician items into a folder."""

    def write(folder, number, **changes):
        rows = [
            {
                "item_id": f"cell/{index}?&#",
                "image_id": f"image-{index}",
                "image": encoded(ramp()),
                "modality": "blood smear",
                "caption": f"Peripheral smear, field {index}.",
                "context": "In-text mention: a large cell with a lobed nucleus.",
                "dialogue_id": f"d{index}",
                "turn": 0,
                "question": f"Which cell is this? ({index})",
                "answer_a": "A neutrophil: the nucleus has lobes.",
                "answer_b": "A lymphocyte: the nucleus is round.",
                **changes,
            }
            for index in range(number)
        ]
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=CLINICIAN_ITEM), folder / "part-0.parquet")
        return str(folder)

    return write


@pytest.fixture(scope="session")
def clinicians(tmp_path_factory):
    """(tokens file, name -> token): clinicians of every test, and a lead."""
    file = str(tmp_path_factory.mktemp("tokens") / "clinicians.txt")
    names = ("ann", "ben", "eve", "kim", "tab", "mob", "html", "key", "down", "r0", "r1", "r2", "r3")
    return file, {name: add_holder(file, name) for name in names} | {
        "head": add_holder(file, "head", lead=True)
    }


@pytest.fixture(scope="package")
def serve_address(ray_cluster):
    """Ray Serve on a free port of this machine; gone, with the CPUs of its replicas, before the same
    process runs tests of another kind.
    """
    from ray import serve
    from ray.serve._private import api, client

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for module in (api, client):
            patch.setattr(module, "HTTP_PROXY_TIMEOUT", 600)  # 60, and no variable for it
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


@pytest.fixture(scope="package")
def served(serve_address, tmp_path_factory, write_items, clinicians):
    """(address, database URL, name -> token) of the page on Ray Serve: twelve items, everybody judges all
    of them, first the one whose texts try to be more than text.
    """
    from ray import serve

    from medray.serving.clinician_page.app import PageConfig, build

    folder = tmp_path_factory.mktemp("page")
    url = f"sqlite:///{folder}/judgements.db"
    import_items(
        write_items(folder / "nasty", 1, item_id="nasty?&#", question="What is wrong here?", caption=NASTY),
        url,
        priority=1,
    )
    serve.run(
        build(
            PageConfig(
                items=write_items(folder / "items", 11),
                database=url,
                tokens=clinicians[0],
                judgements_per_item=99,
            )
        ),
        name="page",
    )
    return serve_address, url, clinicians[1]


@pytest.fixture
def client(served):
    """HTTP client of a clinician, by name."""
    opened = []

    def make(name):
        opened.append(
            httpx.Client(
                base_url=served[0], headers={"Authorization": f"Bearer {served[2][name]}"}, timeout=60
            )
        )
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no browser: sh requirements/browser.sh")
        pytest.skip("no Chromium and ChromeDriver on this machine: sh requirements/browser.sh")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    started.set_script_timeout(120)
    yield started
    started.quit()
