"""The routes for clients: `/run`, `/status`, `/stream`, `/cancel`, `/health`, `/openai/*`, ...

Answers are those of RunPod's "Operation reference", https://docs.runpod.io/serverless/endpoints.
"""

import asyncio
import contextlib
import json
from typing import Any

from aiohttp import web

from emulator import webhook
from emulator.queue import Job, Queue

KEY = "client-key"
"""The API key of clients, sent as `Authorization: client-key` or `Authorization: Bearer
client-key`."""
DEFAULT_WAIT_MS = 90_000


class ClientApi:
    """The routes below `https://api.runpod.ai/v2`."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self._webhooks: set[asyncio.Task[None]] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v2/{endpoint}/run", self.run),
            web.post("/v2/{endpoint}/runsync", self.runsync),
            web.get("/v2/{endpoint}/status/{job}", self.status),
            web.get("/v2/{endpoint}/stream/{job}", self.stream),
            web.post("/v2/{endpoint}/cancel/{job}", self.cancel),
            web.post("/v2/{endpoint}/retry/{job}", self.retry),
            web.post("/v2/{endpoint}/purge-queue", self.purge),
            web.get("/v2/{endpoint}/requests", self.requests),
            web.get("/v2/{endpoint}/health", self.health),
            web.route("*", "/v2/{endpoint}/openai/{path:.*}", self.openai),
        ]

    async def run(self, request: web.Request) -> web.Response:
        job = await self._add(await _body(request))
        return web.json_response({"id": job.id, "status": job.status})

    async def runsync(self, request: web.Request) -> web.Response:
        wait_ms = int(request.query.get("wait", DEFAULT_WAIT_MS))
        job = await self._add(await _body(request), prefix="sync-")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_over(job), wait_ms / 1000)
        return web.json_response(job.view())

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self._job(request).view())

    async def stream(self, request: web.Request) -> web.Response:
        job = self._job(request)
        unread, job.num_read = job.chunks[job.num_read :], len(job.chunks)
        stream = [{"output": chunk} for chunk in unread]
        return web.json_response({"status": job.status, "stream": stream})

    async def cancel(self, request: web.Request) -> web.Response:
        job = self._job(request)
        await self.queue.cancel(job)
        return web.json_response({"id": job.id, "status": job.status})

    async def retry(self, request: web.Request) -> web.Response:
        job = self._job(request)
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise web.HTTPBadRequest(text="only failed jobs can be retried")
        await self.queue.retry(job)
        self._notify(job)
        return web.json_response({"id": job.id, "status": job.status})

    async def purge(self, request: web.Request) -> web.Response:
        _authorize(request)
        return web.json_response({"removed": await self.queue.purge(), "status": "completed"})

    async def requests(self, request: web.Request) -> web.Response:
        """Returns all jobs. RunPod documents the route and its rate limit; the form of the answer
        is a guess."""
        _authorize(request)
        jobs = [job.view() for job in self.queue.jobs.values()]
        return web.json_response({"requests": jobs})

    async def health(self, request: web.Request) -> web.Response:
        _authorize(request)
        statuses = {"completed": "COMPLETED", "failed": "FAILED", "inQueue": "IN_QUEUE"}
        jobs = {name: self.queue.count(status) for name, status in statuses.items()}
        num_retried = sum(job.num_retries for job in self.queue.jobs.values())
        jobs |= {"inProgress": self.queue.count("IN_PROGRESS"), "retried": num_retried}
        return web.json_response({"jobs": jobs, "workers": self.queue.workers()})

    async def openai(self, request: web.Request) -> web.StreamResponse:
        """Handles a request of the OpenAI gateway: creates a job from it, and a response from its
        output."""
        _authorize(request)
        body = await _json(request) if request.can_read_body else None
        wrapped: dict[str, Any] = {"openai_route": "/" + request.match_info["path"]}
        if body is not None:
            wrapped["openai_input"] = body
        job = await self._add({"input": wrapped})
        if isinstance(body, dict) and body.get("stream"):
            return await self._sse(request, job)
        await _over(job)
        if job.status != "COMPLETED":
            return _failed(job)
        is_one = isinstance(job.output, list) and len(job.output) == 1
        return web.json_response(job.output[0] if is_one else job.output)

    async def _sse(self, request: web.Request, job: Job) -> web.StreamResponse:
        """Sends text chunks as they come. A client that disconnects cancels its job (a guess)."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while job.num_read < len(job.chunks) or not job.is_over:
                changed = job.has_changed
                unread, job.num_read = job.chunks[job.num_read :], len(job.chunks)
                for chunk in unread:
                    await response.write(chunk.encode())
                if not unread and not job.is_over:
                    await changed.wait()
        except ConnectionError:
            await self.queue.cancel(job)
        return response

    async def _add(self, body: dict[str, Any], prefix: str = "") -> Job:
        try:
            job = await self.queue.add(body, prefix)
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        self._notify(job)
        return job

    def _notify(self, job: Job) -> None:
        """Reports the end of the job to its webhook, if it has one."""
        if job.request.get("webhook") is not None:
            task = asyncio.create_task(webhook.notify(job))
            self._webhooks.add(task)
            task.add_done_callback(self._webhooks.discard)

    def _job(self, request: web.Request) -> Job:
        _authorize(request)
        job = self.queue.jobs.get(request.match_info["job"])
        if job is None:
            raise web.HTTPNotFound
        return job


async def _over(job: Job) -> None:
    while not job.is_over:
        await job.has_changed.wait()


def _failed(job: Job) -> web.Response:
    # A guess: no source shows what RunPod's gateway answers for a failed job.
    try:
        body = json.loads(job.error)
    except (TypeError, ValueError):
        body = {"error": {"message": str(job.error)}}
    return web.json_response(body, status=400)


async def _body(request: web.Request) -> dict[str, Any]:
    _authorize(request)
    body = await _json(request)
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body is not an object")
    return body


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise web.HTTPBadRequest(text=f"the body is not JSON: {error}") from None


def _authorize(request: web.Request) -> None:
    if request.headers.get("Authorization", "").removeprefix("Bearer ") != KEY:
        raise web.HTTPUnauthorized
