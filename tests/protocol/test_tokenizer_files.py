"""Tokenizer files become what transformers makes of them, or are refused by the file's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import ModelLoadFailed
from serve_app.protocol import tokenizer_files
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.tiny import CHECKPOINT
from tests import mistral
from tools import mixtral_tokenizer

Json = dict[str, Any]
TEXTS = (
    "Hello",
    " x",
    "a</s>b",
    "<s>a",
    "é你🙂\n",
    "",
    "x <new> y",
    "x<old>  y",
    "a <named> b",
    "  ",
)
QUESTION = [{"role": "user", "content": " é 1\n"}]


def token(content: str, **flags: bool) -> Json:
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, **off, "special": True, **flags}


def edit(folder: Path, name: str, change: Callable[[Json], object]) -> None:
    file = folder / name
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "tokenizer_config.json", lambda it: it.update(values))


def change_json(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "tokenizer.json", lambda it: it.update(values))


def write(name: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


LEGACY_PIPELINE = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
}
"""The pipeline of Mixtral's first files, as transformers 4 wrote it."""

MUTATIONS: dict[str, list[Callable[[Path], object]]] = {
    "as it is": [],
    "first pipeline": [change_json(**LEGACY_PIPELINE)],
    "no tokens of its own": [change_json(added_tokens=[])],
    "no post-processor": [change_json(post_processor=None)],
    "truncation and padding": [
        change_json(
            truncation={
                "direction": "Right",
                "max_length": 2,
                "strategy": "LongestFirst",
                "stride": 0,
            },
            padding={
                "strategy": {"Fixed": 64},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<unk>",
            },
        )
    ],
    "another class": [change_config(tokenizer_class="PreTrainedTokenizerFast")],
    "no class": [change_config(tokenizer_class=None)],
    "no BOS in the configuration": [change_config(add_bos_token=False, add_eos_token=True)],
    "added tokens": [
        change_config(
            added_tokens_decoder={
                "769": token("<new>", lstrip=True, special=False, normalized=True),
                "768": token("<old>", rstrip=True),
                "2": token("</s>", lstrip=True),
            }
        )
    ],
    "other names": [change_config(pad_token="<new>", bos_token="</s>", extra_token="<named>")],
    "names with flags": [
        change_config(eos_token={"__type": "AddedToken", **token("<new>", lstrip=True)})
    ],
    "extra tokens": [
        change_config(additional_special_tokens=["<new>", "</s>"], extra_special_tokens=None)
    ],
    "named extra tokens": [change_config(extra_special_tokens={"image_token": "<new>"})],
    "files of transformers 4.30": [
        write("added_tokens.json", {"<new>": 769, "<old>": 768}),
        write("special_tokens_map.json", {"bos_token": token("<s>"), "pad_token": "<new>"}),
    ],
    "template in a file": [
        write("chat_template.jinja", b"{{ messages[0].content }}{{ eos_token }}")
    ],
    "named templates": [
        change_config(
            chat_template=[
                {"name": "tool_use", "template": "no"},
                {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
            ]
        )
    ],
    "no template": [change_config(chat_template=None)],
}


def mutated(folder: Path, name: str, source: Path = CHECKPOINT) -> Path:
    shutil.copytree(
        source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    for change in MUTATIONS[name]:
        change(folder)
    return folder


@pytest.fixture(scope="module")
def transformers_class() -> Any:
    """The class that transformers' AutoTokenizer takes for Mixtral."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    assert type(AutoTokenizer.from_pretrained(CHECKPOINT)) is PreTrainedTokenizerFast
    return PreTrainedTokenizerFast


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_files_become_what_transformers_makes_of_them(
    tmp_path: Path, transformers_class: Any, name: str
) -> None:
    """Ids, tokens, names of special tokens and rendered text are transformers' in every case."""
    reference = transformers_class.from_pretrained(mutated(tmp_path, name))
    files = tokenizer_files.read(tmp_path)
    assert files.special_tokens == reference.special_tokens_map
    ours = Tokenizer(tmp_path, sanitize_control_tokens=False)
    added = ours.backend.get_added_tokens_decoder()
    assert {index: repr(token) for index, token in added.items()} == {
        index: repr(token) for index, token in reference.added_tokens_decoder.items()
    }
    for text in TEXTS:
        for special in (True, False):
            ids = reference(text, add_special_tokens=special, padding=False, truncation=False)
            got = ours.backend.encode(text, add_special_tokens=special).ids
            assert got == ids["input_ids"], (text, special)
            assert ours.decode(got, skip_special_tokens=special) == reference.decode(
                got, skip_special_tokens=special
            )
    assert ours.has_chat_template == (reference.chat_template is not None)
    if ours.has_chat_template:
        expected = reference.apply_chat_template(QUESTION, return_dict=False)
        assert ours.render(QUESTION) == expected
        assert Tokenizer(tmp_path).render(QUESTION) == expected


@pytest.mark.parametrize("name", ["as it is", "first pipeline", "added tokens", "extra tokens"])
def test_mixtrals_files_too(
    tmp_path: Path, mixtral_folder: Path, transformers_class: Any, name: str
) -> None:
    """The same with Mixtral 8x7B's own 32,000 entries."""
    reference = transformers_class.from_pretrained(mutated(tmp_path, name, mixtral_folder))
    ours = Tokenizer(tmp_path)
    for text in (*TEXTS, "def f(x):\n    return x\n"):
        assert ours.backend.encode(text).ids == reference(text)["input_ids"]
    assert ours.render(QUESTION) == reference.apply_chat_template(QUESTION, return_dict=False)


@pytest.fixture(scope="module")
def from_model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Our tokenizer for a folder with tokenizer.model and no tokenizer.json."""
    return Tokenizer(mixtral_tokenizer.write_model(tmp_path_factory.mktemp("model")))


CODE = st.text(st.sampled_from(" \n\tabre=-{}1é🙂▁\u0301日"), max_size=40)


@given(CODE | st.text(max_size=20).filter(lambda text: not {"<", ">"} & set(text)))
def test_tokenizer_model_is_sentencepiece(from_model: Tokenizer, text: str) -> None:
    """Without tokenizer.json, raw text has BOS and SentencePiece's ids, and decodes alike."""
    ids = mistral.sentencepiece().encode(text)
    assert from_model.encode(text) == [1, *ids]
    assert from_model.encode(text, add_special_tokens=False) == ids
    assert from_model.decode(ids) == mistral.sentencepiece().decode(ids).replace(" ⁇ ", "")


def test_indented_code_keeps_the_ids_of_training(from_model: Tokenizer) -> None:
    """Four spaces and a word are the two pieces that SentencePiece makes of them."""
    ids = from_model.encode("def f(x):\n    return x\n")
    assert [from_model.token_string(index) for index in ids[-4:]] == [
        "▁▁▁",
        "▁return",
        "▁x",
        "<0x0A>",
    ]
    assert any("tokenizer.model" in note for note in from_model.notes)


def test_added_tokens_beside_tokenizer_model(tmp_path: Path) -> None:
    """A fine-tune's own tokens get their ids; an id that differs from the file's is an error."""
    mixtral_tokenizer.write_model(tmp_path)
    tokens = {"32000": token("<|im_end|>"), "32001": token("<|im_start|>")}
    change_config(added_tokens_decoder=tokens)(tmp_path)
    assert Tokenizer(tmp_path).encode("a<|im_start|>")[-1] == 32001
    change_config(added_tokens_decoder={"32002": token("<gap>")})(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"'<gap>' has the id 32002.*tokenizer\.json"):
        tokenizer_files.read(tmp_path)


def trained(file: Path, **options: Any) -> None:
    """Trains a small SentencePiece model into `file`."""
    sentences = [f"the number {index} is not {index * 7}" for index in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(file.with_suffix("")),
        vocab_size=340,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "normalization_rule_name": "identity"},  # drops double spaces
        {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    ],
)
def test_another_kind_of_tokenizer_model_is_refused(tmp_path: Path, options: Json) -> None:
    """A model that we would encode in another way than SentencePiece is not served."""
    trained(tmp_path / "tokenizer.model", **options)
    mixtral_tokenizer.write_config(tmp_path)
    with pytest.raises(
        ModelLoadFailed, match=r"tokenizer\.model: is not a BPE model.*tokenizer\.json"
    ):
        tokenizer_files.read(tmp_path)


def test_a_model_like_mixtrals_is_read(tmp_path: Path) -> None:
    """A small model trained with Mixtral's options is taken."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    trained(tmp_path / "tokenizer.model", model_type="bpe", **options)
    mixtral_tokenizer.write_config(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "  the  number 17 is é"
    assert Tokenizer(tmp_path).encode(text, add_special_tokens=False) == oracle.encode(text)


def test_user_defined_pieces_are_read(tmp_path: Path) -> None:
    """In a small model with the types of pieces of 8x22B's, control pieces are special tokens with
    their ids, and user-defined pieces are found in a text where SentencePiece finds them."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    defined = ["[DOC_10]", "[DOC_1]", "<doc>"]
    pieces = {"control_symbols": ["[INST]", "[/INST]"], "user_defined_symbols": defined}
    trained(tmp_path / "tokenizer.model", model_type="bpe", **options, **pieces)
    mixtral_tokenizer.write_config(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer(tmp_path)
    for text in ("the[DOC_1]number [DOC_10] is  [DOC_1][DOC_2]<doc>not", "the [DOC_ number", "is<"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == oracle.encode(text)
        assert ours.decode(ids) == text
    assert [ours.token_string(index) for index in (3, 4)] == ["[INST]", "[/INST]"]
    assert ours.encode("[/INST]", add_special_tokens=False) == [4]


def test_8x22bs_model_is_sentencepieces(tmp_path: Path) -> None:
    """The file of Mixtral 8x22B is read: its control tokens, and the ids of a text with its
    user-defined pieces."""
    folder = mixtral_tokenizer.write_model(tmp_path, mixtral_tokenizer.TOOLS)
    file = str(folder / "tokenizer.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=file)
    ours = Tokenizer(folder)
    text = "See [REFERENCE_DOC_12]\n    return[REFERENCE_DOC_1]é"
    assert ours.encode(text) == [1, *oracle.encode(text)]
    assert ours.encode("[TOOL_CALLS]", add_special_tokens=False) == [5]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json: the tokenizer cannot be read"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json: cannot be read"),
        ("tokenizer_config.json", [], r"tokenizer_config\.json: holds no JSON object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": 5}},
            "special tokens cannot be read",
        ),
        (
            "tokenizer_config.json",
            {"bos_token": 5, "eos_token": []},
            "special tokens cannot be read",
        ),
        ("special_tokens_map.json", b"nonsense", r"special_tokens_map\.json: cannot be read"),
        ("tokenizer_config.json", {"chat_template": 5}, "`chat_template` is no text"),
        ("tokenizer_config.json", {"chat_template": {"a": "b"}}, "named default"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: cannot be read"),
        ("tokenizer_config.json", {"chat_template": ["a", {"name": "b"}]}, "named default"),
        ("chat_template.jinja", b"{% if %}", r"chat_template\.jinja: its chat template is broken"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: Any, sentence: str) -> None:
    """One sentence with the file that must change."""
    write(name, content)(mutated(tmp_path, "as it is"))
    with pytest.raises(ModelLoadFailed, match=sentence):
        Tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """Neither file is there: the error says which one to bring."""
    (mutated(tmp_path, "as it is") / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadFailed, match=r"no tokenizer\.model; put the tokenizer\.json"):
        Tokenizer(tmp_path)
    write("tokenizer.model", b"nonsense")(tmp_path)
    with pytest.raises(ModelLoadFailed, match="is no SentencePiece model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("/no/such/file.jinja", "/no/such/file.jinja: cannot be read"),
        ("{% for", "model.custom_chat_template: its chat template is broken in line 1"),
        ("{{ 'always the same' }}", "leaves the user's question out"),
    ],
)
def test_a_custom_template_that_does_not_work_fails_the_load(given: str, told: str) -> None:
    """The load fails with the name of the file or of the setting."""
    with pytest.raises(ModelLoadFailed, match=told):
        Tokenizer(CHECKPOINT, custom_chat_template=given)
