"""One instruction with its response as tokens: the prompt is read, only the response is learned.

A record holds `messages` (role and content, as chat templates take them), or `prompt` and `response`. With a chat
template the text is what the template writes; without one, prompt and response follow each other on lines of their own.
`prompt` and `completion` are what TRL takes them for: strings that follow each other as they are, with nothing between
and no template, or two parts of a conversation, of which only the second has responses to learn.
Which characters belong to a response is known before the text is tokenised: no token boundary has to be guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..finetune.losses import IGNORED


@dataclass(frozen=True)
class Example:
    """Tokens and their labels, -100 where nothing is learned."""

    ids: list[int]
    labels: list[int]


def is_instruction(record: object) -> bool:
    """Whether a record has a response that is to be told apart from its prompt. A `text` field wins, as everywhere."""
    if not isinstance(record, Mapping) or "text" in record:
        return False
    return "messages" in record or ("prompt" in record and ("response" in record or "completion" in record))


def example_of(record: Mapping[str, Any], where: str, tokenizer: Any) -> Example:
    """Tokens of a record, labels on the responses alone. DataError for messages that are none, or no response."""
    if _joined(record):
        prompt, completion = (_text(record[name], where, name) for name in ("prompt", "completion"))
        if not completion.strip():
            raise DataError(f"{where} has no response to learn from", hint="its completion is empty")
        span = (len(prompt), len(prompt) + len(completion))
        return _ended(_tokens(prompt + completion, [span], where, tokenizer, special=True), tokenizer)
    messages, first = _messages(record, where)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages[first:]):
        raise DataError(f"{where} has no response to learn from", hint='a message of the role "assistant" is one')
    if getattr(tokenizer, "chat_template", None):
        text, spans = _templated(messages, first, where, tokenizer)
        return _tokens(text, spans, where, tokenizer, special=False)
    text, spans = _plain(messages, first)
    example = _tokens(text, spans, where, tokenizer, special=True)
    return _ended(example, tokenizer) if messages[-1]["role"] == "assistant" else example


def _ended(example: Example, tokenizer: Any) -> Example:
    """With the end-of-text token, which is learned, where the tokenizer has one."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None or example.ids[-1:] == [eos]:
        return example
    return Example([*example.ids, eos], [*example.labels, eos])


def _joined(record: Mapping[str, Any]) -> bool:
    """Whether a record is a prompt and its completion as strings."""
    return not {"messages", "response"} & record.keys() and isinstance(record["completion"], str)


def _messages(record: Mapping[str, Any], where: str) -> tuple[list[dict[str, str]], int]:
    """All messages, and the first one from which on responses are learned."""
    if "messages" in record:
        return _conversation(record, "messages", where), 0
    if "response" in record:
        pairs = (("user", record["prompt"]), ("assistant", record["response"]))
        return [{"role": role, "content": _text(content, where, role)} for role, content in pairs], 0
    prompt = _conversation(record, "prompt", where)
    return [*prompt, *_conversation(record, "completion", where)], len(prompt)


def _conversation(record: Mapping[str, Any], name: str, where: str) -> list[dict[str, str]]:
    messages = record[name]
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise DataError(f"{where}: field {name!r} holds no list of messages")
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: an entry of {name!r} has no `role`", hint="each has a role and a content")
        found.append({"role": message["role"], "content": _text(message.get("content"), where, message["role"])})
    return found


def _text(content: Any, where: str, role: str) -> str:
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of {role} is {type(content).__name__}, not text")
    return content


def _plain(messages: list[dict[str, str]], first: int) -> tuple[str, list[tuple[int, int]]]:
    """Contents on lines of their own, and where the responses stand."""
    text = ""
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        text += "\n" if text else ""
        if message["role"] == "assistant" and index >= first:
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    return text, spans


def _templated(
    messages: list[dict[str, str]], first: int, where: str, tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The template's text; a response is what it adds to the text of the messages before and its opening."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < first:
                continue
            before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            if not text.startswith(before) or not text.startswith(after):
                start = text.find(message["content"], spans[-1][1] if spans else 0)  # a template that looks ahead
                before, after = text[:start], text[: start + len(message["content"])]
                if start < 0:
                    raise DataError(f"{where}: the chat template does not write the response as it is")
            spans.append((len(before), len(after)))
    except DataError:
        raise
    except Exception as error:  # jinja's own errors, and whatever a template raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where} does not fit the tokenizer's chat template: {reason}") from error
    return text, spans


def _tokens(text: str, spans: list[tuple[int, int]], where: str, tokenizer: Any, *, special: bool) -> Example:
    """Labels on tokens that begin inside a span. DataError for a tokenizer that does not say where tokens begin."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{where}: telling prompt and response apart needs a fast tokenizer",
            hint="save the tokenizer as tokenizer.json, or give records with a `text` field",
        )
    found = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    ids = list(found["input_ids"])
    labels = [
        token if any(start <= begin < stop for start, stop in spans) and begin < end else IGNORED
        for token, (begin, end) in zip(ids, found["offset_mapping"], strict=True)
    ]
    return Example(ids, labels)
