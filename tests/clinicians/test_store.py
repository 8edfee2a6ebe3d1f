"""The database that holds judgements, and the way in and out."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError

from medray.clinicians.database import absolute_url, open_database
from medray.clinicians.import_export import (
    ask_for,
    asked_for,
    export_all,
    import_items,
    item_rows,
    progress_of,
)
from medray.clinicians.judgements import item_fingerprint
from medray.clinicians.store import KeyUsed, NotAssigned, Store, Word
from medray.errors import ConfigError, DataError
from medray.records import CLINICIAN_ITEM, JUDGEMENT
from medray.storage.shards import stored_rows
from tests.support.judgements import item, png


def write_items(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=CLINICIAN_ITEM), folder / "part-0.parquet", row_group_size=3
    )
    return str(folder)


@pytest.fixture(scope="session")
def postgres():
    """URL of a PostgreSQL of its own, on a socket. Its server does not run as root."""
    tools = {name: shutil.which(name) for name in ("initdb", "postgres")}
    if None in tools.values():
        if os.environ.get("CI"):
            pytest.fail("CI has no PostgreSQL server: install Debian's postgresql")
        pytest.skip("no PostgreSQL server on this machine")
    # pytest's own folders are closed to other users
    scratch = tempfile.TemporaryDirectory(prefix="medray-postgres-")
    folder = Path(scratch.name)
    as_user = {}
    if os.geteuid() == 0:
        as_user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(folder)}
    options = {
        "env": environment,
        "cwd": folder,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        **as_user,
    }
    subprocess.run(
        [tools["initdb"], "-D", folder / "data", "-U", "clinic", "-A", "trust", "--no-sync"],
        check=True,
        **options,
    )
    socket = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    server = subprocess.Popen([tools["postgres"], "-D", folder / "data", *socket], **options)
    admin = create_engine(
        f"postgresql+psycopg://clinic@/postgres?host={folder}", isolation_level="AUTOCOMMIT"
    )
    for _ in range(1800):
        try:
            with admin.connect():
                break
        except Exception:
            assert server.poll() is None, "PostgreSQL did not start"
            threading.Event().wait(0.1)
    else:
        pytest.fail("PostgreSQL did not start in time")

    def database(name):
        with admin.connect() as connection:
            connection.execute(text(f"create database {name}"))
        return f"postgresql+psycopg://clinic@/{name}?host={folder}"

    yield database
    admin.dispose()
    server.send_signal(signal.SIGINT)  # ends at once, also where a failed test left connections
    server.wait()
    scratch.cleanup()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/judgements.db"
    return request.getfixturevalue("postgres")(f"t{os.urandom(8).hex()}")


def good(first, second, **changes):
    return Word("judged", first, second, **changes)


def test_a_judgement_goes_in_and_comes_out(url, tmp_path):
    rows = [item(1), item(2, image=item(1)["image"])]
    assert import_items(write_items(tmp_path / "items", rows), url) == {
        "imported": 2,
        "already": 0,
        "set_aside": 0,
    }
    store = Store(url, judgements_per_item=2)
    shown = store.next_item("x")
    assert store.next_item("x") == shown  # a reload shows it again
    source = next(row for row in rows if row["item_id"] == shown.item_id)
    assert (
        {shown.first, shown.second} == {"A lymphocyte.", "A monocyte."}
        and shown.question == "Which cell?"
        and shown.earlier is None
    )
    assert store.image(shown.item_id, "x") == source["image"]
    assert store.image(shown.item_id, "y") is None  # y was not given it
    assert store.save("x", shown.item_id, "k1", good(True, False, edited_first="Better.", seconds=2.5))
    other = store.next_item("x")
    assert other.item_id != shown.item_id
    store.save("x", other.item_id, "k2", Word("not_answerable"))
    assert store.next_item("x") is None
    assert store.progress("x") == {"judged": 1, "skipped": 0, "not_answerable": 1, "left": 0, "items": 2}
    assert store.progress("y")["left"] == 2
    store.close()

    assert progress_of(url, 1) == {"items": 2, "complete": 2, "judgements": 2, "set_aside": 0}
    assert progress_of(url, 2)["complete"] == 0
    done = export_all(url, str(tmp_path / "out"))
    assert done["pairs"]["pairs"] == done["demonstrations"]["accepted"] == 1
    side = "a" if shown.first == "A lymphocyte." else "b"
    exported = list(stored_rows(str(tmp_path / "out" / "judgements")))
    assert pq.read_schema(next((tmp_path / "out" / "judgements").iterdir())).equals(JUDGEMENT)
    (row,) = [row for row in exported if row["item_id"] == shown.item_id]
    assert (row["clinician"], row["status"], row["first_shown"], row["simulated"], row["seconds"]) == (
        "x",
        "judged",
        side,
        False,
        2.5,
    )
    assert (
        row[f"good_{side}"] is True
        and row[f"edited_{side}"] == "Better."
        and abs(row["judged_at"] - datetime.now(UTC)) < timedelta(hours=1)
    )
    assert {row["item_id"]: row["item"] for row in exported} == {
        row["item_id"]: item_fingerprint(row) for row in rows
    }
    (pair,) = stored_rows(str(tmp_path / "out" / "pairs"))
    assert (pair["chosen_answer"], pair["rejected_answer"]) == ("Better.", shown.second)
    assert pair["chosen_image"] == source["image"]


def test_the_order_of_answers_is_drawn_for_each_clinician(tmp_path):
    url = f"sqlite:///{tmp_path}/j.db"
    import_items(write_items(tmp_path / "items", [item(number) for number in range(60)]), url, seed=3)

    def orders(seed):
        store = Store(url, judgements_per_item=9, seed=seed)
        seen = {}
        for clinician in (f"x{seed}", f"y{seed}"):
            while shown := store.next_item(clinician):
                seen[clinician[0], shown.item_id] = shown.first
                store.save(clinician, shown.item_id, shown.item_id, Word("skipped"))
        return seen

    first = orders(0)
    assert (
        15
        < sum(answer == "A lymphocyte." for (clinician, _), answer in first.items() if clinician == "x")
        < 45
    )
    assert 15 < sum(first["x", f"item-{number}"] == first["y", f"item-{number}"] for number in range(60)) < 45
    assert orders(1) != first
    # nor are the items in the order given
    assert list(dict.fromkeys(item_id for _, item_id in first)) != [f"item-{number}" for number in range(60)]


def test_a_skipped_item_goes_to_someone_else_and_a_judged_one_does_not(url, tmp_path):
    import_items(write_items(tmp_path / "items", [item(1)]), url)
    store = Store(url)
    store.save("x", store.next_item("x").item_id, "k", Word("skipped"))
    assert store.next_item("x") is None and store.next_item("y").item_id == "item-1"
    assert store.next_item("z") is None  # y has it open
    store.save("y", "item-1", "k", good(True, True))
    assert store.next_item("z") is None
    store.close()


@pytest.mark.parametrize("finished", [False, True], ids=["others are at it", "others are done"])
def test_a_skip_taken_back_gives_no_extra_judgement(url, tmp_path, finished):
    import_items(write_items(tmp_path / "items", [item(1), item(2)]), url)
    store = Store(url, judgements_per_item=2)
    first = store.next_item("x").item_id
    store.save("x", first, "k0", good(True, False))
    skipped = store.next_item("x").item_id
    store.save("x", skipped, "k1", Word("skipped"))
    for name in ("y", "z"):
        while (shown := store.next_item(name)) and shown.item_id != skipped:
            store.save(name, shown.item_id, f"{name}-other", good(True, True))
        assert shown.item_id == skipped
        if finished:
            store.save(name, skipped, f"{name}-k", good(True, True))
    # Neither undo nor another window that still shows the item: both places are taken.
    assert store.undo("x", "u1").item_id == first and store.undo("x", "u1").item_id == first
    with pytest.raises(NotAssigned, match="others were given it"):
        store.save("x", skipped, "k2", good(False, True))
    assert store.save("x", skipped, "k3", Word("skipped"))  # says nothing new
    store.save("x", first, "k4", good(True, False))
    for name in ("y", "z"):
        store.save(name, skipped, f"{name}-late", good(True, True))
    assert progress_of(url, 3)["complete"] == 0 and store.progress("x")["skipped"] == 1
    # Where somebody leaves, there is room again.
    store.save("z", skipped, "z-skips", Word("skipped"))
    assert [store.undo("x", key).item_id for key in ("u2", "u3")] == [first, skipped] and store.save(
        "x", skipped, "k5", good(True, True)
    )
    assert store.undo("z", "z-undoes") is None
    assert progress_of(url, 3)["complete"] == 0
    store.close()


def test_the_last_place_is_taken_once_by_undos_saves_and_requests_at_once(url, tmp_path):
    """Six clinicians skipped each item; all come back to them at once, in three ways, and two places are
    there for each.
    """
    import_items(write_items(tmp_path / "items", [item(number) for number in range(4)]), url)
    names, ready = [f"c{number}" for number in range(6)], threading.Barrier(9)
    stores = [Store(url, judgements_per_item=2) for _ in range(9)]
    for name in names:
        while shown := stores[0].next_item(name):
            stores[0].save(name, shown.item_id, f"{shown.item_id} skipped by {name}", Word("skipped"))

    def work(number):
        store, name = stores[number], names[number] if number < 6 else f"new{number}"
        ready.wait()
        for index in range(4):
            if number < 3:
                shown = store.undo(name, f"undo {index}")
                item_id = shown and shown.item_id
            else:
                item_id = f"item-{index}" if number < 6 else getattr(store.next_item(name), "item_id", None)
            try:
                if item_id is not None:
                    store.save(name, item_id, f"save {index}", good(True, False))
            except NotAssigned:
                continue

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(work, range(9)))
    for store in stores:
        store.close()
    found = progress_of(url, 2), progress_of(url, 3)
    assert found[0]["complete"] == 4 and found[1]["complete"] == 0


def test_an_item_left_open_goes_to_someone_else_and_a_late_word_is_kept(url, tmp_path):
    import_items(write_items(tmp_path / "items", [item(1)]), url)
    store = Store(url, hold_hours=0)
    store.next_item("x")
    assert store.next_item("y").item_id == "item-1"
    store.save("y", "item-1", "k", good(True, False))
    assert store.next_item("x") is None and store.progress("x")["left"] == 0
    assert store.save("x", "item-1", "k", good(True, True))
    assert progress_of(url)["judgements"] == 2
    store.close()


def test_undo_goes_back_step_by_step(url, tmp_path):
    import_items(write_items(tmp_path / "items", [item(number) for number in range(3)]), url)
    store = Store(url)
    assert store.undo("x", "u0") is None
    first = store.next_item("x")
    store.save("x", first.item_id, "k1", good(True, False, edited_second="Edited."))
    second = store.next_item("x")
    store.save("x", second.item_id, "k2", Word("skipped"))
    open_now = store.next_item("x")
    # the same key takes back one word
    assert store.undo("x", "u1").item_id == store.undo("x", "u1").item_id == second.item_id
    back = store.undo("x", "u2")
    assert back.item_id == first.item_id and back.earlier == good(True, False, edited_second="Edited.")
    assert store.undo("x", "u3") is None
    assert store.next_item("x") == back  # also after a reload
    assert progress_of(url)["judgements"] == 0
    store.save("x", first.item_id, "k3", good(False, True))
    assert store.next_item("x").item_id == second.item_id
    store.save("x", second.item_id, "k4", good(False, True))
    assert store.next_item("x").item_id == open_now.item_id
    assert [row["item_id"] for row in _exported(url, tmp_path)] == sorted([first.item_id, second.item_id])
    assert {
        (row["good_a"] and row["first_shown"] == "b") or (row["good_b"] and row["first_shown"] == "a")
        for row in _exported(url, tmp_path)
    } == {True}
    store.close()


def _exported(url, tmp_path):
    export_all(url, str(tmp_path / "out"))
    return list(stored_rows(str(tmp_path / "out" / "judgements")))


def test_an_undo_sent_twice_at_once_is_answered_alike(url, tmp_path, monkeypatch):
    """As on PostgreSQL, where both find their key new before either is stored: the other one is stored
    while this one is about to be.
    """
    import_items(write_items(tmp_path / "items", [item(1), item(2)]), url)
    store, other = Store(url), Store(url)
    for number in range(2):
        store.save("x", store.next_item("x").item_id, f"k{number}", good(True, False))
    say, answers = store._say, []

    def too_late(connection, *values):
        monkeypatch.undo()
        connection.get_transaction().rollback()  # SQLite would let no other in
        answers.append(other.undo("x", "u"))
        with store.engine.begin() as again:
            say(again, *values)

    monkeypatch.setattr(store, "_say", too_late)
    assert [store.undo("x", "u")] == answers
    assert progress_of(url)["judgements"] == 1  # one was taken back, once
    for one in (store, other):
        one.close()


def test_undos_at_once_on_postgresql(postgres, tmp_path, monkeypatch):
    url = postgres("undos")
    import_items(write_items(tmp_path / "items", [item(1), item(2)]), url)
    store, both = Store(url), threading.Barrier(2)
    for number in range(2):
        store.save("x", store.next_item("x").item_id, f"k{number}", good(True, False))
    locked = store._locked

    def together(*given):
        both.wait(60)  # neither has its lock, and both have looked for the key
        return locked(*given)

    monkeypatch.setattr(store, "_locked", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: store.undo("x", "u"), range(2))
    assert first == second and first is not None
    assert progress_of(url)["judgements"] == 1
    store.close()


def test_errors_of_the_database_hold_no_texts(url, tmp_path):
    """They may reach a log."""
    import_items(write_items(tmp_path / "items", [item(1)]), url)
    store = Store(url)
    name = store.next_item("x").item_id
    store.save("x", name, "k", good(True, True))
    with pytest.raises(IntegrityError) as raised, store.engine.begin() as connection:
        store._say(
            connection, name, "x", "k", "a", {"status": "judged", "edited_question": "of Mrs Smith"}, "done"
        )
    assert "parameters hidden" in str(raised.value) and "Smith" not in str(raised.value)
    store.close()


def test_a_key_is_stored_once(url, tmp_path):
    import_items(write_items(tmp_path / "items", [item(1), item(2)]), url)
    store = Store(url, judgements_per_item=2)
    first = store.next_item("x").item_id
    assert store.save("x", first, "k", good(True, False))
    assert not store.save("x", first, "k", good(False, True))  # a repeated request, however late
    other = store.next_item("x").item_id
    with pytest.raises(KeyUsed):
        store.save("x", other, "k", good(True, True))
    with pytest.raises(NotAssigned, match="was not given to 'y'"):
        store.save("y", first, "k", good(True, True))
    store.next_item("y")
    assert store.save("y", first, "k", good(True, True))  # keys are each clinician's own
    assert store.save("x", first, "k2", good(True, True))  # a later word, from another window, say
    assert [(row["clinician"], row["good_b"]) for row in _exported(url, tmp_path)] == [
        ("x", True),
        ("y", True),
    ]
    store.close()


def test_many_clinicians_at_once(url, tmp_path):
    """Twelve clinicians, thirty items, two wanted for each; every request is sent twice at the same time."""
    import_items(write_items(tmp_path / "items", [item(number) for number in range(30)]), url)
    stores = [Store(url, judgements_per_item=2) for _ in range(3)]  # as three replicas would be

    def work(number):
        store, clinician, mine = stores[number % 3], f"c{number}", []
        with ThreadPoolExecutor(2) as pool:
            while shown := store.next_item(clinician):
                mine.append(shown.item_id)
                saves = list(
                    pool.map(
                        lambda _: store.save(
                            clinician, shown.item_id, f"key-{len(mine)}", good(True, number % 2 == 0)
                        ),
                        range(2),
                    )
                )
                assert sorted(saves) == [False, True]
        return mine

    with ThreadPoolExecutor(12) as pool:
        given = list(pool.map(work, range(12)))
    assert Counter(item_id for mine in given for item_id in mine) == {
        f"item-{number}": 2 for number in range(30)
    }
    assert {(row["item_id"], row["clinician"]) for row in _exported(url, tmp_path)} == {
        (item_id, f"c{number}") for number, mine in enumerate(given) for item_id in mine
    }
    with stores[0].engine.connect() as connection:
        assert connection.execute(text("select count(*) from judgement")).scalar() == 60
    for store in stores:
        store.close()


def test_judgements_survive_kill_9(tmp_path):
    """A process that saves as fast as it can is killed: what it was told is stored is there, and saving
    the rest again gives each once.
    """
    url = f"sqlite:///{tmp_path}/j.db"
    import_items(write_items(tmp_path / "items", [item(number) for number in range(150)]), url)
    program = f"""
from medray.clinicians.store import Store, Word
store = Store({url!r})
while shown := store.next_item("x"):
    store.save("x", shown.item_id, "key of " + shown.item_id, Word("judged", True, False))
    print(shown.item_id, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    acknowledged = [process.stdout.readline().strip() for _ in range(10)]
    process.kill()
    acknowledged += process.stdout.read().split()
    process.wait()
    assert 10 <= len(acknowledged) < 150
    assert set(acknowledged) <= {row["item_id"] for row in _exported(url, tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    assert [row["item_id"] for row in _exported(url, tmp_path)] == sorted(
        f"item-{number}" for number in range(150)
    )
    engine = open_database(url)
    with engine.connect() as connection:
        assert connection.execute(text("select count(*) from judgement")).scalar() == 150
        assert connection.execute(text("pragma integrity_check")).scalar() == "ok"


def test_bad_items_are_set_aside_and_named(url, tmp_path, caplog):
    rows = [
        item(1),
        item(2, image=b"no image"),
        item(3, question="  "),
        item(4, answer_b=None),
        item(5, caption="a\0b"),
        item(6, item_id=""),
        item(7, item_id="x" * 256),
        item(8, image=None),
        item(1),
    ]
    source = write_items(tmp_path / "items", rows)
    assert import_items(source, url) == {"imported": 1, "already": 1, "set_aside": 7}
    assert import_items(source, url) == {"imported": 0, "already": 2, "set_aside": 7}
    engine = open_database(url)
    with engine.connect() as connection:
        reasons = dict(
            connection.execute(text("select item_id, reason from clinician_item_set_aside")).tuples().all()
        )
    assert (
        len(reasons) == 7
        and reasons["item-3"] == "question is empty"
        and reasons["item-4"] == "answer_b is empty"
    )
    assert (
        "NUL" in reasons["item-5"]
        and "cannot be decoded" in reasons["item-2"]
        and "0 bytes" in reasons["item-8"]
    )
    assert [row["item_id"] for row in item_rows(engine)] == ["item-1"]
    assert "item-2 is set aside" in caplog.text
    engine.dispose()


def test_an_item_that_changed_is_refused(url, tmp_path):
    import_items(write_items(tmp_path / "items", [item(1)]), url)
    for change in ({"answer_a": "Another."}, {"image": png(9)}):
        with pytest.raises(DataError, match=r"'item-1' of .* has other contents than before"):
            import_items(write_items(tmp_path / "changed", [item(0), item(1, **change)]), url)
    with pytest.raises(DataError, match="'item-5' of"):
        import_items(write_items(tmp_path / "changed", [item(5), item(5, question="Another?")]), url)
    assert progress_of(url)["items"] == 1  # nothing of the refused shard


def test_priority_comes_first(tmp_path):
    url = f"sqlite:///{tmp_path}/j.db"
    import_items(write_items(tmp_path / "items", [item(number) for number in range(20)]), url)
    import_items(write_items(tmp_path / "urgent", [item(99)]), url, priority=1)
    assert Store(url).next_item("x").item_id == "item-99"


def test_what_is_said_and_shown_may_be_any_text(url, tmp_path):
    nasty = "'); DROP TABLE judgement; -- <script>alert(1)</script> \u202e ß 漢 😀"
    import_items(
        write_items(tmp_path / "items", [item(1, item_id=nasty, caption=nasty, question=nasty)]), url
    )
    store = Store(url)
    shown = store.next_item(nasty)
    assert (shown.item_id, shown.caption, shown.question) == (nasty, nasty, nasty)
    store.save(nasty, nasty, nasty, good(True, False, edited_first=nasty, edited_question=nasty))
    (row,) = _exported(url, tmp_path)
    assert (row["item_id"], row["clinician"], row["edited_question"]) == (nasty, nasty, nasty) and nasty in (
        row["edited_a"],
        row["edited_b"],
    )
    store.close()


def test_sources_and_databases_that_cannot_be_used(tmp_path):
    url = f"sqlite:///{tmp_path}/j.db"
    with pytest.raises(DataError, match="no Parquet files"):
        import_items(str(tmp_path / "nowhere"), url)
    pq.write_table(pa.table({"item_id": ["1"], "image": [b""]}), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="lacks the columns question, answer_a, answer_b"):
        import_items(str(tmp_path), url)
    for bad, reason in (
        ("sqlite://", "kept in memory"),
        ("judgements.db", "SQLAlchemy URL"),
        ("nosuch://host/name", "SQLAlchemy URL"),
    ):
        with pytest.raises(ConfigError, match=reason):
            open_database(bad)


def test_a_relative_file_is_named_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_url("sqlite:///j.db") == f"sqlite:///{tmp_path}/j.db"
    assert absolute_url("sqlite:////data/j.db") == "sqlite:////data/j.db"
    assert (
        absolute_url("postgresql+psycopg://me:secret@host/name") == "postgresql+psycopg://me:secret@host/name"
    )


def test_the_page_asks_as_many_clinicians_as_the_job_waits_for(url, tmp_path):
    """By the database, where the job reaches it, or by the run that the items lie in; a page that would
    ask fewer is refused.
    """
    from medray.serving.clinician_page.app import PageConfig, _judgements_per_item

    run = tmp_path / "run"
    items = write_items(run / "stages/03-candidates/items", [item(1)])
    page = PageConfig(items=items, database=url)
    assert asked_for(url) is None and _judgements_per_item(page) == 1
    (run / "config.yaml").write_text("clinicians: {kind: export, judgements_per_item: 2}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("clinicians: {judgements_per_item: 2}\n")
    assert asked_for(url, write_items(tmp_path / "mine/a/b/items", [item(2)])) is None, (
        "another project's file"
    )
    assert _judgements_per_item(page) == 2
    import_items(items, url)
    ask_for(items, url, 3)
    ask_for(items, url, 3)
    assert asked_for(url) == 3 and _judgements_per_item(page) == 3
    assert _judgements_per_item(page.model_copy(update={"judgements_per_item": 4})) == 4
    with pytest.raises(ConfigError, match=r"judgements_per_item: .* 1 clinician\(s\), .* waits for 3"):
        _judgements_per_item(page.model_copy(update={"judgements_per_item": 1}))
    ask_for(items, url, 2)
    assert asked_for(url) == 2
