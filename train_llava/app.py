"""A web page on which people show images to a trained LLaVA and ask about them.

    python -m train_llava.app --model_name_or_path output/first [--examples images]

All who have the page open ask through one queue; every answer is generated alone, so it does not depend on who else is
asking. The server remembers nothing: the page sends the conversation, images included, with every question.

Why not Gradio's chat: it was tried (6.31) and does not hold two things that this page promises. An answer that contains
HTML is not shown as it is (`<img src=x> ![](b)` becomes `![](b)`, also with render_markdown=False), and results that
nobody fetches stay in memory for up to 2,000 sessions. Its guards against other sites took as much code as this server.
"""

import asyncio
import base64
import hmac
import json
import os
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from PIL import Image
from transformers import LlavaProcessor

from train_llava.cli import InputError, command, command_parser
from train_llava.ingest.conversation import check_conversation_size
from train_llava.ingest.image_kinds import SHOWN, suffixes_of
from train_llava.ingest.limits import (
    MOST_EXAMPLES,
    MOST_HELD,
    MOST_IMAGES,
    MOST_MEGABYTES,
    MOST_NEW_TOKENS,
    MOST_PIXELS_ASKED,
    MOST_SECONDS_TO_SEND,
    MOST_WAITING,
)
from train_llava.model.generate import Example, ask, stream
from train_llava.model.load import Model, load
from train_llava.processing.images import open_image

PAGE = Path(__file__).parent / "pages" / "app.html"
AUTH = "TRAIN_LLAVA_AUTH"
MOST_BYTES = 4 * MOST_MEGABYTES << 20  # of a request
FULL = "too many questions are waiting. Ask again in a minute."
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class App:
    """The page's server for one model.

    Args:
        name: what the page calls the model.
        examples: image files that the page offers.
        auth: "user:password", which the browser asks for; None lets everybody in.
        local: whether only this machine is served. Then the page must be asked for by one of this machine's own names;
            a foreign name that leads here is another site's attempt to use the visitor's browser (DNS rebinding).
    """

    def __init__(
        self,
        model: Model,
        processor: LlavaProcessor,
        name: str,
        examples: list[Path],
        auth: str | None,
        local: bool = True,
    ) -> None:
        self.model, self.processor, self.name, self.examples, self.auth = model, processor, name, examples, auth
        self.local = local
        self.lock = asyncio.Lock()  # first come, first served
        self.checking = asyncio.Lock()  # one at a time, so that memory holds one such image
        self.waiting = 0
        self.held = 0  # bytes of all requests that are being read or answered

    def routes(self) -> web.Application:
        """The application that aiohttp serves."""
        middlewares = [self.site_middleware, self.auth_middleware, json_errors, self.size_middleware]
        app = web.Application(middlewares=middlewares, client_max_size=MOST_BYTES)
        app.router.add_get("/", self.page)
        app.router.add_get("/about", self.about)
        app.router.add_get("/examples/{index:[0-9]+}", self.example)
        app.router.add_post("/image", self.check)
        app.router.add_post("/answer", self.answer)
        return app

    @web.middleware
    async def site_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses what another site's page lets the visitor's browser send, before anything of it is read."""
        host = urlsplit(f"//{request.host}")
        origin = request.headers.get("Origin")
        foreign = origin is not None and origin.rpartition("://")[2] != host.netloc
        if foreign or (self.local and host.hostname not in LOOPBACK):
            return web.Response(status=403, text="Open the page by the address that the server has printed.")
        return await handler(request)

    @web.middleware
    async def auth_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Asks for the password, if there is one."""
        given = request.headers.get("Authorization", "").encode(errors="replace")
        expected = "Basic " + base64.b64encode((self.auth or "").encode()).decode()
        if self.auth and not hmac.compare_digest(given, expected.encode()):  # in the same time, however wrong
            asks = 'Basic realm="LLaVA", charset="UTF-8"'
            return web.Response(status=401, text="Log in.", headers={"WWW-Authenticate": asks})
        return await handler(request)

    @web.middleware
    async def size_middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Reads the request, and bounds what all requests together hold in memory. Each must say how long it is, as
        browsers do, and be sent in time."""
        size = request.content_length or 0
        if request.body_exists and request.content_length is None:
            raise web.HTTPLengthRequired
        if size > MOST_BYTES:
            raise web.HTTPRequestEntityTooLarge(MOST_BYTES, size)
        if self.held + size > MOST_HELD:
            return web.json_response({"error": FULL}, status=503)
        self.held += size
        try:
            try:
                await asyncio.wait_for(request.read(), MOST_SECONDS_TO_SEND)  # the handlers get it from the request
            except asyncio.TimeoutError as error:
                raise web.HTTPRequestTimeout from error
            return await handler(request)
        finally:
            self.held -= size

    async def page(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    async def about(self, request: web.Request) -> web.StreamResponse:
        """What the page needs to know about this server."""
        limits = {"images": MOST_IMAGES, "megabytes": MOST_MEGABYTES, "tokens": MOST_NEW_TOKENS}
        return web.json_response({"name": self.name, "examples": [path.name for path in self.examples], **limits})

    async def example(self, request: web.Request) -> web.StreamResponse:
        index = int(request.match_info["index"])
        if index >= len(self.examples):
            raise web.HTTPNotFound
        return web.FileResponse(self.examples[index])

    async def check(self, request: web.Request) -> web.StreamResponse:
        """Whether a file can be asked about; the page asks as soon as it is chosen."""
        data = await request.read()
        async with self.checking:
            image = await asyncio.to_thread(read_image, data, request.query.get("name", "the file"))
        return web.json_response({"width": image.width, "height": image.height})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Sends a line of JSON for each piece: {"waiting": questions before this one}, {"text"}, at last {"error"}."""
        try:
            question = await request.json()
            options = options_of(question)
        except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
            raise InputError(f"not a question ({error}).") from error
        if self.waiting >= MOST_WAITING:
            raise InputError(FULL)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "X-Accel-Buffering": "no"})
        await response.prepare(request)

        async def send(**line) -> None:
            await response.write(json.dumps(line).encode() + b"\n")

        self.waiting += 1
        try:
            await send(waiting=self.waiting - 1)
            async with self.lock:
                await self.stream_answer(question, options, send)
        finally:
            self.waiting -= 1
        return response

    async def stream_answer(
        self, question: dict[str, Any], options: dict[str, Any], send: Callable[..., Awaitable]
    ) -> None:
        """Sends the pieces of an answer as they come. When the browser goes away, aiohttp cancels this."""
        loop, pieces, stop = asyncio.get_running_loop(), asyncio.Queue(), Event()

        def put(**piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def run() -> None:
            try:
                for text in stream(self.model, self.processor, conversation(question), stop, **options):
                    put(text=text)
            except InputError as error:
                put(error=str(error))
            except Exception:
                traceback.print_exc()
                put(error="something went wrong here; the server's log says what.")
            put()

        running = loop.run_in_executor(None, run)
        try:
            while piece := await pieces.get():
                await send(**piece)
        finally:
            stop.set()
            await running


@web.middleware
async def json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns errors into {"error": a sentence}."""
    try:
        return await handler(request)
    except InputError as error:
        return web.json_response({"error": str(error)}, status=400)
    except web.HTTPRequestEntityTooLarge:
        return web.json_response({"error": f"more than {4 * MOST_MEGABYTES} MB at once."}, status=413)


def read_image(data: bytes, name: str) -> Image.Image:
    """An uploaded file as RGB.

    Raises:
        InputError: too large a file, too many pixels, or not an image that is read here.
    """
    if len(data) > MOST_MEGABYTES << 20:
        raise InputError(f"{name}: larger than {MOST_MEGABYTES} MB.")
    return open_image({"path": name, "bytes": data}, SHOWN, MOST_PIXELS_ASKED)


def conversation(question: dict[str, Any]) -> Example:
    """The page's {"messages": [{"role", "content", "images": [base64]}]} as an example.

    Raises:
        InputError: of another form, or with an image that cannot be read.
    """
    messages, images = [], []
    try:
        if sum(len(message.get("images", [])) for message in question["messages"]) > MOST_IMAGES:
            raise InputError(f"more than {MOST_IMAGES} images. Start a new chat.")
        texts = [{"content": str(message["content"])} for message in question["messages"]]
        check_conversation_size(texts)  # before any image is decoded
        for message in question["messages"]:
            role, content = message["role"], str(message["content"])
            if role == "user":
                files = [base64.b64decode(data) for data in message.get("images", [])]
                own = [read_image(data, f"image {len(images) + i}") for i, data in enumerate(files, 1)]
                content, images = ask(content, own)["messages"][0]["content"], images + own
            messages.append({"role": {"user": "user", "assistant": "assistant"}[role], "content": content})
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"not a conversation ({error}).") from error
    return {"messages": messages, "images": images}


def options_of(question: dict[str, Any]) -> dict[str, Any]:
    """The page's settings as options of `generate`, each brought into its range."""
    tokens = max(1, min(MOST_NEW_TOKENS, int(question.get("max_new_tokens", 256))))
    temperature, top_p = float(question.get("temperature", 0)), float(question.get("top_p", 1))
    if not temperature > 0:
        return {"max_new_tokens": tokens}
    drawn = {"do_sample": True, "temperature": min(2.0, temperature), "top_p": min(1.0, max(1e-6, top_p)), "top_k": 0}
    return {"max_new_tokens": tokens, **drawn}


@command
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="LLaVA or adapter: a folder or a hub id")
    parser.add_argument("--adapter_name_or_path", help="adapter to put on top of the model")
    parser.add_argument("--examples", type=Path, help="folder of images to offer on the page")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--auth", default=os.environ.get(AUTH), help=f"USER:PASSWORD to log in with; better in {AUTH}")
    args = parser.parse_args()
    if args.auth is not None and not all(args.auth.partition(":")):
        parser.error("--auth is USER:PASSWORD")
    if args.examples and not args.examples.is_dir():
        raise InputError(f"{args.examples}: no such folder of examples.")
    examples = sorted(args.examples.iterdir()) if args.examples else []
    examples = [path for path in examples if path.suffix.lower() in suffixes_of(SHOWN)][:MOST_EXAMPLES]
    name = Path(args.adapter_name_or_path or args.model_name_or_path).name
    local = args.host in LOOPBACK
    app = App(*load(args.model_name_or_path, args.adapter_name_or_path), name, examples, args.auth, local)
    if not local and not args.auth:
        print("warning: whoever reaches this address can ask. Set a password: --auth USER:PASSWORD", flush=True)
    address = f"http://{args.host}:{args.port} (Ctrl-C ends it)"
    try:
        options = {"handler_cancellation": True, "shutdown_timeout": 2, "access_log": None}
        web.run_app(app.routes(), host=args.host, port=args.port, print=lambda _: print(address, flush=True), **options)
    except OSError as error:
        raise InputError(f"--host {args.host} --port {args.port}: {error.strerror}. Give others.") from error


if __name__ == "__main__":
    main()
