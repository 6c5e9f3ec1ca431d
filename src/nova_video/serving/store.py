"""The database of jobs: one table, one row a job, and every change of a job in one transaction.

Several processes may share a database. A process claims a job for a few seconds and claims it again as long as it
lives; a job whose claim has run out is free for the others, who go on from its saved state.
"""

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    and_,
    create_engine,
    event,
    func,
    insert,
    inspect,
    or_,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from nova_video.common.errors import InputError, first_line
from nova_video.serving.jobs import Change, Job, JobCommand, JobError, Kind, Status

LEASE = 10.0  # seconds that a claim holds
TYPES = {str: String, bool: Boolean, int: Integer, float: Float, Status: String}
INDEX_COLUMNS = ("status", "owner", "expires_at")
END_STATES = tuple(status.value for status in Status if status.ended)
LAST_WISHES = ("stop", "cancel")  # what is wanted at last: nothing else is wanted after it


class JobStore:
    """All jobs, by id. Its methods may be called from any thread."""

    def __init__(self, url: str) -> None:
        """Opens the database of a SQLAlchemy URL, and makes its table if it has none."""
        self.engine = _open(url)
        self._reader = self.engine.execution_options(reads=True)
        self.table = _make_table()
        self._lock = threading.Lock()  # of counting before adding
        try:
            self.table.metadata.create_all(self.engine)
            found = {column["name"] for column in inspect(self.engine).get_columns(self.table.name)}
        except SQLAlchemyError as error:
            raise InputError(f"database {_without_password(url)} cannot be opened: {first_line(error)}") from None
        if lacking := sorted({column.name for column in self.table.columns} - found):
            raise InputError(
                f"database {_without_password(url)} is another version's: it lacks {lacking[0]}, expected a new one"
            )

    def close(self) -> None:
        self.engine.dispose()

    # Reading ----------------------------------------------------------------------------------------------------------

    def get(self, id: str) -> Job | None:
        with self._reader.connect() as connection:
            row = connection.execute(select(self.table).where(self.table.c.id == id)).first()
        return None if row is None else _job_of(row)

    def page(
        self,
        owner: str | None = None,
        kinds: Collection[Kind] = (),
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[Job], bool]:
        """A page of jobs behind the one named `after`, and whether there are more. An owner of None is anybody."""
        table = self.table
        order = table.c.number.desc() if newest_first else table.c.number
        query = select(table).order_by(order).limit(limit + 1)
        if owner is not None:
            query = query.where(table.c.owner == owner)
        if kinds:
            query = query.where(table.c.kind.in_(kinds))
        if after is not None:
            place = select(table.c.number).where(table.c.id == after).scalar_subquery()
            query = query.where(table.c.number < place if newest_first else table.c.number > place)
        with self._reader.connect() as connection:
            jobs = [_job_of(row) for row in connection.execute(query)]
        return jobs[:limit], len(jobs) > limit

    def counts(self) -> dict[str, int]:
        """Number of jobs of every status; of paused ones, besides, under that name."""
        table = self.table
        with self._reader.connect() as connection:
            rows = connection.execute(select(table.c.status, func.count()).group_by(table.c.status)).all()
            paused = select(func.count()).where(table.c.paused_at.is_not(None), table.c.status.not_in(END_STATES))
            found = {**dict.fromkeys(map(str, Status), 0), **{row[0]: row[1] for row in rows}}
            return {**found, "paused": connection.execute(paused).scalar_one()}

    def has_waiting(self) -> bool:
        """True if a job waits that has not begun and is not paused."""
        waits = and_(self.table.c.status == Status.QUEUED, self.table.c.paused_at.is_(None))
        with self._reader.connect() as connection:
            return connection.execute(select(self.table.c.id).where(waits).limit(1)).first() is not None

    def expired(self, now: float, paused_before: float) -> list[Job]:
        """Jobs to sweep: those whose time is over, and those that nobody has taken up again since."""
        table = self.table
        old = and_(table.c.paused_at < paused_before, table.c.status.not_in(END_STATES))
        with self._reader.connect() as connection:
            return [_job_of(row) for row in connection.execute(select(table).where(or_(table.c.expires_at < now, old)))]

    def known(self, ids: Collection[str]) -> set[str]:
        """Finds which of the ids are in the database."""
        with self._reader.connect() as connection:
            return set(connection.execute(select(self.table.c.id).where(self.table.c.id.in_(ids))).scalars())

    # Changes ----------------------------------------------------------------------------------------------------------

    def add(self, job: Job, most_queued: int, most_of_owner: int) -> str | None:
        """Adds a job, or returns why not: "queue" or "owner", the bound that it would break."""
        table = self.table
        waiting = select(func.count()).where(table.c.status == Status.QUEUED)
        own = select(func.count()).where(table.c.owner == job.owner, table.c.status.not_in(END_STATES))
        with self._lock, self.engine.begin() as connection:
            if connection.execute(waiting).scalar_one() >= most_queued:
                return "queue"
            if job.owner and connection.execute(own).scalar_one() >= most_of_owner:
                return "owner"
            connection.execute(insert(table).values(_values_of(vars(job))))
        return None

    def update(self, id: str, held_by: str | None = None, **changes: Any) -> Job | None:
        """Changes fields of a job; with `held_by`, only if that process has it. None: there is none, or it has not."""
        chosen = self.table.c.id == id
        if held_by is not None:
            chosen = and_(chosen, self.table.c.worker == held_by)
        with self.engine.begin() as connection:
            return self._change(connection, chosen, changes)

    def want(self, id: str, wanted: JobCommand, expires_at: float | None = None) -> Job | None:
        """Writes down what is wanted of a job that has not ended. None: there is no such job, or it has ended.

        One that no process has is cancelled at once, until `expires_at`, and one that has not begun is stopped so. A
        resumed one gets the time back that it was paused.
        """
        table, now = self.table, time.time()
        alive = and_(table.c.id == id, table.c.status.not_in(END_STATES))
        free = or_(table.c.worker.is_(None), table.c.lease < now)
        with self.engine.begin() as connection:
            if wanted in LAST_WISHES:
                untouched = and_(alive, free)
                if wanted == "stop":
                    untouched = and_(untouched, table.c.frames == 0)
                ended = {"status": Status.CANCELLED, "ended_at": now, "paused_at": None, "expires_at": expires_at}
                if (
                    job := self._change(connection, untouched, {"wanted": wanted, "worker": None, **ended})
                ) is not None:
                    return job
            open_to = alive if wanted == "cancel" else and_(alive, table.c.wanted.not_in(LAST_WISHES))
            changes: dict[str, Any] = {"wanted": wanted}
            if wanted == "run":
                changes |= {"paused_at": None, "deadline_at": table.c.deadline_at + now - table.c.paused_at}
                if (
                    job := self._change(connection, and_(open_to, table.c.paused_at.is_not(None)), changes)
                ) is not None:
                    return job
                changes = {"wanted": wanted}
            elif wanted == "pause":  # one that waits is paused at once
                pausing = {**changes, "paused_at": now, "worker": None}
                waits = and_(open_to, free, table.c.paused_at.is_(None))
                if (job := self._change(connection, waits, pausing)) is not None:
                    return job
            job = self._change(connection, open_to, changes)
            if job is None:  # it is being ended already
                row = connection.execute(select(table).where(alive)).first()
                job = None if row is None else _job_of(row)
            return job

    def set_change(self, id: str, change: Change) -> Job | None:
        """Adds a change to a job that has not ended, or writes anew the one with its id. None: there is no such job."""
        chosen = and_(self.table.c.id == id, self.table.c.status.not_in(END_STATES))
        with self.engine.begin() as connection:
            row = connection.execute(select(self.table.c.changes).where(chosen)).first()
            if row is None:
                return None
            changes = {each["id"]: each for each in row[0]} | {change.id: vars(change)}
            return self._change(connection, chosen, {"changes": list(changes.values())})

    def allow(self, id: str, frames: int) -> Job | None:
        """Allows so many frames of a session. None: so many were allowed already, or there is none that has a bound."""
        table = self.table
        chosen = and_(table.c.id == id, table.c.allowed < frames, table.c.status.not_in(END_STATES))
        with self.engine.begin() as connection:
            return self._change(connection, chosen, {"allowed": frames})

    def remove(self, id: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(self.table.delete().where(self.table.c.id == id))

    # Claims -----------------------------------------------------------------------------------------------------------

    def claim(self, worker: str) -> Job | None:
        """Takes the next free job. Those that never had a turn are first, then those that wait longest for one."""
        table = self.table
        while True:
            now = time.time()
            free = or_(table.c.worker.is_(None), table.c.lease < now)
            runs = or_(table.c.paused_at.is_(None), table.c.wanted != "pause")
            watched = or_(table.c.allowed.is_(None), table.c.frames < table.c.allowed, table.c.wanted.in_(LAST_WISHES))
            chosen = and_(table.c.status.not_in(END_STATES), free, runs, watched)
            with self.engine.begin() as connection:
                query = select(table.c.id).where(chosen).order_by(table.c.lease, table.c.number).limit(1)
                id = connection.execute(query).scalar()
                if id is None:
                    return None
                claimed = {"worker": worker, "lease": now + LEASE}
                if (job := self._change(connection, and_(table.c.id == id, free, runs), claimed)) is not None:
                    return job  # else another process was quicker

    def renew(self, worker: str, ids: Collection[str]) -> list[Job]:
        """Holds the claims of a process to these jobs, and returns those as they are wanted now."""
        table = self.table
        with self.engine.begin() as connection:
            mine = and_(table.c.worker == worker, table.c.id.in_(ids), table.c.status.not_in(END_STATES))
            connection.execute(update(table).where(mine).values(lease=time.time() + LEASE))
            return [_job_of(row) for row in connection.execute(select(table).where(mine))]

    def release(self, worker: str) -> None:
        """Gives back all jobs of a process that is known to be no more."""
        table = self.table
        with self.engine.begin() as connection:
            connection.execute(update(table).where(table.c.worker == worker).values(worker=None, lease=0.0))

    def workers(self) -> set[str]:
        """The processes that have jobs."""
        chosen = and_(self.table.c.worker.is_not(None), self.table.c.status.not_in(END_STATES))
        with self._reader.connect() as connection:
            return set(connection.execute(select(self.table.c.worker).where(chosen).distinct()).scalars())

    def fail_late(self, now: float, error: JobError, expires_at: float) -> list[str]:
        """Lets jobs fail that nobody has begun by their deadline, and returns their ids."""
        table = self.table
        late = and_(table.c.deadline_at < now, table.c.paused_at.is_(None), table.c.status.not_in(END_STATES))
        late = and_(late, or_(table.c.worker.is_(None), table.c.lease < now))
        changes = {"status": Status.FAILED, "error": error, "ended_at": now, "expires_at": expires_at, "worker": None}
        with self.engine.begin() as connection:
            ids = list(connection.execute(select(table.c.id).where(late)).scalars())
            if ids:
                connection.execute(update(table).where(table.c.id.in_(ids), late).values(_values_of(changes)))
        return ids

    def _change(self, connection: Connection, chosen: Any, changes: Mapping[str, Any]) -> Job | None:
        """Changes the one row that is chosen, and returns it."""
        statement = update(self.table).where(chosen).values(_values_of(changes)).returning(*self.table.columns)
        row = connection.execute(statement).first()
        return None if row is None else _job_of(row)


def _open(url: str) -> Engine:
    try:
        engine = create_engine(make_url(url), pool_pre_ping=True)
    except (ArgumentError, ImportError) as error:
        raise InputError(
            f"database is {_without_password(url)}: expected a SQLAlchemy URL ({first_line(error)})"
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_at_once)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    """Readers do not wait for writers; a writer waits for others for a while. SQLAlchemy begins transactions."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_at_once(connection: Connection) -> None:
    """A transaction that writes takes the lock when it begins: it never finds out later that another was quicker."""
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")


def _without_password(url: str) -> str:
    """The URL without a password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return repr(url)


def _make_table() -> Table:
    """The table whose columns are the fields of `Job`, with a number that tells the order in which jobs came."""
    kinds = get_type_hints(Job)
    columns: list[Column[Any]] = [Column("number", Integer, primary_key=True, autoincrement=True)]
    for each in fields(Job):
        kind = _column_type(kinds[each.name])
        columns.append(Column(each.name, kind, unique=each.name == "id", index=each.name in INDEX_COLUMNS))
    return Table("jobs", MetaData(), *columns)


def _column_type(kind: Any) -> Any:
    """The type of the column of a field: JSON for what is no plain value."""
    if get_origin(kind) is UnionType:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    return String if get_origin(kind) is Literal else TYPES.get(kind, JSON(none_as_null=True))


def _values_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values of columns: errors as JSON, and a status as its word."""
    values = dict(changes)
    if isinstance(error := values.get("error"), JobError):
        values["error"] = vars(error)
    if isinstance(status := values.get("status"), Status):
        values["status"] = status.value
    return values


def _job_of(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    del values["number"]
    error = values["error"]
    return Job(**values | {"status": Status(values["status"]), "error": None if error is None else JobError(**error)})
