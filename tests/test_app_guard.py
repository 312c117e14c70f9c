"""What the web page refuses, bounds and gives up: other sites, long requests, the crowd, those who leave."""

import asyncio
import json
import socket
from threading import Event

from aiohttp import BasicAuth, ClientSession
from page_client import answer_in, ask_about, ask_app, megabytes, post, running, user

from train_llava import app
from train_llava.app import App


def test_requests_that_are_too_deep_or_too_long(page, files):
    """One sentence each, and the server answers the next question."""
    url, process = page
    before = megabytes(process)
    (line,) = post(f"{url}/answer", b'{"messages": ' + b"[" * 100_000)[1].splitlines()
    assert json.loads(line)["error"].startswith("not a question")
    assert "1,048,576 are the most" in answer_in(ask_app(url, [user("word " * 300_000)]))
    assert "a conversation of 401 turns" in answer_in(ask_app(url, [user("a")] * 401))
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /answer HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 411")  # no length: it could be endless
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /image HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1073741824\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")  # before it holds the place of others
    assert megabytes(process, "VmHWM") - before < 200
    assert answer_in(ask_about(url, "What?", files[0]))


EVIL = "http://evil.example"


def test_another_site_gets_nothing_done(loaded, files):
    """A name of another site that leads here (DNS rebinding), and a form or script of its page."""
    forwards = []
    hook = loaded[0].register_forward_hook(lambda *_: forwards.append(1))
    question = json.dumps({"messages": [user("What?")], "max_new_tokens": 1})

    async def main():
        async with running(App(*loaded, "name", files[:1], None)) as url, ClientSession() as session:
            here = url.removeprefix("http://")
            tries = [{"Host": "evil.example"}, {"Host": f"evil.example:{here.rpartition(':')[2]}"}]
            tries += [{"Origin": EVIL}, {"Origin": "null"}, {"Origin": f"{EVIL}:80", "Content-Type": "text/plain"}]
            tries += [
                {"Origin": "http://["},
                {"Origin": f"http://localhost.{here}"},
                {"Host": "localhost.evil.example", "Origin": url},
            ]
            for headers in tries:
                for path in ("/answer", "/image"):
                    async with session.post(url + path, data=question, headers=headers) as reply:
                        assert reply.status == 403, headers
                for path in ("/", "/about", "/examples/0"):
                    async with session.get(url + path, headers=headers) as reply:
                        assert reply.status == 403, headers
            assert not forwards
            for headers in ({"Origin": url}, {}, {"Host": "localhost:1", "Origin": "http://localhost:1"}):
                async with session.post(f"{url}/answer", data=question, headers=headers) as reply:
                    assert reply.status == 200 and await reply.read()
            assert len(forwards) == 3
        # opened to a network by --host: other names lead here, too
        async with (
            running(App(*loaded, "name", [], None, local=False)) as url,
            ClientSession() as session,
            session.get(f"{url}/about", headers={"Host": "gpu-box.example"}) as reply,
        ):
            assert reply.status == 200

    asyncio.run(main())
    hook.remove()


def test_one_answer_at_a_time_and_no_more_than_can_be_held(loaded, monkeypatch):
    """A stand-in for the model counts how many answers are made at once, and waits until it may go on."""
    now, most, go = [0], [0], Event()

    def stream(*args, **options):
        now[0] += 1
        most[0] = max(most[0], now[0])
        go.wait(30)
        yield "Yes."
        now[0] -= 1

    monkeypatch.setattr(app, "stream", stream)
    monkeypatch.setattr(app, "MOST_WAITING", 3)
    question = json.dumps({"messages": [user("What?")]})

    async def slowly():
        yield b"{"
        await asyncio.sleep(2)

    async def ask_one(session, url, body=question):
        async with session.post(f"{url}/answer", data=body) as reply:
            return (await reply.text()).splitlines()[-1]

    async def main():
        one = App(*loaded, "name", [], None)
        async with running(one) as url, ClientSession() as session:
            asked = [asyncio.create_task(ask_one(session, url)) for _ in range(3)]
            while one.waiting < 3:
                await asyncio.sleep(0.01)
            assert "too many questions are waiting" in await ask_one(session, url)
            monkeypatch.setattr(app, "MOST_SECONDS_TO_SEND", 0.2)
            slow = {"Content-Length": "1000"}
            async with session.post(f"{url}/answer", data=slowly(), headers=slow) as reply:
                assert reply.status == 408
            held = one.held
            assert held == 3 * len(question)
            monkeypatch.setattr(app, "MOST_WAITING", 10)
            monkeypatch.setattr(app, "MOST_HELD", held + len(question) - 1)
            assert "too many questions are waiting" in await ask_one(session, url)
            monkeypatch.setattr(app, "MOST_HELD", held + len(question))
            asked.append(asyncio.create_task(ask_one(session, url)))
            while one.waiting < 4:
                await asyncio.sleep(0.01)
            go.set()
            assert [json.loads(line) for line in await asyncio.gather(*asked)] == [{"text": "Yes."}] * 4
            assert one.held == one.waiting == 0

    asyncio.run(asyncio.wait_for(main(), 60))
    assert most == [1]


def test_the_login(loaded):
    async def main():
        async with running(App(*loaded, "name", [], "ann:pass:wörd")) as url, ClientSession() as session:
            for path in ("", "about", "examples/0"):
                for wrong in ({}, {"Authorization": "Basic ä"}, {"Authorization": BasicAuth("ann").encode()}):
                    async with session.get(f"{url}/{path}", headers=wrong) as reply:
                        assert reply.status == 401 and reply.headers["WWW-Authenticate"].startswith("Basic ")
            async with session.get(f"{url}/about", auth=BasicAuth("ann", "pass:wörd", "utf-8")) as reply:
                assert reply.status == 200

    asyncio.run(main())


def test_leaving_ends_the_answer_and_gives_up_the_place_in_the_queue(loaded):
    """One leaves while the answer is told, another one while it waits for its turn."""
    forwards = []
    hook = loaded[0].register_forward_hook(lambda *_: forwards.append(1))
    asked = {"messages": [user("What?")], "max_new_tokens": 400}

    async def leave(session, url, after):
        async with session.post(f"{url}/answer", json=asked) as reply:
            while after not in json.loads(await reply.content.readline()):
                pass
            reply.close()

    async def main():
        one = App(*loaded, "name", [], None)
        async with running(one) as url, ClientSession() as session:
            async with one.lock:
                await leave(session, url, "waiting")
                while one.waiting:
                    await asyncio.sleep(0.01)
            await leave(session, url, "text")
            while one.waiting:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 60))
    hook.remove()
    assert 0 < len(forwards) < 400  # one answer alone would have been 400
