"""Reads `tokenizer.model`, a SentencePiece model, for a checkpoint without `tokenizer.json`.

The result gives the ids that SentencePiece gives, which are those that the model was trained with.
Every file is compared with SentencePiece itself when it is read. transformers 5.23 converts the
same file with another order of merges, and "    return" gets other ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import ModelLoadFailed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REMEDY = "put the tokenizer.json of the model that it was fine-tuned from into the folder"

_UNCHANGED = "a  ①ﬁ Ａ\u0301\t  x  "
"""Text that the usual normalizations of Unicode and of spaces change."""
_PIECES_PER_PROBE = 500


def read(file: Path) -> "Tokenizer":
    """Returns the tokenizer in `file`, without a post-processor.

    Raises `ModelLoadFailed` for a file that is no SentencePiece model, and for a kind of model that
    `tokenizers` would encode in another way.
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
    """Returns the tokenizer of a SentencePiece model, which is not compared with it.

    User-defined pieces, which Mixtral 8x22B's model has (`[REFERENCE_DOC_0]`), become added tokens
    that are no special ones. A text that begins with one lacks SentencePiece's space before it, as
    it does with the tokenizer.json of 8x22B.
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
    # No space comes behind a user-defined piece.
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
    """Returns the pieces that SentencePiece takes out of a text unchanged, before any merge.

    Its Python interface does not have the type of a piece. No merge makes these, and yet they are
    pieces of a text that consists of one.
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
    """Returns all pairs of pieces that make up a piece, best first.

    SentencePiece merges the pair whose result has the highest score. Where one piece can be made of
    several pairs, the pair with the longest left part comes first.
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
    """Texts that show how `model` normalizes, and that contain all its pieces."""
    yield _UNCHANGED
    pieces = [
        model.id_to_piece(index).replace("▁", " ")
        for index in range(model.vocab_size())
        if not (model.is_control(index) or model.is_unknown(index) or model.is_byte(index))
    ]
    for start in range(0, len(pieces), _PIECES_PER_PROBE):
        yield "a" + "".join(pieces[start : start + _PIECES_PER_PROBE])
