"""What `/metrics` tells: every request counted once, by bounded labels, and no figure that is not known."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from jaxllama_serving import metrics
from jaxllama_serving.metrics import GAUGES, Metrics
from prometheus_client.parser import text_string_to_metric_families
from unit.serving.fakes import FakeLlama
from unit.serving.live import CHAT, body, run, serving, until

KEYS = ("sk-one",)


async def scrape(live, **headers):
    async with live.session.get(live.url + "/metrics", headers=headers) as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert response.status == 200
        return read(await response.text())


def read(text):
    """Sample name and labels to value; a label set is what stands in its braces, sorted."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_gauges_are_the_engine_s_load_and_need_a_key():
    async def test():
        llama = FakeLlama(first_delay_s=5.0)
        async with serving(None, api_keys=KEYS) as live:
            key = {"Authorization": "Bearer sk-one"}
            assert (await live.get("/metrics"))[0] == 401
            found = await scrape(live, **key)
            assert {name: found[name] for name in GAUGES if name in found} == {"jaxllama_ready": 0}
            live.service.set_llama(llama)
            asking = asyncio.create_task(live.post(json=body(n=3), headers=key))
            while len(llama.engine.rows) < 3:
                await asyncio.sleep(0.01)
            found = await scrape(live, **key)
            assert {name: found[name] for name in GAUGES if name in found} == {
                "jaxllama_ready": 1,
                "jaxllama_requests_waiting": 0,
                "jaxllama_requests_running": 3,
                "jaxllama_kv_pages_used": 3,
                "jaxllama_kv_pages": 64,
                "jaxllama_kv_pages_cached": 2,
                "jaxllama_cache_hit_ratio": 0,
                "jaxllama_compilations": 7,
                "jaxllama_device_hangs": 0,
                "jaxllama_kernel_fault": 0,
            }
            live.service.draining = True
            assert (await scrape(live, **key))["jaxllama_ready"] == 0
            asking.cancel()
        llama.close()

    run(test())


def requests_of(found):
    return {
        name.removeprefix("jaxllama_requests_total"): value
        for name, value in found.items()
        if name.startswith("jaxllama_requests_total") and "/metrics" not in name
    }


def test_every_request_is_counted_once_by_what_became_of_it():
    async def test():
        llama = FakeLlama(fail_after=3, failure=RuntimeError(), delay_s=0.01, first_delay_s=0.05)
        async with serving(llama) as live:
            assert (await live.post({"max_tokens": 2}))[0] == 200
            assert (await live.post({"temperature": 9}))[0] == 400
            assert (await live.post())[0] == 500
            assert "error" in (await live.events())[-1]
            for path in ("/nowhere", "/else%0a", "/v1/models/no/such"):
                assert (await live.get(path))[0] == 404
            llama.engine.first_delay_s = 5
            asking = asyncio.create_task(live.post())
            await until(lambda: len(llama.engine.rows) == 4)
            asking.cancel()
            await until(lambda: live.service.requests.num == 0)
            found = requests_of(await scrape(live))
            chat = "route=/v1/chat/completions"
            assert found == {
                f"{{outcome=finished,{chat},status=200}}": 1,
                f"{{outcome=refused,{chat},status=400}}": 1,
                f"{{outcome=failed,{chat},status=500}}": 1,
                f"{{outcome=failed,{chat},status=200}}": 1,
                f"{{outcome=gone,{chat},status=gone}}": 1,
                "{outcome=refused,route=unmatched,status=404}": 2,
                "{outcome=refused,route=/v1/models/{id},status=404}": 1,
            }

    run(test())


def test_tokens_and_times_are_those_of_the_choices():
    async def test():
        llama = FakeLlama(["a", "b", "c"], first_delay_s=0.1, delay_s=0.03)
        async with serving(llama) as live:
            _, answer, _ = await live.post({"n": 2})
            assert (await live.post({"max_tokens": 0}))[0] == 200
            async with live.session.post(live.url + CHAT, json=body(stream=True, max_tokens=1)) as response:
                await response.text()
            found = await scrape(live)
            usage = answer["usage"]
            assert found["jaxllama_tokens_total{kind=prompt}"] == 3 * usage["prompt_tokens"]
            assert found["jaxllama_tokens_total{kind=completion}"] == usage["completion_tokens"] + 1 == 9
            # A choice without a token has no first one, and one token takes no time after the first.
            assert found["jaxllama_time_to_first_token_seconds_count"] == 3
            assert found["jaxllama_time_per_output_token_seconds_count"] == 2
            assert found["jaxllama_queue_wait_seconds_count"] == 4
            assert 0.3 <= found["jaxllama_time_to_first_token_seconds_sum"] < 30
            assert 0.05 <= found["jaxllama_time_per_output_token_seconds_sum"] < 10

    run(test())


@pytest.mark.parametrize(("given", "share"), [(None, None), (100.0, 0.4)])
def test_the_roofline_is_told_only_where_the_bandwidth_is_known(given, share):
    async def test():
        llama = FakeLlama()
        async with serving(llama, peak_bandwidth=given) as live:
            assert "jaxllama_decode_roofline_ratio" not in await scrape(live)
            for _ in range(3):
                drafts = {"num_drafted": 30, "num_accepted": 20}
                llama.engine.on_steps(SimpleNamespace(num_steps=8, num_rows=5, seconds=0.2, **drafts))
            found = await scrape(live)
            # Eight steps of 1 GB in 0.2 s are 40 GB/s.
            assert found.get("jaxllama_decode_roofline_ratio") == pytest.approx(share) if share else True
            assert ("jaxllama_decode_roofline_ratio" in found) == (share is not None)
            assert (found["jaxllama_batch_rows_count"], found["jaxllama_batch_rows_sum"]) == (3, 15)
            assert found["jaxllama_row_steps_total"] == 3 * 8 * 5
            assert found["jaxllama_speculation_tokens_total{kind=drafted}"] == 90
            assert found["jaxllama_speculation_tokens_total{kind=accepted}"] == 60

    run(test())


def test_the_roofline_forgets_what_is_older_than_its_window(monkeypatch):
    monkeypatch.setattr(metrics, "ROOFLINE_WINDOW_S", 0.1)
    counted = Metrics(dict)
    assert counted.read_rate() is None
    counted.count_steps(1, 1.0, 10.0)
    time.sleep(0.06)
    counted.count_steps(1, 1.0, 30.0)
    assert counted.read_rate() == 20.0
    time.sleep(0.06)
    assert counted.read_rate() == 30.0
    time.sleep(0.1)
    assert counted.read_rate() is None
