# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The front-end on back-ends that are slow, old, hostile, or not there yet."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import vhost
from user import hostile as h
from vhost.errors import Disconnected, InactiveFeature, InvalidMessage, ReplyTimeout, RequestFailed
from vhost.features import ProtocolF


class RawBackend:
    """Answers as it is told to, on one end of a socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fds: list[int] = []

    def receive(self) -> tuple[int, int, bytes]:
        data = b""
        while len(data) < 12:
            part, ancillary, _, _ = self.sock.recvmsg(12 - len(data), 1024)
            if not part:
                raise EOFError
            for _, _, raw in ancillary:
                self.fds += array.array("i", raw)
            data += part
        number, flags, size = h.HEADER.unpack(data)
        payload = b""
        while len(payload) < size:
            payload += self.sock.recv(size - len(payload))
        return number, flags, payload

    def reply(self, number: int, payload: bytes) -> None:
        self.sock.sendall(h.HEADER.pack(number, h.VERSION | h.REPLY, len(payload)) + payload)

    def expect(self, number: int, payload: bytes) -> None:
        got, _, data = self.receive()
        assert (got, data) == (number, payload)

    def grant(self, number: int) -> None:
        """The next request is this one, whatever it says, and is acked."""
        got, flags, _ = self.receive()
        assert got == number
        if flags & h.NEED_REPLY:
            self.reply(number, h.u64(0))

    def channel(self) -> RawRequests:
        """The channel that the front-end gave us in the handshake."""
        return RawRequests(socket.socket(fileno=self.fds.pop()))

    def handshake(self, features: int, protocol: int) -> None:
        """Up to the first request after it."""
        expected = [h.GET_FEATURES]
        if features & h.PROTOCOL_FEATURES:
            expected += [h.GET_PROTOCOL_FEATURES, h.SET_PROTOCOL_FEATURES]
        expected.append(h.SET_OWNER)
        if protocol & ProtocolF.BACKEND_REQ:
            expected.append(h.SET_BACKEND_REQ_FD)
        for want in expected:
            number, flags, _ = self.receive()
            assert number == want
            if number == h.GET_FEATURES:
                self.reply(number, h.u64(features))
            elif number == h.GET_PROTOCOL_FEATURES:
                self.reply(number, h.u64(protocol))
            elif flags & h.NEED_REPLY:
                self.reply(number, h.u64(0))

    def close(self) -> None:
        self.sock.close()
        for fd in self.fds:
            os.close(fd)


class RawRequests:
    """A back-end's own requests, as it is told to make them."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)

    def send(
        self, number: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = h.VERSION
    ) -> None:
        data = h.HEADER.pack(number, flags, len(payload)) + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self.sock.sendmsg([data], ancillary if fds else [])

    def ask(self, number: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """The status that it is answered with."""
        self.send(number, payload, fds, flags=h.VERSION | h.NEED_REPLY)
        return self.answer(number)[0]

    def answer(self, number: int) -> tuple[int, list[int]]:
        """A u64, and descriptors."""
        data, ancillary, _, _ = self.sock.recvmsg(20, 1024)
        got, flags, size = h.HEADER.unpack(data[:12])
        assert (got, flags, size, len(data)) == (number, h.VERSION | h.REPLY, 8, 20)
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        return int.from_bytes(data[12:], "little"), list(fds)

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def backend(script: Callable[[RawBackend], None]) -> Iterator[socket.socket]:
    """A front-end's socket, with the script on the other end."""
    ours, theirs = socket.socketpair()
    failed: list[BaseException] = []

    def run() -> None:
        with contextlib.closing(RawBackend(theirs)) as raw:
            theirs.settimeout(20)
            try:
                script(raw)
            except BaseException as error:
                failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(30)
    assert not thread.is_alive()
    assert not failed, failed


def test_back_end_without_protocol_features(no_leaks: None) -> None:
    def script(raw: RawBackend) -> None:
        raw.handshake(h.VERSION_1, 0)
        assert raw.receive() == (h.SET_FEATURES, h.VERSION, h.u64(h.VERSION_1))
        with pytest.raises(EOFError):
            raw.receive()

    with backend(script) as sock, vhost.Frontend(sock) as frontend:
        assert frontend.protocol_features == 0
        frontend.set_features(h.VERSION_1)
        frontend.set_vring_enable(0, True)  # enabled by SET_FEATURES: nothing to send
        with pytest.raises(InactiveFeature):
            frontend.get_config(0, 8)
        with pytest.raises(InactiveFeature):
            frontend.get_queue_num()


def test_refusals_are_named(no_leaks: None) -> None:
    def script(raw: RawBackend) -> None:
        raw.handshake(h.VERSION_1 | h.PROTOCOL_FEATURES, int(ProtocolF.REPLY_ACK))
        number, flags, _ = raw.receive()
        assert flags & h.NEED_REPLY
        raw.reply(number, h.u64(5))

    with backend(script) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(RequestFailed, match="SET_VRING_NUM") as caught:
            frontend.set_vring_num(0, 8)
        assert caught.value.status == 5


def test_silence_ends_in_a_timeout(no_leaks: None) -> None:
    asked, done = threading.Event(), threading.Event()

    def script(raw: RawBackend) -> None:
        raw.receive()
        asked.set()
        done.wait(20)

    with backend(script) as sock:
        with pytest.raises(ReplyTimeout, match="GET_FEATURES"):
            vhost.Frontend(sock, timeout=0.1)
        assert asked.is_set()
        done.set()


@pytest.mark.parametrize("when", ["at once", "in the header", "in the payload"])
def test_back_end_dies(when: str, no_leaks: None) -> None:
    def script(raw: RawBackend) -> None:
        raw.receive()
        whole = h.HEADER.pack(h.GET_FEATURES, h.VERSION | h.REPLY, 8) + h.u64(0)
        raw.sock.sendall(whole[: {"at once": 0, "in the header": 7, "in the payload": 15}[when]])

    with backend(script) as sock, pytest.raises(vhost.ProtocolError, match=r"GET_FEATURES|closed"):
        vhost.Frontend(sock)


def test_more_regions_than_the_back_end_has_slots(no_leaks: None) -> None:
    def script(raw: RawBackend) -> None:
        raw.handshake(h.PROTOCOL_FEATURES, int(ProtocolF.CONFIGURE_MEM_SLOTS))
        assert raw.receive()[0] == h.GET_MAX_MEM_SLOTS
        raw.reply(h.GET_MAX_MEM_SLOTS, h.u64(8))
        with pytest.raises(EOFError):
            raw.receive()

    regions = [vhost.Region.allocate(4096, guest_addr=i << 16) for i in range(9)]
    with backend(script) as sock, vhost.Frontend(sock) as frontend:
        with pytest.raises(vhost.InvalidGuestMemory, match="9 regions, the back-end has 8 slots"):
            frontend.set_mem_table(vhost.GuestMemory(regions))


def test_answers_to_something_else(no_leaks: None) -> None:
    def script(raw: RawBackend) -> None:
        raw.receive()
        raw.reply(h.GET_PROTOCOL_FEATURES, h.u64(0))

    with backend(script) as sock, pytest.raises(InvalidMessage):
        vhost.Frontend(sock)


def test_back_end_that_asks_before_it_answers(no_leaks: None) -> None:
    """It waits for our answer on its channel, we wait for its answer on ours."""

    def script(raw: RawBackend) -> None:
        protocol = ProtocolF.REPLY_ACK | ProtocolF.BACKEND_REQ | ProtocolF.CONFIG
        raw.handshake(h.VERSION_1 | h.PROTOCOL_FEATURES, int(protocol))
        with socket.socket(fileno=raw.fds.pop()) as channel:
            channel.settimeout(20)
            number, _, _ = raw.receive()
            channel.sendall(h.HEADER.pack(2, h.VERSION | h.NEED_REPLY, 0))
            assert channel.recv(20) == h.HEADER.pack(2, h.VERSION | h.REPLY, 8) + h.u64(0)
            channel.sendall(h.HEADER.pack(4, h.VERSION | h.NEED_REPLY, 8) + bytes(8))
            answer = channel.recv(20)
            assert answer[:12] == h.HEADER.pack(4, h.VERSION | h.REPLY, 8)
            assert answer[12:] != h.u64(0), "in-band calls were not negotiated"
            raw.reply(number, h.u64(0))
            # The news is delivered after that; whoever hears it may ask.
            number, _, payload = raw.receive()
            assert number == h.GET_CONFIG
            raw.reply(number, payload)

    heard: list[bytes] = []
    with backend(script) as sock, vhost.Frontend(sock) as frontend:
        frontend.on_config_change = lambda: heard.append(frontend.get_config(0, 4))
        frontend.set_vring_num(0, 8)
        assert heard == [bytes(4)]


def test_back_end_that_asks_without_end(no_leaks: None) -> None:
    """And never answers: our own timeout still counts."""

    def script(raw: RawBackend) -> None:
        protocol = ProtocolF.REPLY_ACK | ProtocolF.BACKEND_REQ | ProtocolF.CONFIG
        raw.handshake(h.VERSION_1 | h.PROTOCOL_FEATURES, int(protocol))
        with socket.socket(fileno=raw.fds.pop()) as channel, contextlib.suppress(OSError):
            while True:
                channel.sendall(h.HEADER.pack(2, h.VERSION, 0) * 64)

    with backend(script) as sock, vhost.Frontend(sock, timeout=0.5) as frontend:
        with pytest.raises(ReplyTimeout):
            frontend.set_vring_num(0, 8)


def test_retry_covers_the_whole_handshake(tmp_path: Path, no_leaks: None) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        vhost.Frontend.connect(path)
    with pytest.raises(FileNotFoundError):
        vhost.Frontend.connect(path, retry=0.1)

    def late() -> None:
        """Nothing there, then a back-end that dies in the handshake, then one that does not."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen()
            for features in (None, h.VERSION_1):
                sock, _ = listener.accept()
                with contextlib.closing(RawBackend(sock)) as raw:
                    if features is None:
                        raw.receive()
                    else:
                        raw.handshake(features, 0)

    thread = threading.Thread(target=late)
    thread.start()
    with vhost.Frontend.connect(path, retry=20) as frontend:
        assert frontend.get_features() == h.VERSION_1
    thread.join(20)


def test_listening_front_end_and_client_back_end(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "s"
    code = "import sys, vhost; vhost.serve(vhost.devices.Rng(), sys.argv[1], client=True)"
    server = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        for _ in range(2):  # it comes back after a session
            with vhost.Frontend.listen(path, timeout=20) as frontend, vhost.drivers.Rng(frontend) as rng:
                assert len(rng.read(100)) == 100
        assert not path.exists()
    finally:
        server.kill()
        server.wait()


def test_listen_times_out(tmp_path: Path, no_leaks: None) -> None:
    with pytest.raises(ReplyTimeout):
        vhost.Frontend.listen(tmp_path / "s", timeout=0.05)
    assert not (tmp_path / "s").exists()


def test_regions_are_added_and_removed_while_requests_run(tmp_path: Path, no_leaks: None) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(1 << 20))
    want = image.read_bytes()
    device = vhost.devices.Blk(image)
    with h.served(device, tmp_path / "s"), vhost.Frontend.connect(tmp_path / "s") as frontend:
        with vhost.drivers.Blk(frontend) as disk:
            extra = [vhost.Region.allocate(1 << 16, guest_addr=i << 20) for i in range(1, 9)]
            for round_ in range(20):
                for i in range(32):
                    disk.submit_read(i * 8, 8, i)
                regions = [disk.region, *extra[: round_ % 9]]
                frontend.set_mem_table(vhost.GuestMemory(regions))
                got = {}
                while disk.in_flight:
                    got.update({done.token: done.data for done in disk.poll(20)})
                assert got == {i: want[i * 4096 : (i + 1) * 4096] for i in range(32)}
            frontend.set_mem_table(disk.memory)
            extra.clear()
            regions.clear()
    device.close()


def test_back_end_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vhost", "serve", "rng", "--socket-path", str(tmp_path / "s")]
    server = subprocess.Popen(command)
    try:
        with vhost.Frontend.connect(tmp_path / "s", retry=20) as frontend:
            server.kill()
            server.wait()
            with pytest.raises(Disconnected):
                frontend.set_vring_num(0, 8)
            deadline = time.monotonic() + 20
            while frontend.step():
                assert time.monotonic() < deadline
        # The socket that it left behind does not stop the next one.
        server = subprocess.Popen(command)
        vhost.Frontend.connect(tmp_path / "s", retry=20).close()
    finally:
        server.terminate()
        assert server.wait() == 0
