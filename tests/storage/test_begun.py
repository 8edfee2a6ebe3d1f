"""Rows that actors began to work on."""

import pytest

from medray.storage.begun import Begun, begun_rows, counted


def test_every_actor_adds_its_own_number(tmp_path):
    folder = str(tmp_path / "begun")
    assert begun_rows(folder) == 0
    with counted(folder):
        one, other = Begun(), Begun()
    one(3)
    other(4)
    one(2)
    Begun()(100)  # of no stage
    assert begun_rows(folder) == 9
    (tmp_path / "begun" / "killed.1234.part").touch()  # before its number was written
    assert begun_rows(folder) == 9
    with counted(folder):
        Begun()(1)
    assert begun_rows(folder) == 10


@pytest.mark.parametrize("damaged", [b"", b"junk", b"{}", b"[3]", b'{"rows": 900, "checksum": "0"}'])
def test_a_damaged_number_ends_no_stage(tmp_path, damaged, caplog):
    folder = str(tmp_path / "begun [1]")
    with counted(folder):
        Begun()(3)
    (tmp_path / "begun [1]" / "other").write_bytes(damaged)
    assert begun_rows(folder) == 3
    assert "other: damaged" in caplog.text
