"""The text that `mixtral-serve quality` scores, as windows of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.config.serve_config import ConfigError
from serve_app.protocol.tokenizer import Tokenizer

PROSE = Path(__file__).parents[1] / "texts" / "prose.txt"
"""The text that is scored if the user names none; `texts/SOURCES` has its source."""
WINDOW = 2048
"""Number of tokens in a window. A model on disk is read once per window."""


@dataclass(frozen=True, slots=True)
class Windows:
    """A text cut into windows. In each one, all tokens after the first one are predicted."""

    windows: list[list[int]]

    @property
    def inputs(self) -> list[list[int]]:
        return [window[:-1] for window in self.windows]

    @property
    def targets(self) -> list[int]:
        """The predicted tokens of all windows."""
        return [token for window in self.windows for token in window[1:]]


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Returns the texts in files `paths`. Raises `ConfigError` for a file that cannot be read."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not UTF-8 text.") from None
    return texts


def cut(texts: Sequence[str], tokenizer: Tokenizer, max_model_len: int) -> Windows:
    """Cuts each text into windows, which begin with the BOS token if the tokenizer has one.

    Raises `ConfigError` if no token is left to predict.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = min(WINDOW, max_model_len) - len(bos)
    windows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        windows += [bos + ids[start : start + size] for start in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ConfigError("The text has too few tokens to score; use a longer one.")
    return Windows(windows)
