"""LiveSequences: the accepted sequences that have not ended, with their streams.

A sequence ends in one of four ways:

- `receive` gets its last token: the answer is complete, or the token is `FAILED`.
- `fail` ends all sequences of a failed step with its error.
- `drop` removes a sequence whose consumer is gone, without a delta.
- `end_all` ends the remaining sequences when the engine's loop ends.

Each method frees the KV blocks and the place in the request queue.
"""

import contextlib
import copy
import logging
from collections.abc import Callable

from serve_app.engine.delta import Delta, FinishReason, PromptLogprobs, TokenLogprob
from serve_app.engine.output_queue import OutputQueue
from serve_app.engine.request_queue import RequestQueue
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import FAILED, Sequence
from serve_app.engine.stream import Stream
from serve_app.errors import InternalError, InvalidRequest, ServeError, as_serve_error

log = logging.getLogger(__name__)


class LiveSequences:
    """The sequences in the scheduler. Only the engine's thread calls methods, except `abandon`."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: RequestQueue,
        outputs: OutputQueue,
        clear_blocks: Callable[[list[int]], None],
    ) -> None:
        """`clear_blocks`: see `Runner`."""
        self.num_generation_tokens = 0
        """Number of tokens that all sequences have received."""
        self._scheduler = scheduler
        self._requests = requests
        self._outputs = outputs
        self._clear_blocks = clear_blocks
        self._streams: dict[Sequence, Stream] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._streams

    def add(self, accepted: list[tuple[Sequence, Stream]]) -> None:
        """Adds new sequences to the scheduler."""
        # Added here first: if the scheduler fails, `end_all` ends every accepted sequence.
        self._streams.update(accepted)
        for sequence, _ in accepted:
            self._scheduler.add(sequence)

    def receive(
        self, sequence: Sequence, position: int, token_id: int, logprob: TokenLogprob | None
    ) -> None:
        """Appends one sampled token to its sequence and its stream, and ends a complete sequence.

        `position` is the token's index in `token_ids`.
        """
        if token_id == FAILED and _is_complete(sequence):
            self._end(sequence, Delta([], [], "stop"))
            return
        if token_id == FAILED:
            self._end(sequence, Delta([], [], "error", self._failure(sequence)))
            return
        # The logits are finite, so the keys and values before them are finite too.
        sequence.num_finite_tokens = position
        self._scheduler.cache_blocks(sequence, position)
        if not sequence.params.max_tokens:
            self._end(sequence, Delta([], [], "length"))
            return
        if token_id in sequence.stop_ids:
            # A client that scores a prompt with its answer expects one score per sampled token.
            is_scored = sequence.params.prompt_logprobs is not None
            scores = [logprob] if is_scored and logprob is not None else []
            self._end(sequence, Delta([], scores, "stop"))
            return
        sequence.token_ids[position] = token_id
        self.num_generation_tokens += 1
        reason: FinishReason | None = None
        if sequence.constraint is not None:
            sequence.constraint.accept(token_id)
            reason = "stop" if sequence.constraint.is_complete else None
        if reason is None and position + 1 >= sequence.max_num_tokens:
            reason = "length"
        delta = Delta([token_id], [] if logprob is None else [logprob], reason)
        if reason is not None:
            self._end(sequence, delta)
        else:
            self._outputs.add(self._streams[sequence], delta)

    def receive_scores(self, sequence: Sequence, scores: PromptLogprobs) -> None:
        """Adds log probabilities of prompt tokens to the sequence's stream."""
        if sequence in self._streams:
            self._outputs.add(self._streams[sequence], Delta([], [], prompt_logprobs=[scores]))

    def _failure(self, sequence: Sequence) -> ServeError:
        """Returns the error of a sequence whose sampled token is `FAILED`."""
        if sequence.constraint is not None and sequence.constraint.has_failed:
            return InvalidRequest(
                "The grammar became too complex for this server, or allows no valid end of this "
                "answer; send a simpler one."
            )
        log.error("The logits of a sequence were not finite; its request fails.")
        self._clear_blocks(sequence.block_table[sequence.num_cached_blocks :])
        return InternalError("The model's logits were not finite; send the request again.")

    def fail(self, scheduled: list[ScheduledTokens], error: Exception) -> None:
        """Ends each sequence of a failed step with the error."""
        log.error("A step with %d sequences failed.", len(scheduled), exc_info=error)
        for part in scheduled:
            if part.sequence in self._streams:
                sequence = part.sequence
                # The step may have written some keys and values of the sequence, finite or not.
                sequence.num_computed_tokens = max(sequence.num_computed_tokens, part.end)
                # One copy per sequence, because raising an exception writes a traceback into it.
                own_error = copy.copy(as_serve_error(error))
                self._end(sequence, Delta([], [], "error", own_error))

    def _end(self, sequence: Sequence, last: Delta) -> None:
        """Ends a sequence with its last delta."""
        self._outputs.add(self._streams[sequence], last)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its KV blocks, without sending a delta."""
        self._scheduler.remove(sequence)
        del self._streams[sequence]
        self._requests.finish_one(sequence)

    def deliver(self, *, is_pausing: bool = False) -> None:
        """Sends new deltas, and drops the sequences of closed event loops.

        `is_pausing` also sends the deltas that would otherwise wait; see `OutputQueue.flush`.
        """
        if closed := self._outputs.flush(is_pausing=is_pausing):
            for sequence, stream in list(self._streams.items()):
                if stream.loop in closed:
                    self.drop(sequence)

    def end_all(self) -> None:
        """Ends all sequences, and those in the request queue, with the queue's refusal."""
        for sequence, stream in self._requests.take(wait=False).accepted:
            self._outputs.add(stream, self._refusal())
            self._requests.finish_one(sequence)
        for stream in self._streams.values():
            self._outputs.add(stream, self._refusal())
        try:
            for sequence in list(self._streams):
                self.drop(sequence)
        except Exception:
            log.critical("The scheduler failed; its sequences keep their blocks.", exc_info=True)
        finally:
            # The consumers get their errors even if the scheduler has failed.
            self._outputs.flush()

    def _refusal(self) -> Delta:
        return Delta([], [], "error", self._requests.refusal())

    def abandon(self) -> None:
        """Ends the streams of all sequences with `EngineDead`. Another thread calls this.

        The engine's thread hangs in a step and cannot end them. The sequences keep their blocks.
        """
        self._requests.fail()
        waiting = self._requests.take(wait=False).accepted
        for stream in (*self._streams.values(), *(stream for _, stream in waiting)):
            # The consumer's event loop may be closed.
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.put, self._refusal())


def _is_complete(sequence: Sequence) -> bool:
    """Returns whether the grammar allows only the end of the answer.

    The sampled token is then `FAILED` if `min_tokens` forbids the end, because all logits are -inf.
    The grammar has precedence, so the answer ends. Example: the regular expression "".
    """
    constraint = sequence.constraint
    return constraint is not None and constraint.allows_only(sequence.stop_ids)
