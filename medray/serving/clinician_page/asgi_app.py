"""The clinician page's endpoints, as an ASGI app on a store of judgements (FastAPI; no Ray)."""

from __future__ import annotations

import io
import math
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from medray.clinicians.agreement import summary
from medray.clinicians.database import ID_LENGTH
from medray.clinicians.import_export import export_all, judgement_rows, progress_of
from medray.clinicians.store import KeyUsed, NotAssigned, Store, Word
from medray.config import DataConfig
from medray.images.decoding import LARGEST_SQUARE, decode
from medray.serving.clinician_page.sessions import Sessions, TooManyFailures, client_address
from medray.serving.guard import PAGE_HEADERS, Guard, Unavailable, refused, reraise, unavailable
from medray.serving.tokens import Holder, Tokens

STATIC = Path(__file__).parent / "static"
COOKIE = "medray_clinician"
MAX_BODY_BYTES = 2**20
DATABASE_SILENT = "the database does not answer; try again"
MAX_TEXT = 20_000  # characters of an edited text
# Items were checked on their way in, under the limits of whoever brought them: a job may allow larger images
# than the defaults do.
_STORED = DataConfig(
    max_image_bytes=2**32, max_image_pixels=LARGEST_SQUARE, max_aspect=LARGEST_SQUARE, min_image_side=1
)


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("has a NUL character")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


Name = Annotated[str, Field(min_length=1, max_length=ID_LENGTH), AfterValidator(_storable)]
Edit = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_storable), AfterValidator(_not_blank)]
SaveKey = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SignIn(_Body):
    token: Annotated[str, Field(max_length=200)]


class Undo(_Body):
    save_key: SaveKey


class Said(_Body):
    """A judgement as the page sends it; first and second are the answers in the order shown."""

    item_id: Name
    save_key: SaveKey
    status: Literal["judged", "skipped", "not_answerable"]
    good_first: bool | None = None
    good_second: bool | None = None
    edited_question: Edit | None = None
    edited_first: Edit | None = None
    edited_second: Edit | None = None
    seconds: Annotated[float, Field(ge=0, le=1e6)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Said:
        ticks = (self.good_first, self.good_second)
        if self.status == "judged" and None in ticks:
            raise ValueError("judge both answers")
        if self.status != "judged" and (
            ticks != (None, None) or self.edited_question or self.edited_first or self.edited_second
        ):
            raise ValueError(f"{self.status} goes with no ticks and no edits")
        return self

    def word(self) -> Word:
        return Word(**self.model_dump(exclude={"item_id", "save_key"}))


def make_app(
    store: Store,
    tokens: Tokens,
    url: str,
    title: str = "",
    guidance: str = "",
    session_hours: float = 12.0,
    proxies: Collection[str] = ("127.0.0.1", "::1"),
) -> Any:
    """The guarded app: the page at /, its parts under /static, its data under /api.

    Args:
        url: of the store's database, for exports.
        title, guidance: shown on the page as plain text.
        session_hours: after which clinicians must sign in again.
        proxies: addresses of reverse proxies, whose X-Forwarded-For names the client.
    """
    sessions = Sessions(store.engine, tokens, session_hours)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount(
        "/static", StaticFiles(directory=STATIC, packages=[("medray.serving", "static")]), name="static"
    )
    _answer_errors(app)

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.post("/api/sign-in")
    def sign_in(said: SignIn, request: Request, response: Response) -> dict[str, Any]:
        try:
            made = sessions.sign_in(
                said.token.strip(), client_address(request.scope, proxies), request.cookies.get(COOKIE)
            )
        except TooManyFailures as error:
            message = f"too many failed sign-ins; try again in {error.seconds:.0f} seconds"
            raise HTTPException(429, message, {"Retry-After": str(math.ceil(error.seconds))}) from None
        if made is None:
            raise HTTPException(401, "this token is not known; ask whoever runs the study for another")
        holder, identity = made
        secure = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
        response.set_cookie(
            COOKIE,
            identity,
            max_age=int(sessions.seconds),
            httponly=True,
            samesite="strict",
            secure=secure,
            path="/",
        )
        return about(holder)

    @app.post("/api/sign-out")
    def sign_out(request: Request, response: Response) -> dict[str, Any]:
        if identity := request.cookies.get(COOKIE):
            sessions.sign_out(identity)
        response.delete_cookie(COOKIE, path="/")
        return {}

    @app.get("/api/me")
    def me(request: Request) -> dict[str, Any]:
        return about(request.state.holder)

    @app.get("/api/next")
    def next_item(request: Request) -> dict[str, Any]:
        return state(request.state.holder.name, store.next_item(request.state.holder.name))

    @app.get("/api/image")
    def image(item: Annotated[Name, Query()], request: Request) -> Response:
        data = store.image(item, request.state.holder.name)
        if data is None:
            raise HTTPException(404, "there is no such image among your items")
        return Response(*displayable(data))

    @app.post("/api/judgements")
    def judge(said: Said, request: Request) -> dict[str, Any]:
        stored = store.save(request.state.holder.name, said.item_id, said.save_key, said.word())
        return {"stored": stored}

    @app.post("/api/undo")
    def undo(said: Undo, request: Request) -> dict[str, Any]:
        return state(request.state.holder.name, store.undo(request.state.holder.name, said.save_key))

    @app.get("/api/agreement")
    def agreement(request: Request) -> dict[str, Any]:
        lead_only(request)
        return {
            **summary(judgement_rows(store.engine)),
            "progress": progress_of(url, store.judgements_per_item),
        }

    @app.get("/api/export")
    def export(request: Request) -> FileResponse:
        lead_only(request)
        folder = tempfile.TemporaryDirectory(prefix="medray-export-")
        archive = zipped(url, Path(folder.name))
        return FileResponse(
            archive,
            media_type="application/zip",
            filename="judgements.zip",
            background=BackgroundTask(folder.cleanup),
        )

    def about(holder: Holder | None) -> dict[str, Any]:
        if holder is None:
            return {"name": None}
        return {"name": holder.name, "lead": holder.lead, "title": title, "guidance": guidance}

    def state(clinician: str, shown: Any) -> dict[str, Any]:
        return {"item": shown and asdict(shown), "progress": store.progress(clinician)}

    async def of_session(identity: str) -> Holder | None:
        try:
            return await run_in_threadpool(sessions.holder, identity)
        except (OperationalError, PoolTimeout):
            raise Unavailable(DATABASE_SILENT) from None

    return Guard(
        app,
        tokens.holder,
        {"/", "/static/", "/api/me"},
        MAX_BODY_BYTES,
        COOKIE,
        PAGE_HEADERS,
        open_posts={"/api/sign-in"},
        holder_of_cookie=of_session,
    )


def lead_only(request: Request) -> None:
    if not request.state.holder.lead:
        raise HTTPException(403, "only a lead may see this")


def displayable(data: bytes) -> tuple[bytes, int, dict[str, str]]:
    """An image that every browser shows, with its status and headers: as found where it is an 8-bit JPEG
    or PNG, else as PNG.
    """
    with Image.open(io.BytesIO(data)) as image:
        kind, mode = image.format, image.mode
    if kind not in ("JPEG", "PNG") or mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        buffer = io.BytesIO()
        decode(data, _STORED).save(buffer, "PNG")
        data, kind = buffer.getvalue(), "PNG"
    return data, 200, {"Content-Type": f"image/{kind.lower()}"}


def zipped(url: str, folder: Path) -> Path:
    """judgements/, pairs/ and demonstrations/ in an archive under `folder`; what is already compressed is
    stored.
    """
    export_all(url, str(folder / "out"))
    archive = folder / "judgements.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:
        for path in sorted((folder / "out").rglob("*.parquet")):
            target.write(path, path.relative_to(folder / "out"))
    return archive


def _answer_errors(app: FastAPI) -> None:
    app.add_exception_handler(Exception, reraise)

    @app.exception_handler(HTTPException)
    async def _(_request: Request, error: HTTPException) -> Response:
        return refused(error.status_code, str(error.detail), "invalid_request", error.headers)

    @app.exception_handler(RequestValidationError)
    async def _(_request: Request, error: RequestValidationError) -> Response:
        # What was sent stays out of the answer: it may not even be text that can be sent back.
        first = error.errors()[0]
        return refused(422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}", "invalid_request")

    @app.exception_handler(NotAssigned)
    @app.exception_handler(KeyUsed)
    async def _(_request: Request, error: Exception) -> Response:
        return refused(409, str(error), "conflict")

    @app.exception_handler(OperationalError)
    @app.exception_handler(PoolTimeout)
    async def _(_request: Request, _error: Exception) -> Response:
        return unavailable(DATABASE_SILENT)
