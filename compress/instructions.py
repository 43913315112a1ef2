"""One instruction with its response as tokens: the prompt is read, only the response is learned.

A record holds `messages` (role and content, as chat templates take them) or `prompt` and `response`. With a chat
template the text is what the template writes; without one, prompt and response follow each other on lines of their own.
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
    return "messages" in record or ("prompt" in record and "response" in record)


def example_of(record: Mapping[str, Any], where: str, tokenizer: Any) -> Example:
    """Tokens of a record, labels on the responses alone. DataError for messages that are none, or no response."""
    messages = _messages(record, where)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(f"{where} has no response to learn from", hint='a message of the role "assistant" is one')
    if getattr(tokenizer, "chat_template", None):
        text, spans = _templated(messages, where, tokenizer)
        return _tokens(text, spans, where, tokenizer, special=False)
    text, spans = _plain(messages)
    example = _tokens(text, spans, where, tokenizer, special=True)
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None and messages[-1]["role"] == "assistant" and example.ids[-1:] != [eos]:
        example = Example([*example.ids, eos], [*example.labels, eos])
    return example


def _messages(record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    if "messages" not in record:
        pairs = (("user", record["prompt"]), ("assistant", record["response"]))
        return [{"role": role, "content": _text(content, where, role)} for role, content in pairs]
    messages = record["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise DataError(f"{where}: field 'messages' holds no list of messages")
    found = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: an entry of 'messages' has no `role`", hint="each has a role and a content")
        found.append({"role": message["role"], "content": _text(message.get("content"), where, message["role"])})
    return found


def _text(content: Any, where: str, role: str) -> str:
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of {role} is {type(content).__name__}, not text")
    return content


def _plain(messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Contents on lines of their own, and where the responses stand."""
    text = ""
    spans: list[tuple[int, int]] = []
    for message in messages:
        text += "\n" if text else ""
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    return text, spans


def _templated(messages: list[dict[str, str]], where: str, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The template's text; a response is what it adds to the text of the messages before and its opening."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
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
