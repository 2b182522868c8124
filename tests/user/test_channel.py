# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The back-end's own requests: answers that come late, never, or in a flood."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from user import hostile as h
from vhost.features import ProtocolF
from vhost.user.channel import BackendChannel
from vhost.user.messages import BackendMsg
from vhost.user.session import Channel, Message, Role, Session
from vhost.user.transport import Transport


class Pair:
    """A channel, and the front-end's end of it."""

    def __init__(self, protocol_features: ProtocolF) -> None:
        ours, self.theirs = socket.socketpair()
        session = Session(Role.BACKEND, Channel.BACKEND_REQ)
        session.protocol_features = int(protocol_features)
        self.channel = BackendChannel(Transport(ours, session))
        self.answers: list[int | None] = []

    def then(self, message: Message | None) -> None:
        self.answers.append(None if message is None else message.status)

    def answer(self, number: int, status: int) -> None:
        self.theirs.sendall(h.HEADER.pack(number, h.VERSION | h.REPLY, 8) + h.u64(status))


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(getattr(request, "param", ProtocolF.CONFIG | ProtocolF.REPLY_ACK))
    yield pair
    pair.channel.close()
    pair.theirs.close()


CONFIG = BackendMsg.BACKEND_CONFIG_CHANGE_MSG


def test_answers_find_their_requests(pair: Pair) -> None:
    pair.channel.request(CONFIG)  # nobody waits, so nothing is asked for
    pair.channel.request(CONFIG, then=pair.then)
    pair.channel.request(CONFIG, then=pair.then)
    assert [h.HEADER.unpack(pair.theirs.recv(12))[1] & h.NEED_REPLY for _ in range(3)] == [0, 8, 8]
    pair.channel.step()
    assert not pair.answers
    pair.answer(CONFIG, 0)
    pair.answer(CONFIG, 7)
    pair.channel.step()
    assert pair.answers == [0, 7]
    assert pair.channel.error is None


@pytest.mark.parametrize("pair", [ProtocolF.CONFIG], indirect=True)
def test_without_reply_ack_nobody_will_say(pair: Pair) -> None:
    pair.channel.request(CONFIG, then=pair.then)
    assert pair.answers == [None]
    assert h.HEADER.unpack(pair.theirs.recv(12))[1] & h.NEED_REPLY == 0


def test_the_front_end_goes_away(pair: Pair) -> None:
    pair.channel.request(CONFIG, then=pair.then)
    pair.theirs.close()
    pair.channel.step()
    assert pair.channel.error is not None
    pair.channel.request(CONFIG, then=pair.then)
    assert pair.answers == [None], "the second is told at once"
    pair.channel.close()
    assert pair.answers == [None, None]


def test_an_answer_to_nothing(pair: Pair) -> None:
    pair.answer(CONFIG, 0)
    pair.channel.step()
    assert "reply to nothing" in str(pair.channel.error)


def test_a_front_end_that_never_reads(pair: Pair) -> None:
    while pair.channel.error is None:
        pair.channel.request(CONFIG)
    assert "does not read" in str(pair.channel.error)
    assert pair.channel.pending
