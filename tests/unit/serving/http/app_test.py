"""Routes, envelopes, keys and headers, over a real connection."""

from __future__ import annotations

import json
import logging

import pytest
from jaxllama_serving.http.chat_page import FILES
from jaxllama_serving.service import SERVICE
from unit.serving.fakes import FakeLlama
from unit.serving.live import CHAT, body, run, serving

KEYS = ("sk-one", "sk-zwei-ü")


def is_envelope(answer):
    return set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}


def json_post(payload: bytes, path: str = CHAT, extra: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
    return head.encode() + extra + b"\r\n" + payload


def test_both_prefixes_give_the_same_answer():
    async def test():
        async with serving(FakeLlama()) as live:
            contents = []
            for path in ("/v1/chat/completions", "/v1/openai/chat/completions"):
                status, answer, _ = await live.post(path=path)
                assert status == 200
                contents.append(answer["choices"])
            assert contents[0] == contents[1]

    run(test())


def test_models_answer_to_every_name_slashes_included():
    async def test():
        async with serving(FakeLlama()) as live:
            for prefix in ("/v1", "/v1/openai"):
                status, answer, _ = await live.get(prefix + "/models")
                assert (status, [m["id"] for m in answer["data"]]) == (200, ["default", "org/model"])
                for path in ("org/model", "org%2Fmodel", "default"):
                    status, answer, _ = await live.get(f"{prefix}/models/{path}")
                    assert (status, answer["object"], answer["max_model_len"]) == (200, "model", 4096)
                status, answer, _ = await live.get(prefix + "/models/other")
                assert (status, answer["error"]["code"]) == (404, "model_not_found")

    run(test())


# (method, path, status, type, code)
NO_ROUTE = [
    ("GET", "/nowhere", 404, "not_found", "not_found"),
    ("GET", "/v1/", 404, "not_found", "not_found"),
    ("POST", "/v1/embeddings", 404, "not_found", "not_found"),
    ("POST", "/completions", 404, "not_found", "not_found"),
    ("GET", "/tokenize", 405, "invalid_request_error", "method_not_allowed"),
    ("GET", "/../chat.js", 404, "not_found", "not_found"),
    ("GET", CHAT, 405, "invalid_request_error", "method_not_allowed"),
    ("DELETE", "/v1/models", 405, "invalid_request_error", "method_not_allowed"),
    ("OPTIONS", CHAT, 405, "invalid_request_error", "method_not_allowed"),
    ("PATCH", "/health", 405, "invalid_request_error", "method_not_allowed"),
]


def test_what_has_no_route_gets_the_envelope():
    async def test():
        async with serving(FakeLlama()) as live:
            for method, path, *expected in NO_ROUTE:
                status, headers, answer = await live.raw(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert is_envelope(answer)
                assert [status, answer["error"]["type"], answer["error"]["code"]] == expected, path
                assert ("allow" in headers) == (status == 405)
                assert headers["x-request-id"]

    run(test())


# what is sent, status, type, param, code
BAD_REQUESTS = {
    "bad JSON": (json_post(b"{"), 400, "invalid_request_error", None, "invalid_json"),
    "empty body": (json_post(b""), 400, "invalid_request_error", None, "invalid_json"),
    "out of range": (
        json_post(json.dumps(body(temperature=3)).encode()),
        400,
        "invalid_request_error",
        "temperature",
        None,
    ),
    "an echo": (
        json_post(json.dumps(body(echo=True)).encode()),
        400,
        "invalid_request_error",
        "echo",
        "unsupported_parameter",
    ),
    "not yet": (
        json_post(json.dumps(body(chat_template="x")).encode()),
        400,
        "invalid_request_error",
        "chat_template",
        "unsupported_parameter",
    ),
    "unknown model": (
        json_post(json.dumps(body(model="gpt-4")).encode()),
        404,
        "invalid_request_error",
        "model",
        "model_not_found",
    ),
    "stop id beyond the vocabulary": (
        json_post(json.dumps(body(stop_token_ids=[1000])).encode()),
        400,
        "invalid_request_error",
        "stop_token_ids",
        None,
    ),
    "bias beyond the vocabulary": (
        json_post(json.dumps(body(logit_bias={"1000": 1})).encode()),
        400,
        "invalid_request_error",
        "logit_bias",
        None,
    ),
    "more choices than --max-n": (json_post(json.dumps(body(n=9)).encode()), 400, "invalid_request_error", "n", None),
    "template refuses": (
        json_post(json.dumps(body(messages=[{"role": "user", "content": "refuse me"}])).encode()),
        400,
        "invalid_request_error",
        "messages",
        None,
    ),
    "prompt beyond the context": (
        json_post(json.dumps(body(messages=[{"role": "user", "content": "x" * 5000}])).encode()),
        400,
        "invalid_request_error",
        "messages",
        "context_length_exceeded",
    ),
    "a form": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: 2\r\n\r\n{}",
        415,
        "invalid_request_error",
        None,
        "unsupported_media_type",
    ),
    "no media type": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        415,
        "invalid_request_error",
        None,
        "unsupported_media_type",
    ),
    "another charset": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json; charset=utf-16\r\n"
        b"Content-Length: 2\r\n\r\n{}",
        415,
        "invalid_request_error",
        None,
        "unsupported_media_type",
    ),
    "compressed": (
        json_post(b"{}", extra=b"Content-Encoding: gzip\r\n"),
        415,
        "invalid_request_error",
        None,
        "unsupported_media_type",
    ),
    "declared too large": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999\r\n\r\n",
        413,
        "invalid_request_error",
        None,
        "body_too_large",
    ),
    "too large in chunks": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + (b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 8,
        413,
        "invalid_request_error",
        None,
        "body_too_large",
    ),
    "70,000 chunks": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 70_000,
        413,
        "invalid_request_error",
        None,
        "body_too_large",
    ),
    "a bad chunk": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        400,
        "invalid_request_error",
        None,
        "bad_http_request",
    ),
    "a bad request line": (b"NONSENSE\r\n\r\n", 400, "invalid_request_error", None, "bad_http_request"),
    "TLS": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        400,
        "invalid_request_error",
        None,
        "bad_http_request",
    ),
    "a bad version": (b"GET / HTTP/9.9.9\r\n\r\n", 400, "invalid_request_error", None, "bad_http_request"),
    "a bad header": (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "invalid_request_error", None, "bad_http_request"),
    "a huge header": (
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        400,
        "invalid_request_error",
        None,
        "bad_http_request",
    ),
    "a huge path": (
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        400,
        "invalid_request_error",
        None,
        "bad_http_request",
    ),
    "200 headers": (
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(200)) + b"\r\n",
        400,
        "invalid_request_error",
        None,
        "bad_http_request",
    ),
    "two lengths": (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        400,
        "invalid_request_error",
        None,
        "bad_http_request",
    ),
    "a bad Expect": (
        json_post(b"{}", extra=b"Expect: miracles\r\n"),
        417,
        "invalid_request_error",
        None,
        "expectation_failed",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_gets_its_row_of_the_table(name):
    data, *expected = BAD_REQUESTS[name]

    async def test():
        llama = FakeLlama()
        async with serving(llama, max_body_bytes=200_000, max_n=8) as live:
            status, headers, answer = await live.raw(data)
            assert is_envelope(answer)
            error = answer["error"]
            assert [status, error["type"], error["param"], error["code"]] == expected
            assert headers["x-request-id"]
            assert headers["content-type"].startswith("application/json")
            assert "Traceback" not in error["message"]
            assert not llama.engine.rows
            assert (await live.post())[0] == 200

    run(test())


def test_the_request_id_comes_in_or_is_made():
    async def test():
        async with serving(FakeLlama()) as live:
            for given, kept in (("my-id_1.x", True), ("bad id", False), ("x" * 129, False), ("<script>", False)):
                for path in ("/health", "/nowhere"):
                    _, _, headers = await live.get(path, headers={"X-Request-Id": given})
                    assert (headers["X-Request-Id"] == given) == kept
                    assert kept or headers["X-Request-Id"].startswith("req_")
            async with live.session.post(
                live.url + CHAT, json=body(stream=True), headers={"X-Request-Id": "abc"}
            ) as response:
                assert response.headers["X-Request-Id"] == "abc"

    run(test())


def test_every_route_but_the_open_ones_needs_a_key():
    async def test():
        app_routes = set()
        async with serving(FakeLlama(), api_keys=KEYS) as live:
            for resource in live.app.router.resources():
                app_routes.add(resource.canonical)
                path = resource.canonical.replace("{id}", "default")
                async with live.session.get(live.url + path) as response:
                    is_open = path in ("/health", "/ready", "/") or path.endswith((".js", ".css"))
                    assert (response.status == 200) == is_open, path
                    if not is_open:
                        assert response.status == 401
                        assert response.headers["WWW-Authenticate"] == "Bearer"
                        assert is_envelope(await response.json())
            assert {"/health", "/v1/models", "/v1/openai/chat/completions"} <= app_routes

    run(test())


def test_keys_open_the_api_and_nothing_else_does():
    async def test():
        async with serving(FakeLlama(), api_keys=KEYS) as live:
            for key in KEYS:
                for scheme in ("Bearer", "bearer", "BEARER"):
                    status, _, _ = await live.post(json=body(), headers={"Authorization": f"{scheme} {key}"})
                    assert status == 200
            wrong = [
                "Bearer",
                "Bearer ",
                "Bearer sk-on",
                "Bearer sk-onee",
                "Basic sk-one",
                "sk-one",
                "Bearer sk-one,x",
                "Bearer ü",
            ]
            for value in wrong:
                status, answer, _ = await live.post(json=body(), headers={"Authorization": value})
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                assert "sk-one" not in answer["error"]["message"]

    run(test())


BYPASSES = [
    b"//v1/models",
    b"/v1//models",
    b"/%761/models",
    b"/v1/%6dodels",
    b"/health/../v1/models",
    b"/health/%2e%2e/v1/models",
    b"/health;/v1/models",
    b"/health?x=/v1/models&",
    b"/V1/models",
    b"http://x/v1/models",
    b"/chat.js/../v1/models",
    b"/v1/models#/health",
    b"/v1/health",
]


def test_no_spelling_of_a_path_goes_past_the_keys():
    async def test():
        async with serving(FakeLlama(), api_keys=KEYS) as live:
            for path in BYPASSES:
                status, _, answer = await live.raw(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                assert status in (400, 401, 404) or answer == {"status": "ok"}, path
                assert "data" not in answer
                if b"?x=" not in path:
                    assert is_envelope(answer)
            bytes_key = b"Authorization: Bearer \xff\xfe\r\n"
            status, _, answer = await live.raw(json_post(b"{}", extra=bytes_key))
            assert status in (400, 401)
            assert is_envelope(answer)

    run(test())


def test_health_and_readiness_differ_while_loading_draining_and_ill():
    async def test():
        async with serving(None) as live:
            assert (await live.get("/health"))[0] == 200
            status, answer, headers = await live.get("/ready")
            assert (status, answer["error"]["type"], headers["Retry-After"]) == (503, "service_unavailable", "2")
            assert (await live.post())[0] == 503
            llama = FakeLlama()
            live.app[SERVICE].set_llama(llama)
            assert (await live.get("/ready"))[0] == 200
            assert (await live.post())[0] == 200
            llama.engine.unhealthy = "no step has finished for 20 s"
            for path in ("/health", "/ready"):
                status, answer, _ = await live.get(path)
                assert status == 503
                assert "20 s" in answer["error"]["message"]
            llama.engine.unhealthy = None
            live.service.draining = True
            assert (await live.get("/health"))[0] == 200
            assert (await live.get("/ready"))[0] == 503
            status, answer, headers = await live.post()
            assert (status, "Retry-After" in headers) == (503, True)
            llama.close()

    run(test())


def test_cors_is_off_unless_an_origin_is_listed():
    asked = "authorization, content-type,x-stainless-os"
    preflight = {
        "Origin": "https://ok.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }

    async def test():
        async with serving(FakeLlama()) as live:
            _, _, headers = await live.get("/health", headers={"Origin": "https://ok.example"})
            assert not [name for name in headers if name.startswith("Access-Control")]
        async with serving(FakeLlama(), cors_origins=("https://ok.example",), api_keys=KEYS) as live:
            async with live.session.options(live.url + CHAT, headers=preflight) as response:
                assert response.status == 204
                assert response.headers["Access-Control-Allow-Origin"] == "https://ok.example"
                assert "Access-Control-Allow-Credentials" not in response.headers
                assert response.headers["Access-Control-Allow-Headers"] == asked
            other = {**preflight, "Origin": "https://evil.example"}
            async with live.session.options(live.url + CHAT, headers=other) as response:
                assert response.status == 401
                assert "Access-Control-Allow-Origin" not in response.headers
                assert response.headers["Vary"] == "Origin, Access-Control-Request-Headers"
            key = {"Authorization": "Bearer sk-one", "Origin": "https://ok.example"}
            async with live.session.post(live.url + CHAT, json=body(stream=True), headers=key) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "https://ok.example"

    run(test())


def test_the_page_is_served_whole_under_a_strict_policy():
    async def test():
        async with serving(FakeLlama()) as live:
            async with live.session.get(live.url + "/") as response:
                html = await response.text()
                policy = response.headers["Content-Security-Policy"]
                etag = response.headers["ETag"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "://" not in html.replace("http://www.w3.org/2000/svg", "")
            assert "onclick" not in html
            assert "<style" not in html
            for name in (path.lstrip("/") for path in FILES if path != "/"):
                async with live.session.get(f"{live.url}/{name}") as response:
                    text = await response.text()
                    assert response.status == 200
                    assert response.headers["X-Content-Type-Options"] == "nosniff"
                    assert "innerHTML" not in text
                    assert "@import" not in text
            async with live.session.get(live.url + "/", headers={"If-None-Match": etag}) as response:
                assert response.status == 304

    run(test())


def test_logs_hold_neither_prompts_nor_keys_nor_control_characters(caplog):
    caplog.set_level(logging.DEBUG)

    async def test():
        failing = FakeLlama(fail_after=1, failure=RuntimeError("SECRET-IN-ERROR"))
        async with serving(failing, api_keys=KEYS) as live:
            key = {"Authorization": "Bearer sk-one"}
            await live.post(json=body(messages=[{"role": "user", "content": "SECRET-PROMPT"}]), headers=key)
            await live.post(json=body(SECRET_FIELD=1), headers=key)
            await live.raw(b"GET /SECRET-PATH%0a%1b[31m HTTP/1.1\r\nHost: x\r\n\r\n")
            await live.raw(b"SECRET\x1bMETHOD / HTTP/1.1\r\n\r\n")

    run(test())
    text = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith(("jaxllama", "aiohttp"))
    )
    assert "SECRET" not in text
    assert "sk-one" not in text
    assert "\x1b" not in text
    assert "/v1/chat/completions 500" in text
    assert "RuntimeError" in text
