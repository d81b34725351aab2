"""Two and three hosts with links of 100 Mbit/s: the same text as one process writes.

Through the real ``torchrun --nnodes`` and through ``torch_q4metal.cluster``.
"""

import json
import socket
import subprocess
import sys
import time

import pytest
import tiny
from namespaces import call, network

PROMPT = "What a fine day it is. " * 30  # several packets of residual rows
QUESTION = ["--prompt", PROMPT, "--json", "--no-stats", "-n", "12", "--temp", "0"]
LAYERS = 6
CASES = [
    pytest.param("torchrun", 2, 0.001, False, id="torchrun, two hosts, 1 ms"),
    pytest.param("torchrun", 3, 0.020, True, id="torchrun, three hosts, 20 ms, streamed"),
    pytest.param("cluster", 2, 0.020, True, id="cluster, two hosts, 20 ms, streamed"),
    pytest.param("cluster", 3, 0.001, False, id="cluster, three hosts, 1 ms"),
]
CONNECT = """
import socket, sys, time
begin = time.perf_counter()
socket.create_connection((sys.argv[1], 4000), 10)
print(time.perf_counter() - begin)
"""
SINK = """
import socket, time
listener = socket.create_server(("0.0.0.0", 4000))
print("ready", flush=True)
listener.accept()
stream, _ = listener.accept()
stream.recv(1)
begin, count = time.perf_counter(), 0
while data := stream.recv(1 << 16):
    count += len(data)
print(count / (time.perf_counter() - begin))
"""
SOURCE = """
import socket, sys
with socket.create_connection((sys.argv[1], 4000), 10) as stream:
    stream.sendall(bytes(4 << 20))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_tiny(
        tmp_path_factory.mktemp("model") / "m", "qwen2", tied=False, layers=LAYERS, hidden_size=256,
        intermediate_size=512, config={"max_position_embeddings": 2048},
    ).path  # fmt: skip


@pytest.fixture(scope="module")
def expected(model):
    done = subprocess.run(
        [sys.executable, "-m", "torch_q4metal.chat", "--model", model, *QUESTION],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)["text"]


def command(start, hosts, host, key, app="chat"):
    """What is typed on one host, up to the app's options."""
    first = hosts[0].address
    if start == "torchrun":
        return [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", len(hosts), "--node-rank",
            host.number, "--nproc-per-node", 1, "--master-addr", first, "--master-port", 29400,
            "-m", f"torch_q4metal.{app}",
        ]  # fmt: skip
    return [
        sys.executable, "-m", "torch_q4metal.cluster", "run", "--rank", host.number,
        "--world-size", len(hosts), "--connect", f"{first}:29400", "--key", key,
        "--interface", "eth0", "--", app,
    ]  # fmt: skip


def keygen(folder):
    words = [sys.executable, "-m", "torch_q4metal.cluster", "keygen", folder / "cluster.key"]
    subprocess.run(words, check=True, capture_output=True)
    return words[-1]


@pytest.mark.parametrize(("start", "count", "delay", "streamed"), CASES)
def test_hosts_write_what_one_process_writes(
    tmp_path, model, expected, start, count, delay, streamed, record_property
):
    key = keygen(tmp_path)
    split = ",".join([str(LAYERS // count)] * count)  # else a busy machine gives a host one layer
    with network(tmp_path, count, delay) as hosts:
        begin = time.monotonic()
        processes = []
        for host in hosts:
            path = host.folder / "no files" if streamed and host.number else model
            words = [*command(start, hosts, host, key), "--model", path, *QUESTION]
            words += ["--split", split]
            words += ["--stream-weights"] if streamed else []
            processes.append(host.start(*words))
        outputs = [process.communicate(timeout=120) for process in processes]
        record_property("seconds", time.monotonic() - begin)
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors
        assert json.loads(outputs[0][0].splitlines()[-1])["text"] == expected
        if streamed:
            for host in hosts[1:]:
                pieces = list((host.folder / "cache/streamed").glob("[0-9a-f]" * 64))
                assert len(pieces) >= LAYERS // count


@pytest.mark.parametrize("start", ["torchrun", "cluster"])
def test_the_doctor_measures_the_links(tmp_path, start, record_property):
    """Near what they are: 20 ms each way and 100 Mbit/s, which Python relays."""
    key = keygen(tmp_path)
    words = ["--cluster", "--json"]
    words += ["--interface", "eth0"] if start == "torchrun" else []
    with network(tmp_path, 2, 0.020) as hosts:
        processes = [
            host.start(*command(start, hosts, host, key, "doctor"), *words, GLOO_SOCKET_IFNAME="")
            for host in hosts
        ]
        outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    assert outputs[1][0] == ""
    links = json.loads(outputs[0][0])["links"]
    record_property("links", links)
    for link in links:
        assert 0.040 <= link["round_trip_s"] < 0.2
        assert 10e6 < 8 * link["bytes_s"] < 110e6


def test_a_name_that_means_loopback_is_told_with_its_cure(tmp_path):
    """This machine's name is no address of the namespaces. Both ranks say so, and gloo never."""
    with network(tmp_path, 2, 0.001) as hosts:
        processes = [
            host.start(*command("torchrun", hosts, host, None), *QUESTION, GLOO_SOCKET_IFNAME="")
            for host in hosts
        ]
        outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 1
        for host in hosts:
            assert f"error: rank 0 on {socket.gethostname()} would be reached at 127." in errors
            assert f"start it with --interface eth0 ({host.address})" in errors


def test_a_firewall_is_told_with_its_cure(tmp_path):
    """One that drops everything: packets to host 0 arrive, and nothing comes back."""
    key = keygen(tmp_path)
    with network(tmp_path, 2, 0.001) as hosts:
        call("ip", "-n", hosts[0].name, "route", "add", "blackhole", hosts[1].address)
        words = command("cluster", hosts, hosts[1], key)
        words[words.index("--") :] = ["--join-timeout", 6, "--", "chat", "-p", "x"]
        joining = hosts[1].start(*words)
        looking = hosts[1].start(
            sys.executable, "-m", "torch_q4metal.doctor", "--cluster", "--connect",
            f"{hosts[0].address}:29400",
        )  # fmt: skip
        outputs = [process.communicate(timeout=120) for process in (joining, looking)]
    assert (joining.returncode, looking.returncode) == (1, 1)
    for _, errors in outputs:
        assert f"{hosts[0].address}:29400 does not answer: it is off" in errors
        assert "firewall drops what comes in; let TCP from this machine through" in errors
    assert f"the way there  {hosts[1].address} eth0" in outputs[1][0]


@pytest.mark.parametrize("delay", [0.001, 0.020])
def test_the_network_is_as_slow_as_it_says(tmp_path, delay):
    with network(tmp_path, 2, delay) as hosts:
        sink = hosts[1].start(sys.executable, "-c", SINK)
        assert sink.stdout.readline() == "ready\n"
        connect = hosts[0].start(sys.executable, "-c", CONNECT, hosts[1].address)
        seconds = float(connect.communicate(timeout=60)[0])
        source = hosts[0].start(sys.executable, "-c", SOURCE, hosts[1].address)
        assert source.wait(60) == 0
        rate = float(sink.communicate(timeout=60)[0])
    assert 2 * delay <= seconds < 2 * delay + 2
    assert rate * 8 < 110e6
