"""The routes for workers: polls for jobs and stops, posts of chunks and results, pings."""

import json
import os
from typing import Any

import psutil
from aiohttp import web

from emulator.faults import IS_UNACKNOWLEDGED, JOB
from emulator.queue import Job, Queue

KEY = "worker-key"
"""The API key of workers, sent in `Authorization` without `Bearer`."""
MAX_CHUNK_BYTES = 1_000_000
MAX_RESULT_BYTES = 10_000_000
MAX_SYNC_RESULT_BYTES = 20_000_000
"""The limit for jobs sent to `/runsync`."""


class WorkerApi:
    """Serves the URLs of `RUNPOD_WEBHOOK_*`."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v2/{endpoint}/job-take/{pod}", self.take),
            web.get("/v2/{endpoint}/job-take-batch/{pod}", self.take_batch),
            web.get("/v2/{endpoint}/job-stop/{pod}", self.stop),
            web.post("/v2/{endpoint}/job-done/{pod}/{job}", self.done),
            web.post("/v2/{endpoint}/job-stream/{pod}/{job}", self.stream),
            web.get("/v2/{endpoint}/ping/{pod}", self.ping),
        ]

    async def take(self, request: web.Request) -> web.Response:
        _authorize(request)
        jobs = await self.queue.take(1, _pod(request))
        return web.json_response(_as_json(jobs[0])) if jobs else web.Response(status=204)

    async def take_batch(self, request: web.Request) -> web.Response:
        _authorize(request)
        jobs = await self.queue.take(int(request.query["batch_size"]), _pod(request))
        if not jobs:
            return web.Response(status=204)
        return web.json_response([_as_json(job) for job in jobs])

    async def stop(self, request: web.Request) -> web.Response:
        _authorize(request)
        stops = await self.queue.stops()
        return web.json_response({"jobsToStop": stops}) if stops else web.Response(status=204)

    async def done(self, request: web.Request) -> web.Response:
        _authorize(request)
        is_sync = request.match_info["job"].startswith("sync-")
        limit = MAX_SYNC_RESULT_BYTES if is_sync else MAX_RESULT_BYTES
        job, body = await self._posted(request, limit)
        if job.is_over:
            job.num_late_posts += 1
        elif body.get("status") == "IN_PROGRESS":
            job.output = body["output"]
            job.progress.append(body["output"])
            job.changed()
        if body.get("status") == "IN_PROGRESS":
            return web.json_response({})
        if request.get(IS_UNACKNOWLEDGED):
            request[JOB] = job
        else:
            job.num_results += 1
        if not job.is_over:
            # This replaces the progress that was the output until now. That a failed job keeps the
            # output posted with its error is a guess.
            job.output, job.error = body.get("output"), body.get("error")
            job.end("COMPLETED" if job.error is None else "FAILED")
        return web.json_response({})

    async def stream(self, request: web.Request) -> web.Response:
        _authorize(request)
        job, body = await self._posted(request, MAX_CHUNK_BYTES)
        if job.is_over:
            job.num_late_posts += 1
        else:
            job.chunks.append(body["output"])
            job.changed()
        return web.json_response({})

    async def ping(self, request: web.Request) -> web.Response:
        self.queue.pings.append(dict(request.query))
        self.queue.seen(_pod(request))
        return web.json_response({})

    async def _posted(self, request: web.Request, limit: int) -> tuple[Job, dict[str, Any]]:
        # The raw body, because the SDK posts JSON with a form's content type. The job is that of
        # the URL: the SDK's X-Request-ID can be another job's.
        raw = await request.read()
        if len(raw) > limit:
            raise web.HTTPBadRequest(text=f"over {limit} bytes")
        if "isStream" not in request.query:
            raise web.HTTPBadRequest(text="no isStream")
        try:
            body = json.loads(raw, parse_constant=_not_json)
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        job = self.queue.jobs.get(request.match_info["job"])
        if job is None:
            raise web.HTTPNotFound  # deleted when its time to live had passed
        return job, body


def _pod(request: web.Request) -> str:
    return request.match_info["pod"]


def _as_json(job: Job) -> dict[str, Any]:
    return {**job.request, "id": job.id}


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _authorize(request: web.Request) -> None:
    if request.headers.get("Authorization") != KEY:
        raise web.HTTPUnauthorized


def environment(url: str, pod: str = "pod1", endpoint: str = "ep") -> dict[str, str]:
    """Returns the environment that RunPod sets in a worker's container, for an emulator at
    `url`."""
    base = f"{url}/v2/{endpoint}"
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
        "RUNPOD_ENDPOINT_ID": endpoint,
        "RUNPOD_POD_ID": pod,
        "RUNPOD_POD_HOSTNAME": f"{pod}-0000",
        "RUNPOD_DC_ID": "LOOPBACK",
        "RUNPOD_CPU_COUNT": str(os.cpu_count()),
        "RUNPOD_MEM_GB": str(psutil.virtual_memory().total // 2**30),
        "RUNPOD_GPU_COUNT": "0",
        "RUNPOD_AI_API_KEY": KEY,
        "RUNPOD_PING_INTERVAL": "1000",
    }
