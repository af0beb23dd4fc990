"""What the browser is told and what it may ask for. Everything but the page itself is JSON or NIfTI.

Only this machine is answered, and of it only who came by the address that the command printed: that address holds a
token that works once and is changed for a cookie.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from nnunet_oneshot.errors import USER_ERRORS, OneShotError
from nnunet_oneshot.review.decisions import ConflictError, UnknownCaseError
from nnunet_oneshot.review.desk import Desk
from nnunet_oneshot.review.viewer import niivue_module

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route
except ModuleNotFoundError as error:
    raise OneShotError(
        f"expected the package {error.name} for the review page, found none; "
        'install it: pip install ".[review]" in the clone'
    ) from error

HOSTS = ("127.0.0.1", "localhost")
PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "review.js": "text/javascript; charset=utf-8",
    "review.css": "text/css; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data: blob:; font-src 'self' data:; "
        "style-src 'self' 'unsafe-inline'; worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
REFUSED = "Open this page by the address that nnUNetv2_oneshot_review printed; it works once. Else start it again."


class Choice(BaseModel):
    """A decision as the page sends it."""

    action: Literal["accept", "reject", "flag", "unflag", "comment", "undo"]
    comment: str | None = Field(None, max_length=2000)
    seen: str | None = None


class Door:
    """Lets in who brings the token, once; afterwards who brings the cookie that was given for it."""

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(32)
        self._cookie_name, self._cookie = f"nnunet_oneshot_{port}", secrets.token_urlsafe(32)
        self._used = False

    def enter(self, request: Request) -> Response | None:
        """The way in: the cookie for the token; None where the request brings no token that is good."""
        given = request.query_params.get("token", "")
        if self._used or not secrets.compare_digest(given.encode(), self.token.encode()):
            return None
        self._used = True
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(self._cookie_name, self._cookie, httponly=True, samesite="lax", path="/")
        return answer

    def is_open(self, request: Request) -> bool:
        """Whether the request brings the cookie and, where it changes anything, comes from this page."""
        given = request.cookies.get(self._cookie_name, "")
        if not secrets.compare_digest(given.encode(), self._cookie.encode()):
            return False
        # Another server on this machine is "the same site" to a browser's cookies, but not the same origin.
        origin = request.headers.get("origin")
        return origin is None or origin == f"{request.url.scheme}://{request.headers.get('host')}"


def make_app(desk: Desk, door: Door) -> Starlette:
    """The application that serves the page of one dataset."""
    api = _Api(desk)
    case = "/api/cases/{case}"
    routes = [
        Route("/", _page("index.html")),
        *(Route(f"/{name}", _page(name)) for name in PAGE_FILES if name != "index.html"),
        Route("/niivue.js", _niivue),
        Route("/api/dataset", api.dataset),
        *(Route(f"{case}/{kind}.nii.gz", api.volume(kind)) for kind in ("image", "label", "divergence")),
        Route(f"{case}/sheet.jpg", api.sheet),
        Route(f"{case}/decision", api.decide, methods=["POST"]),
        Route(f"{case}/label", api.correct, methods=["PUT"]),
        Route(f"{case}/carry", api.carry, methods=["POST"]),
        Route(f"{case}/checkout", api.check_out, methods=["POST"]),
        Route(f"{case}/checkin", api.check_in, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = dict.fromkeys(USER_ERRORS, _refused)
    app = Starlette(
        routes=routes,
        exception_handlers=handlers,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS)), Middleware(_Guard, door=door)],
    )
    app.router.redirect_slashes = False
    return app


class _Guard:
    """Asks the door about every request, and adds headers that keep the page to itself."""

    def __init__(self, app: Any, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((key.lower().encode(), value.encode()) for key, value in HEADERS.items()),
                ]
            await send(message)

        request = Request(scope, receive)
        answer = self._door.enter(request) if request.url.path == "/" and "token" in request.query_params else None
        if answer is None and not self._door.is_open(request):
            answer = PlainTextResponse(REFUSED, status_code=403)
        await (answer or self._app)(scope, receive, send_with_headers)


class _Api:
    """One method a question."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def dataset(self, request: Request) -> Response:
        return JSONResponse(self._desk.overview())

    def volume(self, kind: str) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            content = self._desk.volume(_case(request), kind, _number(request, "channel") or 0)
            # As a file, not as an encoding: the viewer unpacks it.
            return Response(content, media_type="application/gzip")

        return answer

    def sheet(self, request: Request) -> Response:
        return Response(self._desk.sheet(_case(request)), media_type="image/jpeg")

    async def decide(self, request: Request) -> Response:
        try:
            choice = Choice.model_validate_json(await _body(request, 1 << 16))
        except ValidationError as error:
            raise OneShotError(f"expected a decision, found {error.errors()[0]['msg']}; reload the page") from error
        return await _record(self._desk.decide, _case(request), choice.action, choice.comment, choice.seen)

    async def correct(self, request: Request) -> Response:
        case, asked = _case(request), request.query_params
        content = await _body(request, self._desk.size_limit(case))
        return await _record(self._desk.correct, case, content, asked.get("name", ""), asked.get("seen"))

    async def check_in(self, request: Request) -> Response:
        return await _record(self._desk.check_in, _case(request), request.query_params.get("seen"))

    def check_out(self, request: Request) -> Response:
        return JSONResponse(self._desk.check_out(_case(request)))

    async def carry(self, request: Request) -> Response:
        case, asked = _case(request), request.query_params
        content = await _body(request, self._desk.size_limit(case))
        reach = _number(request, "reach")
        carried = await run_in_threadpool(self._desk.carry, case, content, asked.get("offer"), reach)
        headers = {"X-Offer": carried.offer, "X-Carried": carried.text}
        return Response(carried.nifti, media_type="application/gzip", headers=headers)


async def _record(function: Callable[..., dict[str, Any]], *arguments: Any) -> Response:
    return JSONResponse(await run_in_threadpool(function, *arguments))


async def _body(request: Request, limit: int) -> bytes:
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > limit:
            raise OneShotError(f"expected at most {limit} bytes, found more; this is no label of that case")
    return content


def _case(request: Request) -> str:
    return str(request.path_params["case"])


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name) or None
    if text is not None and not text.isdecimal():
        raise OneShotError(f"expected a whole number for {name}, found {text!r}; correct it")
    return None if text is None else int(text)


def _page(name: str) -> Callable[[Request], Response]:
    content = files("nnunet_oneshot.review").joinpath("page", name).read_bytes()

    def answer(request: Request) -> Response:
        return Response(content, media_type=PAGE_FILES[name])

    return answer


def _niivue(request: Request) -> Response:
    return Response(niivue_module(), media_type="text/javascript; charset=utf-8", headers={"Cache-Control": "private"})


def _refused(request: Request, error: Exception) -> Response:
    status = 404 if isinstance(error, UnknownCaseError) else 409
    return JSONResponse({"error": str(error), "conflict": isinstance(error, ConflictError)}, status_code=status)
