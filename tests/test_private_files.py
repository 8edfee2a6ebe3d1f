"""Files that hold patients' images or keys are their owner's alone, whatever the umask."""

import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import insert

from medray.clinicians.database import open_database, set_aside, writing
from medray.clinicians.import_export import export_all
from medray.errors import ConfigError
from medray.private_files import private_file, private_folder, write_private
from medray.serving.tokens import add_holder, read_tokens


@pytest.fixture(params=[0o000, 0o022, 0o277], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_the_database_and_the_files_beside_it_are_their_owners_alone(tmp_path):
    before = os.umask(0)
    try:
        engine = open_database(f"sqlite:///{tmp_path}/j.db")
        with writing(engine) as connection:
            connection.execute(insert(set_aside).values(item_id="a", reason="b"))
            assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
                ("j.db", "j.db-wal", "j.db-shm"), 0o600
            )
        engine.dispose()
    finally:
        os.umask(before)


def test_a_database_of_an_earlier_version_is_closed_to_others(tmp_path):
    for name, before in (("old.db", 0o644), ("wal.db", 0o666)):
        path = tmp_path / name
        path.touch()
        path.chmod(before)
        for url in (f"sqlite:///{path}", f"sqlite:///file:{path}?uri=true"):
            open_database(url).dispose()
        assert mode(path) == 0o600


@pytest.mark.parametrize("url", ["sqlite:///file::memory:?uri=true", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_in_memory_is_refused_in_every_form(url):
    with pytest.raises(ConfigError, match="kept in memory"):
        open_database(url)


def test_a_database_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(ConfigError, match=rf"database: {tmp_path}/none/j.db cannot be opened: No such file"):
        open_database(f"sqlite:///{tmp_path}/none/j.db")


def test_exports_are_their_owners_alone(tmp_path):
    database = f"sqlite:///{tmp_path}/j.db"
    open_database(database).dispose()
    before = os.umask(0)
    try:
        export_all(database, str(tmp_path / "a" / "out"))
    finally:
        os.umask(before)
    folders = [tmp_path / "a", tmp_path / "a/out", *(tmp_path / "a/out").iterdir()]
    assert {path.name: mode(path) for path in folders} == dict.fromkeys(
        ("a", "out", "judgements", "pairs", "demonstrations"), 0o700
    )
    assert mode(tmp_path) == 0o700 or mode(tmp_path) & 0o077, "what was there stays as it was"


def test_private_files_do_not_depend_on_the_umask(tmp_path, umask):
    write_private(tmp_path / "new", "text")
    assert (mode(tmp_path / "new"), (tmp_path / "new").read_text()) == (0o600, "text")
    (tmp_path / "old").touch(0o666)
    (tmp_path / "old").chmod(0o664)
    private_file(tmp_path / "old")
    assert mode(tmp_path / "old") == 0o600
    (tmp_path / "sealed").touch()
    (tmp_path / "sealed").chmod(0o444)
    private_file(tmp_path / "sealed")
    assert mode(tmp_path / "sealed") == 0o400
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o755)
    private_folder(str(tmp_path / "folder"))
    assert mode(tmp_path / "folder") == 0o755, "its owner's choice"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new", "old", "sealed"]


def test_a_link_that_waits_for_the_tokens_is_not_followed(tmp_path):
    """Somebody else may write into the folder: what they put where the file is made stays as it is."""
    victim, file = tmp_path / "victim", tmp_path / "keys.txt"
    victim.write_text("mine")
    for name in ("keys.txt.part", ".keys.txt.part"):
        (tmp_path / name).symlink_to(victim)
    token = add_holder(str(file), "ann")
    assert (
        victim.read_text() == "mine"
        and read_tokens(str(file)).holder(token).name == "ann"
        and mode(file) == 0o600
    )


def test_a_tokens_file_behind_a_link_stays_one(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    add_holder(str(real), "ann")
    real.chmod(0o644)
    link.symlink_to(real)
    add_holder(str(link), "ben")
    assert (
        link.is_symlink()
        and mode(real) == 0o600
        and {holder.name for holder in read_tokens(str(link)).holders.values()} == {"ann", "ben"}
    )


def test_a_tokens_file_that_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path, words in (
        (tmp_path / "bytes", "cannot be read"),
        (tmp_path / "none" / "keys.txt", "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=f"tokens: {path} {words}"):
            add_holder(str(path), "ann")
    assert not Path(tmp_path, "none").exists()
