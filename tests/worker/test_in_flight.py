"""Jobs in flight, without a platform."""

import asyncio

from serve_app.worker.in_flight import InFlightJobs


def test_two_stops_cancel_a_job_once() -> None:
    """A second stop leaves the job the time to release what it holds."""

    async def scenario() -> bool:
        jobs = InFlightJobs()
        (job,) = jobs.accept([{"id": "job-1", "input": {}}])
        begun, may_close = asyncio.Event(), asyncio.Event()
        is_closed = False

        async def work() -> None:
            nonlocal is_closed
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await may_close.wait()
                is_closed = True

        job.task = asyncio.create_task(work())
        await begun.wait()
        for _ in range(2):
            jobs.stop("job-1")
            await asyncio.sleep(0)
        may_close.set()
        await asyncio.wait({job.task})
        return is_closed

    assert asyncio.run(scenario())
