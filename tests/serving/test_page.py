"""The page's endpoints on a real Ray Serve, over HTTP."""

import io
import json
import os
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sqlalchemy import text

from medray.clinicians.database import open_database
from medray.clinicians.import_export import judgement_rows
from medray.errors import ConfigError, DataError
from medray.records import JUDGEMENT, RATING_PAIR
from medray.serving.clinician_page.app import PageConfig, build
from medray.serving.clinician_page.asgi_app import displayable
from tests.serving.conftest import encoded, ramp
from tests.support.processes import descendants

pytestmark = pytest.mark.ray


def said(item, number=0, **changes):
    return {
        "item_id": item["item_id"],
        "save_key": f"{number:032x}",
        "status": "judged",
        "good_first": True,
        "good_second": False,
        **changes,
    }


def database_rows(url, query):
    engine = open_database(url)
    with engine.connect() as connection:
        rows = connection.execute(text(query)).tuples().all()
    engine.dispose()
    return rows


def test_without_a_valid_token_nothing_but_the_sign_in(served):
    address, _, tokens = served
    with httpx.Client(base_url=address, timeout=60) as http:
        for path in (
            "/api/next",
            "/api/image?item=cell/0?%26%23",
            "/api/agreement",
            "/api/export",
            "/api/undo",
            "/docs",
            "/openapi.json",
        ):
            for headers in (
                {},
                {"Authorization": "Bearer " + tokens["ann"][:-1]},
                {"Cookie": "medray_clinician=nobody"},
            ):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert http.post("/api/judgements", json={}).status_code == 401
        assert http.post("/api/sign-in", json={"token": "wrong"}).status_code == 401
        page = http.get("/")
        assert (
            page.status_code == 200
            and "script-src 'self'" in page.headers["Content-Security-Policy"]
            and "unsafe" not in page.headers["Content-Security-Policy"]
        )
        assert http.get("/static/app.js").headers["Content-Type"].startswith("text/javascript")
        assert http.get("/static/../page.py").status_code in (401, 404)


def test_sign_in_and_out(served):
    with httpx.Client(base_url=served[0], timeout=60) as client:
        answer = client.post("/api/sign-in", json={"token": served[2]["ann"]})
        assert answer.json()["name"] == "ann" and not answer.json()["lead"]
        cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Secure" not in cookie
        identity = client.cookies["medray_clinician"]
        assert (
            identity != served[2]["ann"]
            and client.get("/api/me").json()["name"] == "ann"
            and client.get("/api/next").status_code == 200
        )
        assert (
            client.post(
                "/api/undo", json={"save_key": "0" * 32}, headers={"Origin": "http://evil.example"}
            ).status_code
            == 403
        )
        client.post("/api/sign-out")
        assert (
            client.get("/api/next", headers={"Cookie": f"medray_clinician={identity}"}).status_code == 401
        ), "it was copied before"
        assert client.get("/api/me").json() == {"name": None} and client.get("/api/next").status_code == 401
        secure = client.post(
            "/api/sign-in", json={"token": served[2]["ann"]}, headers={"X-Forwarded-Proto": "https"}
        )
        assert "Secure" in secure.headers["Set-Cookie"]


def test_failed_sign_ins_are_limited_by_the_address_that_the_reverse_proxy_names(served):
    with httpx.Client(base_url=served[0], timeout=60) as http:

        def statuses(address, *tokens):
            return [
                http.post(
                    "/api/sign-in", json={"token": token}, headers={"X-Forwarded-For": address}
                ).status_code
                for token in tokens
            ]

        assert statuses("203.0.113.7", *["wrong"] * 11, served[2]["ann"]) == [401] * 10 + [429, 429]
        assert statuses("203.0.113.8", served[2]["ann"]) == [200]


def test_what_is_sent_is_checked(served, client):
    http = client("ann")
    item = http.get("/api/next").json()["item"]
    before = database_rows(served[1], "select count(*) from judgement where clinician = 'ann'")
    for changes in (
        {"good_second": None},
        {"status": "skipped"},
        {"status": "withdrawn"},
        {"good_first": "yes"},
        {"good_first": 1},
        {"save_key": "k"},
        {"save_key": "'; --" + "0" * 27},
        {"edited_first": " "},
        {"edited_first": "x" * 20001},
        {"edited_first": "a\0b"},
        {"edited_question": "\ud800"},
        {"item_id": ""},
        {"item_id": "a\0"},
        {"seconds": -1},
        {"seconds": "NaN"},
        {"clinician": "ben"},
        {"item_id": None},
    ):
        # escapes what is no text
        answer = http.post("/api/judgements", content=json.dumps(said(item, **changes)))
        assert answer.status_code == 422 and answer.json()["error"]["message"], changes
    for content in (b"", b"{", b"[]", b"\xff", b'{"seconds": NaN}', b"[" * 5000):
        assert http.post(
            "/api/judgements", content=content, headers={"Content-Type": "application/json"}
        ).status_code in (400, 422), content[:20]
    assert http.post("/api/judgements", content=b" " * (2**20 + 1)).status_code == 413
    assert http.post("/api/judgements", json=said({"item_id": "cell/99?&#"})).status_code == 409
    assert http.post("/api/judgements", json=said({"item_id": "' or 1=1 --"})).status_code == 409
    assert database_rows(served[1], "select count(*) from judgement where clinician = 'ann'") == before


def test_images_are_shown_to_those_who_were_given_them(client):
    item = client("ben").get("/api/next").json()["item"]
    answer = client("ben").get("/api/image", params={"item": item["item_id"]})
    assert (answer.status_code, answer.headers["Content-Type"], answer.headers["Cache-Control"]) == (
        200,
        "image/png",
        "no-store",
    )
    assert answer.content == encoded(ramp())
    assert client("tab").get("/api/image", params={"item": "cell/99"}).status_code == 404
    assert client("html").get("/api/image", params={"item": "' or '1'='1"}).status_code == 404
    assert client("html").get("/api/image").status_code == 422


def test_agreement_and_export_are_for_leads(client, tmp_path):
    for name in ("kim", "mob"):
        assert (
            client(name).get("/api/agreement").status_code
            == client(name).get("/api/export").status_code
            == 403
        )
        item = client(name).get("/api/next").json()["item"]
        assert client(name).post("/api/judgements", json=said(item, 7)).json() == {"stored": True}
    agreement = client("head").get("/api/agreement").json()
    assert (
        {"kim", "mob"} <= agreement["clinicians"].keys()
        and agreement["items_with_two"] >= 1
        and agreement["progress"]["items"] == 12
    )
    answer = client("head").get("/api/export")
    assert (
        answer.headers["Content-Type"] == "application/zip"
        and "judgements.zip" in answer.headers["Content-Disposition"]
    )
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {"judgements/part-00.parquet", "pairs/part-00.parquet"} <= set(archive.namelist())
        archive.extractall(tmp_path)
    judgements = pq.read_table(tmp_path / "judgements" / "part-00.parquet")
    assert judgements.schema.equals(JUDGEMENT) and {"kim", "mob"} <= set(judgements["clinician"].to_pylist())
    assert pq.read_schema(tmp_path / "pairs" / "part-00.parquet").equals(RATING_PAIR)


@pytest.mark.faults
def test_clinicians_work_on_while_the_server_is_killed(served):
    """Four at once judge all items; the replica is killed with -9 in the middle. Whoever gets no answer
    sends the same again.
    """
    address, url, tokens = served
    acknowledged = []

    def insist(http, method, path, **options):
        for _ in range(600):
            try:
                answer = http.request(method, path, **options)
                if answer.status_code < 500:
                    return answer.raise_for_status().json()
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the server did not come back")

    def work(name):
        with httpx.Client(
            base_url=address, headers={"Authorization": f"Bearer {tokens[name]}"}, timeout=10
        ) as http:
            number = 0
            while item := insist(http, "GET", "/api/next")["item"]:
                body = said(item, number)
                assert "stored" in insist(http, "POST", "/api/judgements", json=body)
                acknowledged.append((name, item["item_id"]))
                if number % 4 == 0:  # as a browser that lost the answer would
                    assert insist(http, "POST", "/api/judgements", json=body) == {"stored": False}
                number += 1

    (replica,) = descendants("ServeReplica:page:clinician-page")  # now, for the search takes long
    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, f"r{number}") for number in range(4)]
        while len(acknowledged) < 6 and not any(future.done() for future in working):
            time.sleep(0.01)
        os.kill(replica.pid, signal.SIGKILL)
        at_kill = len(acknowledged)
        for future in working:
            future.result()
    assert at_kill < 48 == len(acknowledged) == len(set(acknowledged))
    rows = database_rows(
        url, "select clinician, item_id from judgement where clinician in ('r0', 'r1', 'r2', 'r3')"
    )
    assert sorted(rows) == sorted(acknowledged)
    engine = open_database(url)
    assert sum(row["clinician"].startswith("r") for row in judgement_rows(engine)) == 48
    engine.dispose()


def test_what_cannot_be_served_is_said_before_anything_is(tmp_path, write_items, clinicians):
    url = f"sqlite:///{tmp_path}/j.db"
    with pytest.raises(ConfigError, match="no file"):
        build(PageConfig(database=url, tokens=str(tmp_path / "none")))
    with pytest.raises(DataError, match="has none that can be shown"):
        build(PageConfig(database=url, tokens=clinicians[0]))
    with pytest.raises(DataError, match="has none that can be shown"):
        build(
            PageConfig(
                items=write_items(tmp_path / "bad", 2, image=b"none"), database=url, tokens=clinicians[0]
            )
        )
    with pytest.raises(ConfigError, match="kept in memory"):
        build(PageConfig(database="sqlite://", tokens=clinicians[0]))
    with pytest.raises(ValueError, match="judgment_per_item"):
        PageConfig(judgment_per_item=2)


def test_images_that_browsers_do_not_show_become_png():
    grey = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    for data in (encoded(grey), encoded(ramp(), "TIFF"), encoded(ramp(), "BMP")):
        made, status, headers = displayable(data)
        with Image.open(io.BytesIO(made)) as image:
            assert (image.format, image.mode, headers["Content-Type"], status) == (
                "PNG",
                "RGB",
                "image/png",
                200,
            )
    with Image.open(io.BytesIO(displayable(encoded(grey))[0])) as image:
        assert image.getextrema()[0] == (0, 255)  # by its own range
    jpeg = encoded(ramp(), "JPEG")
    assert displayable(jpeg) == (jpeg, 200, {"Content-Type": "image/jpeg"})
