"""The policy server with a policy of the test's own: sessions, batches, and clients that misbehave."""

import socket
import threading
import time
import urllib.error
import urllib.request

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from spacedrive_jax.cli.drive import Drive
from spacedrive_jax.cli.serve import Serve
from spacedrive_jax.driving import server as server_module
from spacedrive_jax.driving.client import PolicyClient, PolicyError, pack, unpack
from spacedrive_jax.driving.drive import open_folder
from spacedrive_jax.driving.server import PolicyServer, ServerConfig
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from tests.driving.served import Straight, client_of, observation, serving


@pytest.fixture(scope="module")
def server():
    with serving(Straight()) as running:
        yield running


def raw(server, **options):
    return connect(server.url, compression=None, max_size=None, proxy=None, **options)


def packed_array(dtype, shape):
    fields = {b"__ndarray__": True, b"data": b"12345678", b"dtype": dtype, b"shape": shape}
    return msgpack.packb({"a": fields})


def test_a_session(server):
    client = client_of(server)
    assert client.connect()["model"] == "straight"
    client.reset("RouteScenario_1")
    first, second = client.act(observation(1)), client.act(observation(2))
    np.testing.assert_array_equal(first["waypoints"][:, 0], [0.5, 1, 1.5, 2, 2.5, 3])
    assert (first["text"], first["status"], first["path"].shape) == ("1", "ok", (0, 2))
    timing = second["server_timing"]
    assert timing["infer_ms"] == pytest.approx(timing["prepare_ms"] + timing["model_ms"])
    assert {"queue_ms", "prev_total_ms"} <= timing.keys()
    assert "prev_total_ms" in first["server_timing"]  # of the reset
    client.close()


def test_health():
    policy = Straight(slow=1.0)
    serving_ = PolicyServer(policy, ServerConfig(port=0))
    ready = threading.Event()
    thread = threading.Thread(target=serving_.run, args=(lambda _: ready.set(),))
    thread.start()
    while serving_.port == 0:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{serving_.port}/healthz"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError, match="503"):
        opener.open(address)
    with pytest.raises(InvalidStatus, match="503"):  # nobody is let in while it warms up
        connect(f"ws://127.0.0.1:{serving_.port}", proxy=None)
    assert ready.wait(10)
    assert opener.open(address).read() == b"OK\n"
    serving_.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_stops_while_it_warms_up():
    policy = Straight(slow=2.0)
    running = PolicyServer(policy, ServerConfig(port=0))
    thread = threading.Thread(target=running.run)
    thread.start()
    while running.port == 0:
        time.sleep(0.01)
    running.stop()
    thread.join(1.5)
    assert not thread.is_alive()
    assert running.is_warming_up  # what `serve` looks at, to leave without waiting for it


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": [b"nonsense"] * 6}, "no JPEG or PNG"),
        ({"images": [b""] * 5}, "must be 6 encoded pictures"),
        ({"images": None}, "must be 6 encoded pictures"),
        ({"camera_to_ego": np.eye(4)}, "camera_to_ego has shape 4x4, not 6x4x4"),
        ({"can_bus": np.full(13, np.nan)}, "can_bus holds values that are not finite"),
        ({"can_bus": None}, "act lacks can_bus"),
        ({"past_mask": np.ones(2, bool)}, "same 2 to 4 rows"),
        ({"command": 9}, "command must be a number from -1 to 6"),
        ({"past_command": np.array([4, 99])}, "no RoadOption"),
        ({"location": "<image>"}, "plain text"),
        ({"step": "one"}, "step must be a number"),
        ({"extra": 1}, "unknown fields: extra"),
    ],
)
def test_bad_observations_are_named(server, change, said):
    client = client_of(server)
    with pytest.raises(PolicyError, match=said):
        client.act(observation(1, **change))
    client.close()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xc1 not msgpack", "not valid msgpack"),
        (b"\x81" * 2000, "not valid msgpack"),
        (b"", "not valid msgpack"),
        ("text", "binary msgpack"),
        (msgpack.packb([1, 2]), "kind act or reset"),
        (msgpack.packb({"kind": "drop tables"}), "kind act or reset"),
        (pack({"kind": np.zeros(2)}), "kind act or reset"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 2**40, b"dtype": "|i1"}), "not valid msgpack"),
        (packed_array("|O8", [1]), "dtype"),
        (packed_array("<c16", [1]), "dtype"),
        (packed_array("|V9", [1]), "dtype"),
        (packed_array("<f4", [9]), "do not fill"),
        (packed_array("<f4", [-1]), "shape"),
        (packed_array("<f4", ["1"]), "shape"),
    ],
)  # fmt: skip
def test_malformed_messages_end_their_own_session(server, data, said):
    other = client_of(server)
    other.act(observation(1))
    with raw(server) as bad:
        bad.recv()
        bad.send(data)
        answer = bad.recv(10)
        assert isinstance(answer, str)
        assert said in answer
        with pytest.raises(ConnectionClosed):
            bad.recv(10)
    assert other.act(observation(2))["status"] == "ok"
    other.close()


def test_objects_are_never_sent():
    for value in (np.array([object()]), np.array([1j]), np.zeros(1, "V8"), object()):
        with pytest.raises(PolicyError, match="cannot be"):
            pack({"x": value})


def test_arrays_travel_unchanged():
    message = {
        "double": np.arange(6.0).reshape(2, 3)[:, ::-1],
        "half": np.float16([1.5]),
        "bool": np.array([True, False]),
        "none": np.zeros((0, 2)),
        "big-endian": np.arange(3, dtype=">i4"),
        "scalar": np.float32(2.5),
        "nested": [{"deep": np.uint8([255])}],
    }
    there = unpack(pack(message))
    for name in ("double", "half", "bool", "none", "big-endian"):
        np.testing.assert_array_equal(there[name], message[name])
        assert there[name].dtype == message[name].dtype
    assert there["scalar"] == 2.5
    assert there["nested"][0]["deep"][0] == 255


def test_oversized_message_is_refused_and_not_sent_again():
    with serving(Straight(), most_bytes=100_000) as small:
        client = client_of(small)
        with pytest.raises(PolicyError, match="1009"):
            client.act(observation(1, images=[b"\xff" * 50_000] * 6))
        assert client.act(observation(2))["status"] == "ok"
        client.close()


def test_token():
    with serving(Straight(), token="secret") as guarded:
        for wrong in (None, "Secret"):
            with pytest.raises(PolicyError, match="refuses the token"):
                client_of(guarded, token=wrong).connect()
        right = client_of(guarded, token="secret")
        assert right.act(observation(1))["status"] == "ok"
        right.close()


def test_web_pages_are_kept_out(server):
    with pytest.raises(InvalidStatus, match="403"):
        connect(server.url, origin="http://evil.example", proxy=None)


def test_no_more_clients_than_allowed():
    with serving(Straight(), most_clients=1) as small:
        with raw(small) as first:
            first.recv()
            with pytest.raises(InvalidStatus, match="503"):
                raw(small)
        patient = client_of(small)
        patient.connect()  # there is room again
        patient.close()


def test_requests_are_batched_and_a_bad_one_fails_alone():
    policy = Straight(slow=0.05)
    with serving(policy, wait_ms=200.0) as running:
        clients = [client_of(running) for _ in range(4)]
        for step, client in enumerate(clients):
            client.act(observation(step))
        policy.sizes.clear()
        answers: dict[int, object] = {}

        def ask(client: PolicyClient, step: int) -> None:
            try:
                answers[step] = client.act(observation(step))["text"]
            except PolicyError as error:
                answers[step] = error

        threads = [
            threading.Thread(target=ask, args=(client, step))
            for client, step in zip(clients, (11, 12, 13, 14), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert policy.sizes[0] == 4  # together first, then one by one
        assert policy.sizes[1:] == [1, 1, 1, 1]
        assert [answers[step] for step in (11, 12, 14)] == ["11", "12", "14"]
        assert "step 13 is unlucky" in str(answers[13])
        assert "Traceback" in str(answers[13])
        for client in clients:
            client.close()


def test_client_that_never_reads_holds_up_only_itself(monkeypatch):
    monkeypatch.setattr(server_module, "SEND_SECONDS", 0.5)
    policy = Straight()
    policy.metadata = policy.metadata | {"padding": "x" * 20_000_000}  # more than the sockets' buffers
    with serving(policy) as running:
        deaf = socket.create_connection(("127.0.0.1", running.port))
        deaf.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        client = client_of(running)
        started = time.monotonic()
        assert client.act(observation(1))["status"] == "ok"
        assert time.monotonic() - started < 5
        deadline = time.monotonic() + 10
        while running._open > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running._open == 1  # the deaf one was cut off
        deaf.close()
        client.close()


def test_dead_client_leaves_no_work(server):
    with raw(server) as gone:
        gone.recv()
        gone.send(pack(observation(1, kind="act")))
        gone.socket.close()  # no goodbye
    client = client_of(server)
    assert client.act(observation(2))["status"] == "ok"
    client.close()


def test_route_goes_on_when_the_server_is_started_again():
    with serving(Straight()) as first:
        client = client_of(first)
        client.reset("route")
        client.act(observation(1))
        port = first.port
    restarted = threading.Event()

    def restart() -> None:
        with serving(Straight(), port=port):
            restarted.set()
            done.wait(20)

    done = threading.Event()
    thread = threading.Thread(target=lambda: (time.sleep(0.5), restart()))
    thread.start()
    assert client.act(observation(2))["text"] == "2"
    assert restarted.is_set()
    client.close()
    done.set()
    thread.join(10)


def test_request_under_way_is_answered_before_the_end():
    policy = Straight(slow=0.5)
    answers = []
    with serving(policy) as running:
        client = client_of(running, patience_seconds=0.5)
        client.connect()
        thread = threading.Thread(target=lambda: answers.append(client.act(observation(1))["text"]))
        thread.start()
        time.sleep(0.2)
    thread.join(10)
    assert answers == ["1"]
    with pytest.raises(PolicyError, match="is it running"):
        client.act(observation(2))


def test_places_that_cannot_be_served_on(server, tmp_path):
    with pytest.raises(SpaceDriveError, match=rf"on 127.0.0.1:{server.port} .* choose another --port"):
        PolicyServer(Straight(), ServerConfig(port=server.port)).run()
    with pytest.raises(SpaceDriveError, match=r"cannot serve on 256.1.1.1:0 .* choose another --host"):
        PolicyServer(Straight(), ServerConfig(host="256.1.1.1", port=0)).run()
    # Before a model is opened.
    with pytest.raises(ConfigError, match="exists: choose another folder"):
        Serve(checkpoint=tmp_path / "none", export=tmp_path).run()
    with pytest.raises(ConfigError, match="--average goes with --checkpoint"):
        Serve(exported=tmp_path, average=True).run()


def test_another_protocol_is_refused():
    policy = Straight()
    policy.metadata = {"protocol": 99}
    with serving(policy) as running, pytest.raises(PolicyError, match="speaks protocol 99"):
        client_of(running).connect()


def test_another_model_behind_the_same_address_is_not_gone_on_with(tmp_path):
    """A server that comes back with other weights would end a drive, or a set of drives, as another model."""
    policy = Straight()
    policy.metadata = {**policy.metadata, "config_hash": "a", "weights": "1"}
    with serving(policy) as running:
        client = client_of(running)
        client.act(observation(1))
        before = Drive(checkpoint=running.url)._checkpoint_name()
        policy.metadata = {**policy.metadata, "weights": "2"}
        client.close()
        with pytest.raises(PolicyError, match=r"serves another model now .*'weights': '2'.* than before"):
            client.act(observation(2))
        after = Drive(checkpoint=running.url)._checkpoint_name()
    assert before == {"path": running.url, "model": "straight", "config_hash": "a", "weights": "1"}
    open_folder(tmp_path / "out", {"checkpoint": before}, resume=False)
    (tmp_path / "out/drives/one").mkdir(parents=True)
    (tmp_path / "out/drives/one/result.json").write_text("{}")
    with pytest.raises(ConfigError, match="begun with another checkpoint"):
        open_folder(tmp_path / "out", {"checkpoint": after}, resume=True)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (TimeoutError(), PolicyError, "did not answer within 500 s"),
    ],
)
def test_an_answer_that_was_not_waited_for_is_not_the_next_ones(server, error, raised, said):
    client = client_of(server)
    client.connect()
    real = client._socket

    class Interrupted:
        def send(self, data):
            real.send(data)

        def recv(self, timeout):
            raise error

        def close(self):
            real.close()

    client._socket = Interrupted()
    with pytest.raises(raised, match=said):
        client.act(observation(1))
    assert client.act(observation(2))["text"] == "2"
    client.close()
