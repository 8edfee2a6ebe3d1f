"""Rows that actors began to work on."""

from medray.data.begun import Begun, begun_rows, counted


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
    (tmp_path / "begun" / "killed").touch()  # before its number was written
    assert begun_rows(folder) == 9
    with counted(folder):
        Begun()(1)
    assert begun_rows(folder) == 10
