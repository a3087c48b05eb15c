"""The engine's thread: reads the mail, makes one step after the other, hands out what they give.

Ends every sequence exactly once, see `engine.py`. Where the runner looks ahead, a step is started
before the last one's tokens are handed out. Only its own thread calls it, but for what it counts.
"""

import copy
import logging
import time

from serve_app.engine.admission import EngineConfig
from serve_app.engine.flight import Flight, looking_ahead
from serve_app.engine.inbox import Inbox, Mail
from serve_app.engine.kv_cache import BlockAllocator
from serve_app.engine.outbox import Outbox, Stream
from serve_app.engine.pace import Pace
from serve_app.engine.penalties import has_penalty
from serve_app.engine.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import (
    FAILED,
    Chunk,
    Delta,
    FinishReason,
    Sequence,
    TokenLogprob,
)
from serve_app.errors import InternalError, ServeError, as_serve_error

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""In a row: then the device, not a request, is at fault."""


class Loop:
    """Steps of one runner, for the sequences that come through `inbox`."""

    def __init__(self, runner: Runner, config: EngineConfig, inbox: Inbox) -> None:
        self.blocks = BlockAllocator(config.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            self.blocks, config.max_num_seqs, config.max_num_batched_tokens, config.keeps_prefixes
        )
        self.generated_tokens = 0
        self.prompt_tokens = 0
        self.steps = 0
        self._runner = runner
        self._inbox = inbox
        self._pace = Pace(config.max_num_batched_tokens)
        self._outbox = Outbox()
        # The live sequences.
        self._streams: dict[Sequence, Stream] = {}
        self._ahead = looking_ahead(runner)
        self._flight: Flight | None = None
        # Live sequences whose next step needs to know their last token: it counts tokens here.
        self._num_host_bound = 0
        self._began = 0.0
        self._num_failed_steps = 0

    def run(self) -> None:
        """Until the inbox says stop, or the device fails; ends everyone who is left."""
        try:
            while self._num_failed_steps < MAX_FAILED_STEPS and self._turn():
                pass
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                log.critical("%d steps in a row failed: the engine ends", MAX_FAILED_STEPS)
                self._inbox.die()
        except BaseException:
            log.critical("the engine's loop failed", exc_info=True)
            self._inbox.die()
        finally:
            self._end_everyone()

    def _turn(self) -> bool:
        """Reads the mail and makes one step; False when told to stop."""
        mail = self._inbox.take(wait=not self.scheduler.has_work and self._flight is None)
        self._read(mail)
        if not mail.is_stopping:
            self._advance()
        self._flush()
        return not mail.is_stopping

    def _advance(self) -> None:
        """Starts a step, and lands the one before while it runs; both where nothing may overlap."""
        if not self._may_overlap():
            self._land()
        flight = None
        if self.scheduler.has_work and (
            chunks := self.scheduler.schedule(self._pace.prompt_tokens)
        ):
            flight = self._launch(chunks)
        self._land()
        self._flight = flight
        if not self._may_overlap():
            self._land()

    def _may_overlap(self) -> bool:
        """Whether a step may begin before the last one's tokens are known here."""
        return self._ahead is not None and not self._num_host_bound

    def _read(self, mail: Mail) -> None:
        for sequence, stream in mail.accepted:
            self._streams[sequence] = stream
            self.scheduler.add(sequence)
            self._num_host_bound += has_penalty(sequence.params)
            self.prompt_tokens += sequence.num_prompt
        for sequence in mail.aborted:
            # Its last delta may have been on the way when the consumer left.
            if sequence in self._streams:
                self._drop(sequence)

    def _launch(self, chunks: list[Chunk]) -> Flight | None:
        self.steps += 1
        self._began = max(self._began, time.perf_counter())
        try:
            return Flight.start(self._runner, self._ahead, chunks)
        except Exception as error:
            self._fail_step(chunks, error)
            return None

    def _land(self) -> None:
        """Waits for the step under way, if there is one, and hands its tokens out."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            samples = flight.outcome.samples()
        except Exception as error:
            self._fail_step(flight.chunks, error)
            return
        self._num_failed_steps = 0
        num_decodes = sum(chunk.is_decode for chunk in flight.chunks)
        num_tokens = sum(chunk.end - chunk.start for chunk in flight.chunks)
        # The next step, if it is started already, runs from now on.
        now = time.perf_counter()
        self._pace.learn(num_decodes, num_tokens - num_decodes, now - self._began)
        self._began = now
        sampled = [chunk for chunk in flight.chunks if chunk.samples]
        for row, (chunk, token) in enumerate(zip(sampled, samples.token_ids, strict=True)):
            # Others ended while the step ran: what it did for them is dropped.
            if chunk.sequence in self._streams:
                self._receive(chunk, token, samples.logprobs.get(row))

    def _fail_step(self, chunks: list[Chunk], error: Exception) -> None:
        log.error("a step of %d sequences failed", len(chunks), exc_info=error)
        self._num_failed_steps += 1
        for chunk in chunks:
            if chunk.sequence in self._streams:
                # A copy each: raising writes a traceback into the exception.
                self._fail(chunk.sequence, copy.copy(as_serve_error(error)))

    def _receive(self, chunk: Chunk, token: int, logprob: TokenLogprob | None) -> None:
        sequence, place = chunk.sequence, chunk.end
        if token == FAILED:
            log.error("the logits of a sequence were not finite")
            self._fail(sequence, InternalError("The model computed no finite numbers; try again."))
            return
        # Its logits are finite, so what they came from is too.
        self.scheduler.keep(sequence, place)
        if token in sequence.stop_ids:
            self._end(sequence, Delta([], [], "stop"))
            return
        sequence.token_ids[place] = token
        self.generated_tokens += 1
        reason: FinishReason | None = "length" if place + 1 >= sequence.most_tokens else None
        delta = Delta([token], [] if logprob is None else [logprob], reason)
        if reason is None:
            self._outbox.add(self._streams[sequence], delta)
        else:
            self._end(sequence, delta)

    def _fail(self, sequence: Sequence, error: ServeError) -> None:
        self._end(sequence, Delta([], [], "error", error))

    def _end(self, sequence: Sequence, last: Delta) -> None:
        self._outbox.add(self._streams[sequence], last)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Ends a sequence without a word, as when nobody listens any more."""
        self.scheduler.remove(sequence)
        del self._streams[sequence]
        self._num_host_bound -= has_penalty(sequence.params)
        self._inbox.ended()

    def _flush(self) -> None:
        """Delivers what is new; ends the sequences whose event loop is gone."""
        if closed := self._outbox.flush():
            for sequence, stream in list(self._streams.items()):
                if stream.loop in closed:
                    self._drop(sequence)

    def _end_everyone(self) -> None:
        self._read(self._inbox.take(wait=False))
        for stream in self._streams.values():
            self._outbox.add(stream, Delta([], [], "error", self._inbox.refused()))
        try:
            for sequence in list(self._streams):
                self._drop(sequence)
        finally:
            # Even when a fault of the scheduler is why this runs.
            self._outbox.flush()
