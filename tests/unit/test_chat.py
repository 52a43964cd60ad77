"""The place of the contexts in a rendered chat."""

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from sglang_ape.entry.chat import ContextMarker
from sglang_ape.errors import ApeRequestError

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
TEXT = """You are a helpful assistant. Answer from the documents.
What does the keeper of the lighthouse do each evening? The keeper trims the lamp.
assistant user system question answer"""
# ChatML; content is a string or a list of text parts
TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
HEAD = "<|im_start|>system\nAnswer shortly.<|im_end|>\n<|im_start|>user\n"
TAIL = "Who trims the lamp?<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [
    {"role": "system", "content": "Answer shortly."},
    {"role": "user", "content": "Who trims the lamp?"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def render(tokenizer: PreTrainedTokenizerFast, messages: list[Any]) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("content", ["Who trims the lamp?", "", " leading space", "\n\nlines"])
def test_the_cut_gives_the_tokens_of_both_sides_as_if_they_stood_alone(
    tokenizer: PreTrainedTokenizerFast, content: str
) -> None:
    tail = f"{content}<|im_end|>\n<|im_start|>assistant\n"
    expected = encode(tokenizer, HEAD), encode(tokenizer, tail)
    marker = ContextMarker(tokenizer)
    marked = marker.mark([MESSAGES[0], {"role": "user", "content": content}])
    assert marker.split(render(tokenizer, marked)) == expected


def test_later_turns_belong_to_the_query(tokenizer: PreTrainedTokenizerFast) -> None:
    later = [{"role": "assistant", "content": "The keeper."}, {"role": "user", "content": "When?"}]
    marker = ContextMarker(tokenizer)
    prefix, query = marker.split(render(tokenizer, marker.mark(MESSAGES + later)))
    assert prefix == encode(tokenizer, HEAD)
    assert tokenizer.decode(query).count("<|im_start|>") == 3
    assert marker.token_id not in prefix + query


def test_a_list_of_text_parts_is_marked_before_its_first_part(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    parts = [{"type": "text", "text": "Who trims "}, {"type": "text", "text": "the lamp?"}]
    marker = ContextMarker(tokenizer)
    marked = marker.mark([MESSAGES[0], {"role": "user", "content": parts}])
    prefix, query = marker.split(render(tokenizer, marked))
    assert (prefix, query) == (encode(tokenizer, HEAD), encode(tokenizer, TAIL))


def test_the_marker_adds_no_blank_where_parts_are_joined_by_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """For templates that take strings SGLang joins the parts' texts with a blank
    (``parser/jinja_template_utils.py: process_content_for_template_format``).
    """
    parts = [{"type": "text", "text": "Who trims"}, {"type": "text", "text": "the lamp?"}]
    marker = ContextMarker(tokenizer)
    marked = marker.mark([{"role": "user", "content": parts}])
    joined = " ".join(part["text"] for part in marked[0]["content"])
    assert joined == f"{marker.text}Who trims the lamp?"


def test_marking_makes_a_copy(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": parts, "name": "n"}, MESSAGES[1]]
    marked = ContextMarker(tokenizer).mark(messages)
    assert messages == [
        {"role": "user", "content": [{"type": "text", "text": "q"}], "name": "n"},
        MESSAGES[1],
    ]
    assert marked[0]["name"] == "n"
    assert marked[1] is MESSAGES[1]


def refusal(tokenizer: PreTrainedTokenizerFast, messages: Any) -> ApeRequestError:
    with pytest.raises(ApeRequestError) as caught:
        ContextMarker(tokenizer).mark(messages)
    assert caught.value.status_code == 400
    return caught.value


@pytest.mark.parametrize("messages", [[], [MESSAGES[0]], [{"role": "assistant", "content": "a"}]])
def test_a_chat_without_user_message_is_refused(
    tokenizer: PreTrainedTokenizerFast, messages: list[Any]
) -> None:
    assert refusal(tokenizer, messages).param == "messages"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ({"role": "user"}, "messages"),
        (["hello"], "messages[0]"),
        ([MESSAGES[0], None], "messages[1]"),
        ([MESSAGES[0], {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["text"]}], "messages[0].content"),
    ],
)
def test_a_malformed_message_is_named(
    tokenizer: PreTrainedTokenizerFast, messages: Any, param: str
) -> None:
    assert refusal(tokenizer, messages).param == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", None])
def test_parts_other_than_text_are_refused(
    tokenizer: PreTrainedTokenizerFast, kind: str | None
) -> None:
    parts = [{"type": "text", "text": "look"}, {"type": kind, "image_url": {"url": "data:"}}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]
    assert refusal(tokenizer, messages).param == "messages[1].content"


def test_an_image_in_a_later_message_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """The contract refuses images beside contexts wherever they stand."""
    parts = [{"type": "image_url", "image_url": {"url": "data:"}}]
    messages = [*MESSAGES, {"role": "user", "content": parts}]
    assert refusal(tokenizer, messages).param == "messages[2].content"


def test_a_template_that_drops_or_repeats_the_message_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    marker = ContextMarker(tokenizer)
    for ids in ([], [5, 6], [marker.token_id, 5, marker.token_id]):
        with pytest.raises(ApeRequestError) as caught:
            marker.split(ids)
        assert caught.value.param == "messages"


def test_a_plain_chat_is_tokenised_as_before_the_marker_came(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [TEXT, "<s><|im_end|> <|ape_contexts_", "  \n\t spaces é 日本", ""]
    before = [render(tokenizer, MESSAGES), *(tokenizer.encode(text) for text in texts)]
    specials = list(tokenizer.all_special_tokens)
    vocabulary = tokenizer.vocab_size
    ContextMarker(tokenizer)
    after = [render(tokenizer, MESSAGES), *(tokenizer.encode(text) for text in texts)]
    assert after == before
    assert tokenizer.vocab_size == vocabulary
    assert [tokenizer.convert_tokens_to_ids(token) for token in specials] == [
        tokenizer.get_vocab()[token] for token in specials
    ]


def test_no_two_servers_share_a_marker(tokenizer: PreTrainedTokenizerFast) -> None:
    assert ContextMarker(tokenizer).text != ContextMarker(tokenizer).text


def test_a_tokenizer_that_takes_no_marker_is_refused_at_start() -> None:
    class Stubborn:
        def add_tokens(self, tokens: list[Any]) -> int:
            return 0

        def convert_tokens_to_ids(self, token: str) -> int:
            return 3

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [3, 3]

    with pytest.raises(RuntimeError, match="marker"):
        ContextMarker(Stubborn())
