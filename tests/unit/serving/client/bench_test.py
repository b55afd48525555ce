"""The load generator against a real server around a fake model."""

from __future__ import annotations

import asyncio
import json
import random
from itertools import islice

import aiohttp
import pytest
from aiohttp import web
from jaxllama_serving.client.api import ClientError, Endpoint
from jaxllama_serving.client.load import Load, Outcome, run_load
from jaxllama_serving.client.report import METRICS, Report
from jaxllama_serving.client.workload import Lengths, Task, WorkloadError, random_tasks, tasks_of_file
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import run, serving, serving_in_thread

from jaxllama.__main__ import main


def test_an_address_without_a_path_gets_v1():
    assert Endpoint.parse("http://host:8000/", "k").url == "http://host:8000/v1"
    assert Endpoint.parse("https://host/v1/openai/", "k").url == "https://host/v1/openai"
    assert Endpoint.parse("http://host/v1/chat/completions", "k").url == "http://host/v1"
    for wrong in ("localhost:8000", "ftp://host", "http:///v1", ""):
        with pytest.raises(ClientError, match="is not the address of a server"):
            Endpoint.parse(wrong)


def test_the_command_prints_and_saves_what_the_server_did(tmp_path, capsys):
    with serving_in_thread(FakeLlama(["a", END_THINK, "b", "c"], starts_in_reasoning=True)) as url:
        command = [
            "bench",
            url,
            "--num-requests",
            "20",
            "--clients",
            "4",
            "--input-tokens",
            "8",
            "--output-tokens",
            "5",
        ]
        command += ["--goodput", "ttft:60000", "e2el:0.0001", "--json", str(tmp_path / "b.json")]
        assert main([*command, "--plot", str(tmp_path / "b.png")]) == 0
    values = json.loads((tmp_path / "b.json").read_text())
    assert values["completed"] == 20 == len(values["ttfts"]) == len(values["output_lens"])
    assert values["total_output_tokens"] == sum(values["output_lens"]) == 20 * 5  # a, the tag, b, c, the end
    assert values["total_input_tokens"] == sum(values["input_lens"]) > 0
    assert values["request_goodput"] == 0.0  # nobody ends within 100 ns
    assert set(values["generated_texts"]) == {"abc"}
    assert values["max_concurrent_requests"] <= 4
    for metric in METRICS:
        assert values[f"p50_{metric}_ms"] == values[f"median_{metric}_ms"] <= values[f"p99_{metric}_ms"]
    assert (tmp_path / "b.png").stat().st_size > 10_000
    assert "20 requests done, 0 failed" in capsys.readouterr().out


def test_requests_that_fail_are_counted_by_reason(capsys):
    with serving_in_thread(FakeLlama()) as url:
        assert main(["bench", url, "--num-requests", "3", "--model", "other"]) == 1
    out = capsys.readouterr().out
    assert "0 requests done, 3 failed" in out
    assert "failed 3 times: 404 Not Found: The model 'other' does not exist" in out


def test_a_rate_is_kept_whether_earlier_requests_have_ended_or_not():
    async def drive() -> list[Outcome]:
        async with serving(FakeLlama(first_delay_s=0.5)) as live:
            tasks = random_tasks(Lengths(4), Lengths(4), 0, seed=0)
            load = Load(num_requests=20, max_clients=None, rate=100.0)
            return await run_load(Endpoint.parse(live.url), "default", tasks, load, lambda _: None)

    outcomes = run(drive())
    starts = sorted(outcome.started for outcome in outcomes)
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert starts[-1] - starts[0] < 0.5 < min(outcome.ttft_s for outcome in outcomes)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b'data: {"choices": []}\n\n', r"the stream ended before \[DONE\]"),
        (b'data: {"error": {"message": "engine failed"}}\n\n', "engine failed"),
        (b"data: nonsense\n\n", "no JSON object"),
        (b"data: [1]\n\n", "no JSON object"),
    ],
)
def test_a_stream_that_goes_wrong_is_a_failed_request(sent, message):
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=sent, content_type="text/event-stream")

    async def drive() -> None:
        async with _application(answer) as url, aiohttp.ClientSession() as session:
            with pytest.raises(ClientError, match=message):
                async for _ in Endpoint.parse(url).chat(session, {}):
                    pass

    run(drive())


def test_events_are_read_however_they_are_cut():
    """Lines end in LF or CR LF, an event may have several data lines, comments and other fields are passed over."""
    text = ': hello\r\nevent: x\ndata: {"a":\ndata: "é\\n"}\n\n\n\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\ndata: late\n\n'
    stream = text.encode()
    cuts = sorted(random.Random(0).sample(range(1, len(stream)), 25))

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            await response.write(stream[start:end])
            await asyncio.sleep(0)
        return response

    async def drive() -> list[dict]:
        async with _application(answer) as url, aiohttp.ClientSession() as session:
            return [chunk async for chunk in Endpoint.parse(url).chat(session, {})]

    assert run(drive()) == [{"a": "é\n"}, {"b": 2}]


def test_prompts_have_their_lengths_and_share_only_what_they_should():
    tasks = list(islice(random_tasks(Lengths(50, 0.5), Lengths(10, 0.2), 20, seed=3), 200))
    words = [task.messages[0]["content"].split() for task in tasks]
    assert len({tuple(w[:20]) for w in words}) == 1
    assert len({tuple(w[:21]) for w in words}) > 190
    lengths = [len(w) - 21 for w in words]
    assert min(lengths) >= 25
    assert max(lengths) <= 75
    assert len(set(lengths)) > 30
    assert {task.max_tokens for task in tasks} == {8, 9, 10, 11, 12}
    assert tasks == list(islice(random_tasks(Lengths(50, 0.5), Lengths(10, 0.2), 20, seed=3), 200))


def test_a_file_of_prompts_is_taken_in_turn(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        'plain text\n\n{"prompt": "p", "max_tokens": 3}\n{"messages": [{"role": "system", "content": "s"}]}\n'
    )
    tasks = list(islice(tasks_of_file(path, Lengths(7), 0), 4))
    assert tasks[0] == Task(({"role": "user", "content": "plain text"},), 7) == tasks[3]
    assert tasks[1] == Task(({"role": "user", "content": "p"},), 3)
    assert tasks[2].messages == ({"role": "system", "content": "s"},)
    for text in ("", "\n \n", '{"prompt": 1', '{"other": 1}', '{"messages": []}', '{"prompt": "a", "max_tokens": 0}'):
        path.write_text(text)
        with pytest.raises(WorkloadError, match=r"prompts\.jsonl"):
            next(tasks_of_file(path, Lengths(1), 0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-requests", "0"], "--num-requests must be at least 1, got 0"),
        (["--rate", "nan"], "--rate must be a number above 0"),
        (["--spread", "2"], "--spread must be from 0 to 1, got 2"),
        (["--goodput", "speed:1"], "expected METRIC:MS"),
        (["--goodput", "ttft:-1"], "expected METRIC:MS"),
        (["--prompts", "/nowhere"], "/nowhere: cannot be read"),
    ],
)
def test_a_bad_flag_is_named_before_anything_is_sent(flags, message, capsys):
    assert main(["bench", "http://127.0.0.1:9", *flags]) == 2
    assert message in capsys.readouterr().err


def test_times_are_those_of_the_chunks():
    outcome = Outcome(started=1.0, ended=3.0, token_times=[1.5, 1.6, 2.0], num_output_tokens=6)
    report = Report([outcome], 2.0, Load(1, 1), "m", "u", {"ttft": 500.0, "itl": 260.0})
    assert outcome.itls_s == pytest.approx([0.1, 0.4])
    assert outcome.tpot_s == pytest.approx((2.0 - 0.5) / 5)
    assert report.num_good == 1  # the mean time between chunks, 250 ms, counts
    assert report.as_dict()["mean_itl_ms"] == pytest.approx(250)
    assert report.as_dict()["output_throughput"] == pytest.approx(3.0)


def _application(answer):
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def served():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    return served()
