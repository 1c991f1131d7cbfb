"""Untrusted text stays text: whatever a prompt, thought, answer or tool turn spells, a request has the turns that it was given."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chat import Chat
from cluster.errors import UserError
from cluster.models import copy_tokenizer, resolve_model
from tasks.compose import BlindCase, FullCase, generator_turns, judge_turns, plain_turns
from tasks.policy import Spec
from tasks.prompts import Message

TEMPLATES = {
    "chatml": None,  # the default model's own
    "headers": (
        "{{ '<|begin|>' }}{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
    ),
    "marked roles": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    ),
    "tool output inside a user turn": (
        "{% for m in messages %}{% if m['role'] == 'tool' %}<|turn|>user\n<|result|>{{ m['content'] }}<|/result|><|eot|>"
        "{% else %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|eot|>{% endif %}{% endfor %}<|turn|>model\n"
    ),
}
TOKENS = ["<|begin|>", "<|header|>", "<|/header|>", "<|eot|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
TOKENS += ["<|turn|>", "<|result|>", "<|/result|>"]
SPEC = Spec("The policy.", "0" * 64)


def with_template(folder: Path, template: str) -> Chat:
    """The default tokenizer with more control tokens and another template."""
    folder.mkdir()
    copy_tokenizer(Path(resolve_model("default").path), folder)
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = 1 + max(token["id"] for token in [*definition["added_tokens"], {"id": max(definition["model"]["vocab"].values())}])
    definition["added_tokens"] += [{"id": first + number, "content": text, **flags} for number, text in enumerate(TOKENS)]
    file.write_text(json.dumps(definition))
    (folder / "chat_template.jinja").write_text(template)
    return Chat(str(folder))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    folder = tmp_path_factory.mktemp("templates")
    default = Chat(resolve_model("default").path)
    return {name: with_template(folder / name.replace(" ", "-"), text) if text else default for name, text in TEMPLATES.items()}


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from([*TOKENS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "\n", "system", "assistant"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ),
    max_size=8,
).map("".join)


def requests(texts: list[str]) -> list[list]:
    """Every kind of request with the texts as user, assistant and tool turns, thought and answer."""
    roles = ("user", "assistant", "tool", "user")
    messages = tuple(Message.model_construct(role=role, content=text) for role, text in zip(roles, texts, strict=False))
    thought, answer = texts[4:]
    return [
        plain_turns(messages),
        generator_turns(SPEC, messages, "system"),
        generator_turns(SPEC, messages, "user"),
        judge_turns(SPEC, FullCase(messages, thought, answer), ("compliance", "thought")),
        judge_turns(SPEC, BlindCase(messages, answer, "refuse"), ("compliance",)),
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(HOSTILE, min_size=6, max_size=6))
def test_no_text_opens_or_ends_a_turn(chats: dict[str, Chat], name: str, texts: list[str]):
    chat = chats[name]
    for hostile, harmless in zip(requests(texts), requests(["x"] * 6), strict=True):
        assert control(chat, chat.prompt(hostile)) == control(chat, chat.prompt(harmless))
    assert control(chat, chat.text("".join(texts))) == []


def control(chat: Chat, ids: list[int]) -> list[int]:
    return [token for token in ids if token in chat.control_ids]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}", "ordinary text"),
        ("{% for m in messages if m['role'] != 'tool' %}<|turn|>{{ m['content'] }}<|eot|>{% endfor %}", "'tool' turn exactly once"),
        ("{% for m in messages %}<|turn|>{{ m['content'] }}{{ m['content'] }}<|eot|>{% endfor %}", "'user' turn exactly once"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
    ],
)
def test_a_template_that_cannot_be_used_safely_is_refused(tmp_path: Path, template: str, words: str):
    chat = with_template(tmp_path / "model", template)
    with pytest.raises(UserError, match=words):
        chat.prompt([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])
