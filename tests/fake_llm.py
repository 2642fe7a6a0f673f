"""A real HTTP server that speaks the streamed chat protocol of OpenAI, and can be made slow, broken or rate-limited.

Each request takes the next script of `script`; the last one is used again and again. A script is a list of steps:

    {"status": 429, "headers": {…}, "json": {…}}   answers this and nothing else
    {"delta": {…}, "finish": "stop"}               one chunk
    {"usage": {…}}                                 the last chunk
    {"raw": "…"}                                   these bytes
    {"wait": event}                                until the event is set
    {"done": True}                                 data: [DONE]
    {"hang_up": True}                              closes the connection in the middle
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

Script = list[dict[str, Any]]


def answer(*words: str, usage: bool = True) -> Script:
    """What a model says that says these words."""
    steps: Script = [{"delta": {"content": word}} for word in words]
    steps.append({"delta": {}, "finish": "stop"})
    if usage:
        steps.append(
            {
                "usage": {
                    "prompt_tokens": 10,
                    "completion_tokens": len(words),
                    "prompt_tokens_details": {"cached_tokens": 4},
                }
            }
        )
    return [*steps, {"done": True}]


def tool(name: str, *arguments: str, call_id: str = "call_1") -> Script:
    """What a model says that wants a tool; the arguments come in pieces."""
    begin = {"index": 0, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
    return [
        {"delta": {"role": "assistant", "content": None, "tool_calls": [begin]}},
        *({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}} for part in arguments),
        {"delta": {}, "finish": "tool_calls"},
        {"done": True},
    ]


def refusal(status: int, code: str = "server_error", **headers: str) -> Script:
    error = {"error": {"message": "The key sk-live-shown-by-provider is wrong", "type": code, "code": code}}
    return [{"status": status, "headers": headers, "json": error}]


class FakeLlm:
    def __init__(self, *script: Script) -> None:
        self.script = list(script)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    async def __aenter__(self) -> FakeLlm:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whoever goes away in the middle, or never comes back, ends only his own connection.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:] if line)}
        self.headers.append(headers)
        self.bodies.append(json.loads(await reader.readexactly(int(headers["content-length"]))))
        script = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if "status" in script[0]:
            step = script[0]
            body = json.dumps(step["json"]).encode()
            extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in step["headers"].items())
            head = f"HTTP/1.1 {step['status']} No\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{extra}\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n")
        writer.write(b"Connection: close\r\n\r\n")
        for step in script:
            if "wait" in step:
                await step["wait"].wait()
                continue
            if step.get("hang_up"):
                return
            data = self._encode(step)
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _encode(self, step: dict[str, Any]) -> bytes:
        if "raw" in step:
            return str(step["raw"]).encode()
        if step.get("done"):
            return b"data: [DONE]\n\n"
        if "usage" in step:
            return b"data: %s\n\n" % json.dumps({"choices": [], "usage": step["usage"]}).encode()
        choice = {"index": 0, "delta": step["delta"], "finish_reason": step.get("finish")}
        return b"data: %s\n\n" % json.dumps({"id": "x", "choices": [choice]}).encode()
