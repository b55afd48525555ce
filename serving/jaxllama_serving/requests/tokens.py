"""`POST …/tokenize` and `POST …/detokenize`: text or messages to ids, and back; `GET …/tokenizer_info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.context import CONTEXT
from jaxllama_serving.http.events import to_json
from jaxllama_serving.http.limits import read_json_body
from jaxllama_serving.protocol.base import parse, unknown_fields
from jaxllama_serving.protocol.chat import ChatRequest
from jaxllama_serving.protocol.strict_json import decode
from jaxllama_serving.protocol.tokens import OF_CHATS, DetokenizeRequest, TokenizeRequest
from jaxllama_serving.requests.chat_prompt import render_request
from jaxllama_serving.requests.logprobs import token_text
from jaxllama_serving.requests.prepare import check_ids, check_model
from jaxllama_serving.service import SERVICE

if TYPE_CHECKING:
    from jaxllama import Llama


async def tokenize(request: web.Request) -> web.Response:
    """The ids of a text, as the completions route would encode it, or of messages, as the chat route would."""
    return await _respond(request, _tokenize)


async def detokenize(request: web.Request) -> web.Response:
    """The text of ids."""
    return await _respond(request, _detokenize)


async def tokenizer_info(request: web.Request) -> web.Response:
    """The names and ids of the tokens that begin and end texts, for clients without the tokenizer's files.

    Without the chat template: a client would render it to text, in which special tokens are ordinary text here.
    """
    llama = request.app[SERVICE].ready_llama()
    tokenizer = llama.tokenizer
    assert tokenizer is not None  # the server does not start without one
    names = tokenizer.named_tokens
    info = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: names.get(name) for name in ("bos_token", "eos_token", "pad_token")},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": llama.max_context,
    }
    return web.Response(body=to_json(info), content_type="application/json")


async def _respond(
    request: web.Request, work: Callable[[Llama, ServerConfig, bytes], tuple[dict[str, Any], tuple[str, ...]]]
) -> web.Response:
    service = request.app[SERVICE]
    llama = service.ready_llama()
    with service.requests.counted():
        body = await read_json_body(request, service.config)
        answer, ignored = await service.in_worker(work, llama, service.config, body)
    request[CONTEXT].ignore(ignored)
    return web.Response(body=to_json(answer), content_type="application/json")


def _tokenize(llama: Llama, config: ServerConfig, body: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
    data = decode(body)
    request = parse(TokenizeRequest, data, strict_fields=config.strict_fields)
    ignored = unknown_fields(request)
    if request.model is not None:
        check_model(request.model, config)
    assert llama.tokenizer is not None  # the server does not start without one
    if request.messages is not None:
        # Checked as a chat's once more, for what is said of several fields together.
        chat = {"model": config.model_names[0], **{name: data[name] for name in OF_CHATS if name in data}}
        found = render_request(llama, config, parse(ChatRequest, chat))
        ids, ignored = found.prompt_ids, ignored + found.ignored
    else:
        text = request.prompt or ""
        ids = llama.tokenizer.encode(text, add_bos=None if request.add_special_tokens else False)
        if not request.add_special_tokens and text in llama.tokenizer.special_tokens:
            # Within a text a spelling is no token; alone it asks for the id of a name of `/tokenizer_info`.
            ids = [llama.tokenizer.special_tokens[text]]
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": llama.max_context, "tokens": ids}
    if request.return_token_strs:
        answer["token_strs"] = [token_text(llama.tokenizer.token_bytes(token_id)) for token_id in ids]
    return answer, ignored


def _detokenize(llama: Llama, config: ServerConfig, body: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
    request = parse(DetokenizeRequest, decode(body), strict_fields=config.strict_fields)
    if request.model is not None:
        check_model(request.model, config)
    assert llama.tokenizer is not None  # the server does not start without one
    check_ids(request.tokens, llama, "tokens")
    text = llama.tokenizer.decode(request.tokens, skip_special=request.skip_special_tokens)
    return {"prompt": text, "count": len(request.tokens)}, unknown_fields(request)
