"""Which processes serve together: from the flags, from Kubernetes' variables, from a metadata server."""

from __future__ import annotations

import argparse
import http.server
import threading

import pytest
from jaxllama_serving.config import ServerConfigError
from jaxllama_serving.process.hosts import POD_PORT, Hosts, add_arguments, find_hosts


def find(*flags, environ=None, dev=None):
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_argument_group("many hosts"))
    return find_hosts(parser.parse_args(list(map(str, flags))), environ or {}, *([] if dev is None else [dev]))


def test_flags_name_the_processes(tmp_path):
    flags = ("--coordinator", "10.0.0.1:8492", "--num-processes", 4, "--process-id", 3)
    assert find(*flags, dev=tmp_path) == Hosts("10.0.0.1:8492", 4, 3)
    assert find(dev=tmp_path) is None


def test_one_process_never_looks_for_others():
    environ = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
    assert find("--num-processes", 1, environ=environ) is None
    assert find("--num-processes", 1, "--process-id", 0, environ=environ) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--coordinator", "a:1"), "missing: --num-processes, --process-id"),
        (("--num-processes", 2), "missing: --coordinator, --process-id"),
        (("--process-id", 0), "missing: --coordinator, --num-processes"),
        (("--num-processes", 0), "--num-processes must be at least 1, got 0"),
        (("--coordinator", "a:1", "--num-processes", 2, "--process-id", 2), "--process-id must be from 0 to 1, got 2"),
        (("--coordinator", "a:1", "--num-processes", 2, "--process-id", -1), "must be from 0 to 1, got -1"),
        (("--coordinator", "a:1", "--num-processes", 1, "--process-id", 1), "must be from 0 to 0, got 1"),
        (("--join-timeout", 0), "--join-timeout must be from 1 to 86400, got 0"),
        (("--heartbeat-timeout", "nan"), "--heartbeat-timeout must be from 1"),
        (("--coordinator", "a", "--num-processes", 2, "--process-id", 1), "must be HOST:PORT, with a port from 1"),
        (("--coordinator", "a:0", "--num-processes", 2, "--process-id", 1), "must be HOST:PORT, with a port from 1"),
    ],
)
def test_flags_that_contradict_each_other_are_named(flags, message, tmp_path):
    with pytest.raises(ServerConfigError, match=message):
        find(*flags, dev=tmp_path)


def test_kubernetes_names_the_hosts_of_a_slice(tmp_path):
    environ = {"TPU_WORKER_HOSTNAMES": "llama-0.svc,llama-1.svc", "TPU_WORKER_ID": "1"}
    assert find(environ=environ, dev=tmp_path) == Hosts(f"llama-0.svc:{POD_PORT}", 2, 1)
    assert find(environ=environ | {"TPU_WORKER_HOSTNAMES": "localhost"}, dev=tmp_path) is None
    assert find(environ=environ | {"JAX_PLATFORMS": "cpu"}, dev=tmp_path) is None
    for wrong in ("2", "x", ""):
        with pytest.raises(ServerConfigError, match="names 2 hosts, and this one is number"):
            find(environ=environ | {"TPU_WORKER_ID": wrong}, dev=tmp_path)
    with pytest.raises(ServerConfigError, match="several TPU slices"):
        find(environ=environ | {"MEGASCALE_NUM_SLICES": "2"}, dev=tmp_path)


@pytest.mark.parametrize("workers", ["10.0.0.5,10.0.0.6", "x:0:10.0.0.5,x:1:10.0.0.6"])
@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_a_tpu_vm_asks_the_metadata_server(workers, device, tmp_path):
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path.rpartition("/")[2], self.headers["Metadata-Flavor"]))
            values = {"worker-network-endpoints": workers, "agent-worker-number": "1\n"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(values[asked[-1][0]].encode())

        def log_message(self, *_):
            pass

    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}", "http_proxy": "http://127.0.0.1:9"}
            assert find(environ=environ, dev=tmp_path) == Hosts(f"10.0.0.5:{POD_PORT}", 2, 1)
            assert asked == [("worker-network-endpoints", "Google"), ("agent-worker-number", "Google")]
            # Without a chip nobody is asked.
            assert find(environ=environ, dev=tmp_path / "none") is None
            assert len(asked) == 2
        finally:
            server.shutdown()
            thread.join()


def test_a_machine_with_chips_and_no_metadata_server_is_alone(tmp_path):
    (tmp_path / "accel0").touch()
    assert find(environ={"GCE_METADATA_IP": "127.0.0.1:9"}, dev=tmp_path) is None
