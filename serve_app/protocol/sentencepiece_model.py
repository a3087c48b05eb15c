"""Reads `tokenizer.model`, a SentencePiece model, for a checkpoint without `tokenizer.json`.

The resulting tokenizer returns the same ids as SentencePiece, with which the model was trained.
`read` compares the two for each file. transformers 5.23 converts the file with another order of
merges, so that " return" gets other ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import ModelLoadFailed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REMEDY = "put the tokenizer.json of the model that it was fine-tuned from into the folder"

_UNCHANGED = "a  ①ﬁ Ａ\u0301\t  x  "
"""A text that the usual normalizations of Unicode and of spaces would change."""
_PIECES_PER_PROBE = 500


def read(file: Path) -> "Tokenizer":
    """Returns the tokenizer in `file`, without a post-processor.

    Raises `ModelLoadFailed` if the file is not a SentencePiece model, or if the resulting tokenizer
    gives other ids.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ModelLoadFailed(f"{file}: is no SentencePiece model; {REMEDY}.") from error
    tokenizer = converted(model)
    if any(tokenizer.encode(text).ids != model.encode(text) for text in _probes(model)):
        raise ModelLoadFailed(f"{file}: is not a BPE model of the kind that Mixtral has; {REMEDY}.")
    return tokenizer


def converted(model: Any) -> "Tokenizer":
    """Returns the tokenizer of a SentencePiece model, without comparing the two.

    User-defined pieces, which Mixtral 8x22B's model has (`[REFERENCE_DOC_0]`), become added tokens
    that are not special tokens. A text that begins with one has no SentencePiece space before it,
    as with the tokenizer.json of 8x22B.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces: list[str] = [model.id_to_piece(index) for index in range(model.vocab_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    special = [
        piece for piece, index in ids.items() if model.is_control(index) or model.is_unknown(index)
    ]
    merges = _merges(model, ids, frozenset(special))
    bpe = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    defined = _user_defined(model, merges, frozenset(special))
    # No space follows a user-defined piece.
    scheme = "first" if defined else "always"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in defined])
    return tokenizer


def _user_defined(model: Any, merges: list[tuple[str, str]], special: frozenset[str]) -> list[str]:
    """Returns the pieces that SentencePiece keeps unchanged, before any merge.

    Its Python interface does not have the type of a piece. These are the pieces that no merge
    makes, although they encode to a single piece.
    """
    made = {left + right for left, right in merges}
    pieces = map(model.id_to_piece, range(model.vocab_size()))
    return [
        piece
        for index, piece in enumerate(pieces)
        if len(piece) > 1
        and piece not in made
        and piece not in special
        and not model.is_byte(index)
        and index in model.encode(piece)
    ]


def _merges(model: Any, ids: dict[str, int], special: frozenset[str]) -> list[tuple[str, str]]:
    """Returns all merges: pairs of pieces that form a piece, best first.

    SentencePiece merges the pair whose result has the highest score. If several pairs form one
    piece, the pair with the longest left part comes first.
    """
    merges = []
    for piece, index in ids.items():
        if piece in special or model.is_byte(index):
            continue
        score = model.get_score(index)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((score, cut, left, right))
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    return [(left, right) for _, _, left, right in merges]


def _probes(model: Any) -> Iterator[str]:
    """Yields texts that show the normalization of `model`, and that contain all its pieces."""
    yield _UNCHANGED
    pieces = [
        model.id_to_piece(index).replace("▁", " ")
        for index in range(model.vocab_size())
        if not (model.is_control(index) or model.is_unknown(index) or model.is_byte(index))
    ]
    for start in range(0, len(pieces), _PIECES_PER_PROBE):
        yield "a" + "".join(pieces[start : start + _PIECES_PER_PROBE])
