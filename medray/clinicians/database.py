"""The clinicians' database: its tables, how it is opened, and which judgements count. Sign-ins of the page
are in it too (medray/serving/clinician_page/sessions.py).

Nothing that was said is overwritten: a judgement is a row, and the last row of a clinician and item is their
word.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Engine,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    exists,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError

from medray.errors import ConfigError
from medray.private_files import private_file

ID_LENGTH = 255  # characters of an item's id and of a clinician's
_NAME = String(ID_LENGTH)

schema = MetaData()

images = Table(
    "clinician_image",
    schema,
    Column("image_hash", String(64), primary_key=True),  # SHA-256: the questions of an image share it
    Column("image", LargeBinary(2**32 - 1), nullable=False),  # as found
)
items = Table(
    "clinician_item",
    schema,
    Column("item_id", _NAME, primary_key=True),
    Column("priority", Integer, nullable=False),  # greater ones are shown first
    Column("place", BigInteger, nullable=False),  # the drawn order within a priority
    Column("fingerprint", String(64), nullable=False),  # of all that is shown
    Column("image_hash", ForeignKey(images.c.image_hash), nullable=False),
    *[Column(name, Text) for name in ("image_id", "modality", "caption", "context", "dialogue_id")],
    Column("turn", Integer),
    *[Column(name, Text, nullable=False) for name in ("question", "answer_a", "answer_b")],
    Index("clinician_item_order", "priority", "place"),
)
set_aside = Table(
    "clinician_item_set_aside",
    schema,
    Column("item_id", _NAME, primary_key=True),  # or "row N of FOLDER" where it has no usable one
    Column("reason", Text, nullable=False),
)
assignments = Table(
    "assignment",
    schema,
    Column("item_id", ForeignKey(items.c.item_id), primary_key=True),
    Column("clinician", _NAME, primary_key=True),
    Column("first_shown", String(1), nullable=False),  # a | b
    Column("state", String(8), nullable=False),  # open | done | skipped
    Column("opened_at", BigInteger, nullable=False),  # microseconds since 1970, UTC
    Index("assignment_of_clinician", "clinician", "state"),
)
studies = Table(
    "clinician_study",
    schema,
    # SHA-256 of the name of the folder of the items, as the job names it
    Column("folder", String(64), primary_key=True),
    Column("judgements_per_item", Integer, nullable=False),  # that the job waits for
)
words = Table(
    "judgement",
    schema,
    # in the order said
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("item_id", _NAME, nullable=False),
    Column("clinician", _NAME, nullable=False),
    Column("save_key", String(64), nullable=False),
    Column("status", String(16), nullable=False),  # judged | skipped | not_answerable | withdrawn
    Column("good_a", Boolean),
    Column("good_b", Boolean),
    *[Column(name, Text) for name in ("edited_question", "edited_a", "edited_b")],
    Column("first_shown", String(1), nullable=False),
    Column("judged_at", BigInteger, nullable=False),  # microseconds since 1970, UTC
    Column("seconds", Float),
    ForeignKeyConstraint(["item_id", "clinician"], [assignments.c.item_id, assignments.c.clinician]),
    UniqueConstraint("clinician", "save_key"),
    Index("judgement_of_item", "item_id", "clinician", "number"),
)
page_sessions = Table(
    "page_session",
    schema,
    Column("session_hash", String(64), primary_key=True),  # SHA-256 of what the browser's cookie holds
    # whose session it is: it ends when the token is withdrawn
    Column("token_hash", String(64), nullable=False),
    Column("expires_at", BigInteger, nullable=False),  # microseconds since 1970, UTC
)
sign_in_failures = Table(
    "sign_in_failure",
    schema,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("address_hash", String(64), nullable=False),
    Column("failed_at", BigInteger, nullable=False),  # microseconds since 1970, UTC
    Index("sign_in_failure_at", "failed_at"),
)
WITHDRAWN = "withdrawn"


def open_database(url: str) -> Engine:
    """Engine with the tables in place. Raises ConfigError where the URL cannot be one."""
    try:
        parsed = make_url(url)
        sqlite = parsed.get_backend_name() == "sqlite"
        if sqlite and (
            parsed.database in (None, "", ":memory:", "file::memory:") or "mode=memory" in str(parsed)
        ):
            raise ConfigError(
                f"database: {url} is kept in memory and would be lost; give a file: "
                "sqlite:////path/to/judgements.db"
            )
        # Who waited for a lock on an item must see what was committed meanwhile, and not all databases do so
        # by default.
        settings: dict[str, Any] = (
            {"connect_args": {"timeout": 60}} if sqlite else {"isolation_level": "READ COMMITTED"}
        )
        # Errors name what they were about to store, and may reach a log: no texts in them.
        engine = create_engine(parsed, pool_pre_ping=True, hide_parameters=True, **settings)
    except (ArgumentError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"database: {error}; give an SQLAlchemy URL such as sqlite:///judgements.db or "
            "postgresql+psycopg://user@host/name"
        ) from None
    if sqlite:
        _private_sqlite(parsed.database)
        _prepare_sqlite(engine)
    with writing(engine) as connection:
        schema.create_all(connection)
    return engine


def _private_sqlite(database: str) -> None:
    """Leave the file, which holds patients' images, to its owner; SQLite gives -wal and -shm the mode of
    the file.
    """
    path = Path(unquote(urlsplit(database).path) if database.startswith("file:") else database)
    try:
        private_file(path)
        for beside in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            if beside.exists():
                private_file(beside)
    except OSError as error:
        raise ConfigError(
            f"database: {path} cannot be opened: {error.strerror}; give a file in a folder that exists and "
            "can be written"
        ) from error


def absolute_url(url: str) -> str:
    """A relative SQLite file, as seen from this process, by its full path."""
    parsed = make_url(url)
    if (
        parsed.get_backend_name() != "sqlite"
        or not parsed.database
        or parsed.database.startswith(("/", ":", "file:"))
    ):
        return url
    return parsed.set(database=str(Path(os.getcwd(), parsed.database))).render_as_string(hide_password=False)


def _prepare_sqlite(engine: Engine) -> None:
    """Transactions that lock when they begin, and files that survive a power failure."""

    @event.listens_for(engine, "connect")
    def _(connection, _record):
        connection.isolation_level = None  # the driver would begin transactions itself, and too late
        # An acknowledged judgement is on the disk, not only in its cache.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _(connection):
        connection.exec_driver_sql(
            "BEGIN IMMEDIATE" if connection.get_execution_options().get("medray_writes") else "BEGIN"
        )


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Any]:
    """A connection in a transaction that writes: committed as a whole, or not at all."""
    with engine.connect().execution_options(medray_writes=True) as connection, connection.begin():
        yield connection


def counting() -> Select:
    """The judgements that count: the last word of each clinician on each item, where it was not withdrawn."""
    later = words.alias("later")
    is_last = ~exists().where(
        later.c.item_id == words.c.item_id,
        later.c.clinician == words.c.clinician,
        later.c.number > words.c.number,
    )
    return select(words).where(words.c.status != WITHDRAWN, is_last)
