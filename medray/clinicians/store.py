"""Who is given which item, and what they say of it: what the clinician page asks of its database.

A judgement is there when `save` returns, also after a power failure, and once: every save carries a key, and
the same key again changes nothing. Who gets an item is decided under a lock on its row, so an item is never
given to more clinicians than asked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import xxhash
from sqlalchemy import (
    ColumnElement,
    Connection,
    ScalarSelect,
    Select,
    Table,
    and_,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from medray.clinicians.database import (
    WITHDRAWN,
    assignments,
    counting,
    images,
    items,
    open_database,
    words,
    writing,
)
from medray.errors import MedrayError


class NotAssigned(MedrayError):
    """A clinician's word on an item that they were not given, or skipped and that others were given since."""


class KeyUsed(MedrayError):
    """A save key that already belongs to another item's judgement."""


@dataclass(frozen=True)
class Word:
    """What a clinician says of an item; `first` and `second` are the answers in the order that they saw.

    Args:
        status: judged | skipped | not_answerable.
        good_first, good_second: None where not judged.
        edited_question, edited_first, edited_second: None where left as they were.
        seconds: from showing to saving; None where not known.
    """

    status: str
    good_first: bool | None = None
    good_second: bool | None = None
    edited_question: str | None = None
    edited_first: str | None = None
    edited_second: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Shown:
    """An item as a clinician sees it: the answers in their order, and what they last said of it, if they
    took it back.
    """

    item_id: str
    modality: str | None
    caption: str | None
    context: str | None
    question: str
    first: str
    second: str
    earlier: Word | None


class Store:
    """What the page asks of the database. Safe to use from several threads, processes and hosts at once.

    Args:
        url: SQLAlchemy URL; tables are made where they are missing.
        judgements_per_item: clinicians who are given each item. One who skips it makes room for another.
        hold_hours: after so long an item that was opened and not judged may go to someone else. Should its
            first clinician come back after all, their word is kept too.
        seed: of the order of the answers.

    Raises ConfigError for a URL that cannot be one.
    """

    def __init__(self, url: str, judgements_per_item: int = 1, hold_hours: float = 24.0, seed: int = 0):
        self.engine = open_database(url)
        self.judgements_per_item, self.hold, self.seed = judgements_per_item, int(hold_hours * 3600e6), seed

    def close(self) -> None:
        self.engine.dispose()

    def next_item(self, clinician: str) -> Shown | None:
        """The item this clinician has open, else a new one for them; None where nothing is left."""
        while True:
            with writing(self.engine) as connection:
                item_id = connection.scalar(
                    self._open_of(clinician).order_by(assignments.c.opened_at.desc()).limit(1)
                )
                if item_id is None:
                    candidate = connection.scalar(
                        self._free_for(clinician)
                        .order_by(items.c.priority.desc(), items.c.place, items.c.item_id)
                        .limit(1)
                    )
                    if candidate is None:
                        return None
                    connection.execute(
                        select(items.c.item_id).where(items.c.item_id == candidate).with_for_update()
                    )
                    # While we waited for the lock someone else may have been given it.
                    item_id = connection.scalar(self._free_for(clinician).where(items.c.item_id == candidate))
                    if item_id is not None:
                        first = "ab"[
                            xxhash.xxh64_intdigest(f"{self.seed}/{item_id}/{clinician}".encode()) & 1
                        ]
                        connection.execute(
                            insert(assignments).values(
                                item_id=item_id,
                                clinician=clinician,
                                first_shown=first,
                                state="open",
                                opened_at=now(),
                            )
                        )
                if item_id is not None:
                    return self._shown(connection, item_id, clinician)

    def save(self, clinician: str, item_id: str, save_key: str, word: Word) -> bool:
        """Store what a clinician says; False where this key is stored already, and then nothing changes.

        Raises NotAssigned, and KeyUsed where the key belongs to another item.
        """
        with writing(self.engine) as connection:
            first_shown = self._locked(connection, item_id, clinician)
            if self._known(connection, clinician, save_key, item_id):
                return False
            # Another window of the clinician's may still show an item that they skipped.
            if (
                word.status != "skipped"
                and self._is_skipped(connection, item_id, clinician)
                and not self._has_room(connection, item_id, clinician)
            ):
                raise NotAssigned(
                    f"{clinician!r} skipped item {item_id!r} and others were given it since; go on with the "
                    "next item"
                )
            by_place = {"first": first_shown, "second": "b" if first_shown == "a" else "a"}
            values: dict[str, Any] = {
                "status": word.status,
                "edited_question": word.edited_question,
                "seconds": word.seconds,
            }
            for place, side in by_place.items():
                values |= {
                    f"good_{side}": getattr(word, f"good_{place}"),
                    f"edited_{side}": getattr(word, f"edited_{place}"),
                }
            self._say(
                connection,
                item_id,
                clinician,
                save_key,
                first_shown,
                values,
                "skipped" if word.status == "skipped" else "done",
            )
            return True

    def undo(self, clinician: str, save_key: str) -> Shown | None:
        """Take back this clinician's last word and open its item again; None where there is none.

        Called again it goes further back. The same key again gives the same item and changes nothing. A
        skipped item that others were given since has no room left: it stays skipped, and the word before it
        is taken back.
        """
        try:
            return self._undo(clinician, save_key)
        except IntegrityError:
            # the same undo, sent twice at once: the other was stored between our look and our insert, and is
            # seen now
            return self._undo(clinician, save_key)

    def _undo(self, clinician: str, save_key: str) -> Shown | None:
        last = counting().where(words.c.clinician == clinician).order_by(words.c.number.desc())
        with writing(self.engine) as connection:
            # Before the key: an undo stored in between is then known by it.
            said = connection.execute(last.with_only_columns(words.c.item_id, words.c.status)).tuples().all()
            item_id = connection.scalar(
                select(words.c.item_id).where(words.c.clinician == clinician, words.c.save_key == save_key)
            )
            if item_id is None:
                item_id = next(
                    (
                        name
                        for name, status in said
                        if status != "skipped" or self._has_room(connection, name, clinician)
                    ),
                    None,
                )
                if item_id is None:
                    return None
                first_shown = self._locked(connection, item_id, clinician)
                self._say(
                    connection, item_id, clinician, save_key, first_shown, {"status": WITHDRAWN}, "open"
                )
            return self._shown(connection, item_id, clinician)

    def progress(self, clinician: str) -> dict[str, int]:
        """{"judged", "skipped", "not_answerable", "left" (items this clinician can still be given, the
        open one too), "items"}.
        """
        with self.engine.connect() as connection:
            own = counting().where(words.c.clinician == clinician).subquery()
            said = dict(
                connection.execute(select(own.c.status, func.count()).group_by(own.c.status)).tuples().all()
            )
            left = sum(
                connection.scalar(select(func.count()).select_from(ids.subquery()))
                for ids in (self._open_of(clinician), self._free_for(clinician))
            )
            total = connection.scalar(select(func.count()).select_from(items))
        return {
            **{status: said.get(status, 0) for status in ("judged", "skipped", "not_answerable")},
            "left": left,
            "items": total,
        }

    def image(self, item_id: str, clinician: str) -> bytes | None:
        """The encoded image of an item as found; None where the clinician was not given it."""
        joined = images.join(items, items.c.image_hash == images.c.image_hash).join(
            assignments, assignments.c.item_id == items.c.item_id
        )
        with self.engine.connect() as connection:
            return connection.scalar(
                select(images.c.image)
                .select_from(joined)
                .where(items.c.item_id == item_id, assignments.c.clinician == clinician)
            )

    def _free_for(self, clinician: str) -> Select:
        """Ids of items that this clinician was never given and that lack clinicians."""
        given = assignments.alias("given")
        own = exists().where(given.c.item_id == items.c.item_id, given.c.clinician == clinician)
        return select(items.c.item_id).where(~own, self._takers(clinician) < self.judgements_per_item)

    def _takers(self, clinician: str) -> ScalarSelect:
        """How many others have judged an item or are at it now."""
        holds = or_(
            assignments.c.state == "done",
            and_(assignments.c.state == "open", assignments.c.opened_at > now() - self.hold),
        )
        taken = (
            select(func.count())
            .select_from(assignments)
            .where(assignments.c.item_id == items.c.item_id, assignments.c.clinician != clinician, holds)
        )
        return taken.correlate(items).scalar_subquery()

    def _open_of(self, clinician: str) -> Select:
        """Ids of what this clinician opened and did not finish; what others have meanwhile done in their
        stead is left out.
        """
        still = or_(
            assignments.c.opened_at > now() - self.hold, self._takers(clinician) < self.judgements_per_item
        )
        found = select(items.c.item_id).join(assignments, assignments.c.item_id == items.c.item_id)
        return found.where(assignments.c.clinician == clinician, assignments.c.state == "open", still)

    def _locked(self, connection: Connection, item_id: str, clinician: str) -> str:
        """The answer this clinician saw first; until the transaction ends no other can say anything of
        the item in their name.
        """
        first_shown = connection.scalar(
            select(assignments.c.first_shown).where(_own(assignments, item_id, clinician)).with_for_update()
        )
        if first_shown is None:
            raise NotAssigned(f"item {item_id!r} was not given to {clinician!r}")
        return first_shown

    def _is_skipped(self, connection: Connection, item_id: str, clinician: str) -> bool:
        return (
            connection.scalar(select(assignments.c.state).where(_own(assignments, item_id, clinician)))
            == "skipped"
        )

    def _has_room(self, connection: Connection, item_id: str, clinician: str) -> bool:
        """Whether the item lacks clinicians; until the transaction ends it is given to no other clinician."""
        connection.execute(select(items.c.item_id).where(items.c.item_id == item_id).with_for_update())
        return (
            connection.scalar(
                select(items.c.item_id).where(
                    items.c.item_id == item_id, self._takers(clinician) < self.judgements_per_item
                )
            )
            is not None
        )

    def _known(self, connection: Connection, clinician: str, save_key: str, item_id: str) -> bool:
        known = connection.scalar(
            select(words.c.item_id).where(words.c.clinician == clinician, words.c.save_key == save_key)
        )
        if known not in (None, item_id):
            raise KeyUsed(f"save key {save_key!r} belongs to another item; take a new key for each save")
        return known is not None

    def _say(
        self,
        connection: Connection,
        item_id: str,
        clinician: str,
        save_key: str,
        first_shown: str,
        values: dict[str, Any],
        state: str,
    ) -> None:
        fixed = {
            "item_id": item_id,
            "clinician": clinician,
            "save_key": save_key,
            "first_shown": first_shown,
            "judged_at": now(),
        }
        connection.execute(insert(words).values(**fixed, **values))
        reopened = {"opened_at": now()} if state == "open" else {}
        connection.execute(
            update(assignments).where(_own(assignments, item_id, clinician)).values(state=state, **reopened)
        )

    def _shown(self, connection: Connection, item_id: str, clinician: str) -> Shown:
        item = connection.execute(select(items).where(items.c.item_id == item_id)).mappings().one()
        first = connection.scalar(
            select(assignments.c.first_shown).where(_own(assignments, item_id, clinician))
        )
        own = select(words).where(_own(words, item_id, clinician), words.c.status != WITHDRAWN)
        said = connection.execute(own.order_by(words.c.number.desc()).limit(1)).mappings().first()
        second = "b" if first == "a" else "a"
        earlier = said and Word(
            said["status"],
            said[f"good_{first}"],
            said[f"good_{second}"],
            said["edited_question"],
            said[f"edited_{first}"],
            said[f"edited_{second}"],
            said["seconds"],
        )
        texts = {name: item[name] for name in ("item_id", "modality", "caption", "context", "question")}
        return Shown(**texts, first=item[f"answer_{first}"], second=item[f"answer_{second}"], earlier=earlier)


def now() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


def _own(table: Table, item_id: str, clinician: str) -> ColumnElement[bool]:
    return and_(table.c.item_id == item_id, table.c.clinician == clinician)
