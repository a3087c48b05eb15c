"""The checkpoint's tokenizer, read in a thread beside the weights.

Importing transformers takes most of a second, while those who read the weights and warm up the
engine wait for the disk and the device. Knows neither weights nor engine.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.errors import ModelLoadFailed
from serve_app.protocol.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class TokenizerReading:
    """Begins to read the tokenizer in the folder `path`."""

    def __init__(self, path: Path) -> None:
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._reading = thread.submit(_read, path)
        thread.shutdown(wait=False)

    def require_no_failure(self) -> None:
        """Raises what the reading has failed with by now, so that it ends that of the weights."""
        if self._reading.done():
            self._reading.result()

    def wait(self) -> Tokenizer:
        """The tokenizer, once it is read; raises `ModelLoadFailed` where it cannot be."""
        return self._reading.result()


def _read(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer(path)
        # The first encoding and rendering compile things; no request should wait for that.
        tokenizer.encode("Hello")
        if tokenizer.has_chat_template:
            tokenizer.render([{"role": "user", "content": "Hello"}])
    except Exception as error:  # tokenizers raises nothing more special
        log.debug("the tokenizer did not load", exc_info=True)
        raise ModelLoadFailed(
            f"{path}: the tokenizer cannot be read ({type(error).__name__}); the folder needs "
            "tokenizer.json and tokenizer_config.json with the model's chat template."
        ) from error
    return tokenizer
