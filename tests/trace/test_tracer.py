# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""From records to events: every row of the table, replies and their requests, and streams that are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracing import ALL_FEATURES, ALL_PROTOCOL, EVENTFD, MEMFD, MICROSECOND, SOCKET, Seen
from user.wire import SAMPLES, right_number
from vhost.features import BlkF, NetF, ProtocolF, VhostF
from vhost.trace.events import Event
from vhost.trace.frames import Assembler
from vhost.trace.records import KEPT, FdInfo, Happening, Record
from vhost.trace.rules import RULES, Severity
from vhost.trace.tracer import MAX_OUTSTANDING, Tracer
from vhost.user.gpu_messages import GpuMsg
from vhost.user.gpu_payloads import GpuEdidRequest, GpuScanout
from vhost.user.messages import BACKEND, FRONTEND, BackendMsg, FrontendMsg, frame
from vhost.user.payloads import EMPTY, U64, Config, Payload, VringFd, VringState
from vhost.user.spec import HEADER, REPLY_FLAG, Channel, Role, Spec

ROWS = [*FRONTEND.values(), *BACKEND.values()]
XEN = int(ProtocolF.XEN_MMAP)


def everything() -> Seen:
    """A session in which every message is in order."""
    seen = Seen().negotiate(ALL_FEATURES, ALL_PROTOCOL & ~XEN)
    seen.open_channel()
    return seen


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_shown(row: Spec) -> None:
    """As a request and as its reply, with the names and values of its payload, and of nothing else."""
    seen = everything()
    request, channel = SAMPLES[row.request], int(row.sender is Role.BACKEND)
    ask = seen.front if row.sender is Role.FRONTEND else seen.back
    answer = seen.back if row.sender is Role.FRONTEND else seen.front
    kind = SOCKET if row.name in ("SET_BACKEND_REQ_FD", "GPU_SET_SOCKET") else MEMFD
    kind = EVENTFD if isinstance(request, VringFd) else kind
    fds = [kind] * right_number(row, request)
    event = ask(row.id, request, fds, need_reply=True, channel=channel)
    assert event.text.startswith(row.name)
    assert event.detail["name"] == row.name
    if request is not EMPTY:
        # Features of the device that it seems to be have their names, too.
        assert row.show(request).partition(" (")[0] in event.text
    assert f"fds=[{kind}" in event.text if fds else "fds" not in event.text
    reply = SAMPLES[row.reply] if row.reply is not None else U64(0)
    own = row.replies(ALL_PROTOCOL, False)
    reply_fds = [MEMFD] * (right_number(row, reply, reply=True) if own else 0)
    event = answer(row.id, reply if own else U64(0), reply_fds, channel=channel)
    assert event.text.startswith(f"{row.name} {'reply' if own else 'ack'}")
    assert event.detail["latency"] == MICROSECOND / 1e9
    names = set(seen.rules())
    assert not {"size", "fds", "feature", "reply-to-nothing", "need-reply", "ack-missing"} & names
    for one in seen.events:
        json.dumps(one.as_dict())


def test_lines_for_people() -> None:
    seen = Seen().negotiate()
    event = seen.front(FrontendMsg.SET_VRING_KICK, VringFd(3), [EVENTFD], need_reply=True)
    first, second = event.lines()
    assert first == (
        f"{seen.now / 1e9:12.6f} #1 front>back     SET_VRING_KICK index=3 nofd=False fds=[eventfd] need_reply"
    )
    assert second.strip().startswith("! note: ring 3 has a kick before its size and addresses [Ring states")
    (ack,) = seen.back(FrontendMsg.SET_VRING_KICK, U64(1)).lines()
    assert ack.endswith("#1 back>front     SET_VRING_KICK refused value=0x1 (1 us)")


def test_a_message_in_any_number_of_pieces() -> None:
    """And its descriptors with whichever of them."""
    data = frame(FrontendMsg.SET_VRING_KICK, VringFd(1).pack())
    for cut in range(1, len(data)):
        seen = Seen().negotiate()
        assert not seen.raw(Role.FRONTEND, data[:cut])
        (event,) = seen.raw(Role.FRONTEND, data[cut:], [EVENTFD])
        assert event.text == "SET_VRING_KICK index=1 nofd=False fds=[eventfd]"
    seen = Seen().negotiate()
    texts = [event.text for event in seen.raw(Role.FRONTEND, data[:12] + data[12:] + data, [EVENTFD])]
    assert texts == ["SET_VRING_KICK index=1 nofd=False fds=[eventfd]", "SET_VRING_KICK index=1 nofd=False"]


def test_replies_in_order_and_out_of_it() -> None:
    seen = Seen().negotiate()
    for number in (FrontendMsg.SET_VRING_NUM, FrontendMsg.SET_VRING_NUM):
        seen.front(number, VringState(0, 4), need_reply=True)
    seen.front(FrontendMsg.GET_VRING_BASE, VringState(0))
    event = seen.back(FrontendMsg.GET_VRING_BASE, VringState(0, 7))
    (finding,) = event.findings
    assert finding.rule.name == "ack-missing"
    assert finding.text == "no answer to SET_VRING_NUM, SET_VRING_NUM, but to a later request"
    assert event.text == "GET_VRING_BASE reply index=0 num=7 (1 us)"
    event = seen.back(FrontendMsg.SET_VRING_NUM, U64(0))
    assert [finding.rule.name for finding in event.findings] == ["reply-to-nothing"]
    assert not seen.front(FrontendMsg.GET_VRING_BASE, VringState(0)).findings


def test_need_reply_that_was_not_negotiated_may_be_answered_or_not() -> None:
    for answered in (False, True):
        seen = Seen()
        assert seen.front(FrontendMsg.SET_OWNER, need_reply=True).findings[0].rule.name == "need-reply"
        if answered:
            assert seen.back(FrontendMsg.SET_OWNER, U64(0)).text == "SET_OWNER ack (1 us)"
        seen.front(FrontendMsg.GET_FEATURES)
        seen.back(FrontendMsg.GET_FEATURES, U64(0))
        seen.record(Happening.CLOSE)
        assert seen.rules() == ["need-reply"]


def test_what_nobody_answered() -> None:
    seen = Seen().negotiate()
    for _ in range(5):
        seen.front(FrontendMsg.GET_FEATURES)
    seen.record(Happening.EOF, Role.FRONTEND)
    assert not seen.rules()
    (event,) = seen.record(Happening.EOF, Role.BACKEND)
    (finding,) = event.findings
    assert finding.text == "no reply to GET_FEATURES, GET_FEATURES, GET_FEATURES and 2 more"
    seen.record(Happening.CLOSE)
    assert seen.rules() == ["unanswered"]


def test_requests_that_are_never_answered_are_not_hoarded() -> None:
    seen = Seen().negotiate()
    for _ in range(MAX_OUTSTANDING + 1):
        seen.front(FrontendMsg.GET_FEATURES)
    assert seen.rules() == ["backlog"]
    seen.back(FrontendMsg.GET_FEATURES, U64(0))
    assert seen.rules() == ["backlog"]


def test_four_gigabytes() -> None:
    """Announced: said at once. Passed on: counted, and not kept. Then the stream goes on in step."""
    seen = Seen().negotiate()
    size = (1 << 32) - 1
    (event,) = seen.raw(Role.FRONTEND, HEADER.pack(FrontendMsg.SET_MEM_TABLE, 1, size))
    assert event.text == f"SET_MEM_TABLE: {size} bytes of payload announced, passed on as they come"
    assert [finding.rule.name for finding in event.findings] == ["size"]
    assert not seen.raw(Role.FRONTEND, bytes(KEPT))
    assert not seen.record(Happening.DATA, Role.FRONTEND, skipped=size - KEPT - 1)
    (event,) = seen.record(Happening.DATA, Role.FRONTEND, skipped=1)
    assert event.text == f"SET_MEM_TABLE: end of its {size} bytes of payload"
    assert seen.front(FrontendMsg.SET_OWNER).text == "SET_OWNER"


def test_nothing_is_kept_beyond_the_limit() -> None:
    assembler = Assembler()
    for data in (HEADER.pack(5, 1, 1 << 30), *[bytes(KEPT)] * 4):
        list(assembler.feed(0, data, 0, (MEMFD,) * 253, True))
    assert assembler.frame is not None
    assert len(assembler.frame.data) == KEPT
    assert assembler.frame.fd_count == 5 * 253
    assert len(assembler.frame.fds) < 64


def test_cut_off() -> None:
    seen = Seen().negotiate()
    seen.raw(Role.FRONTEND, frame(FrontendMsg.SET_VRING_NUM, bytes(8))[:15])
    (event,) = seen.record(Happening.EOF, Role.FRONTEND)
    assert event.findings[0].text == "15 of 20 bytes of SET_VRING_NUM"
    seen.raw(Role.BACKEND, b"\1\0")
    (event,) = seen.record(Happening.EOF, Role.BACKEND, text="gone")
    assert event.findings[0].text == "2 of 12 bytes of a header"
    assert event.text == "back-end closed (gone)"


def test_undelivered() -> None:
    seen = Seen().negotiate()
    data = frame(FrontendMsg.GET_FEATURES)
    (event,) = seen.record(Happening.DATA, Role.FRONTEND, data, delivered=False)
    assert [finding.rule.name for finding in event.findings] == ["undelivered"]
    assert event.detail["delivered"] is False


def test_what_is_not_in_the_table() -> None:
    seen = Seen().negotiate()
    event = seen.front(77, b"\x01\x02\x03", need_reply=True)
    assert event.text == "message 77 <3 bytes: 010203> need_reply"
    assert [finding.rule.name for finding in event.findings] == ["unknown"]
    assert seen.back(77, U64(1)).text == "message 77 refused value=0x1 (1 us)"
    assert seen.back(78, b"").findings[0].rule.name == "reply-to-nothing"


def test_both_channels_share_what_was_negotiated() -> None:
    seen = Seen().negotiate(protocol=int(ProtocolF.BACKEND_REQ | ProtocolF.CONFIG | ProtocolF.REPLY_ACK))
    seen.open_channel()
    event = seen.back(BackendMsg.BACKEND_CONFIG_CHANGE_MSG, need_reply=True, channel=1)
    assert event.channel is Channel.BACKEND_REQ
    assert seen.front(BackendMsg.BACKEND_CONFIG_CHANGE_MSG, U64(0), channel=1).text.endswith("ack (1 us)")
    assert seen.rules() == []
    event = seen.back(BackendMsg.BACKEND_SHMEM_UNMAP, SAMPLES[BACKEND[10].request], channel=1)
    assert "feature" in [finding.rule.name for finding in event.findings]


def test_gpu_channel() -> None:
    """Frames without a version, decoded and gated by what is negotiated there."""
    seen = Seen().negotiate()
    seen.record(Happening.OPEN, channel=2, text=Channel.GPU.value)

    def gpu(sender: Role, number: int, payload: Payload = EMPTY, flags: int = 0) -> Event:
        data = payload.pack()
        whole = HEADER.pack(number, flags, len(data)) + data
        return seen.record(Happening.DATA, sender, whole, channel=2)[-1]

    event = gpu(Role.BACKEND, GpuMsg.GPU_GET_PROTOCOL_FEATURES)
    assert (event.channel, event.text) == (Channel.GPU, "GPU_GET_PROTOCOL_FEATURES")
    assert " back>front gpu GPU_GET" in next(iter(event.lines()))
    event = gpu(Role.FRONTEND, GpuMsg.GPU_GET_PROTOCOL_FEATURES, U64(1), REPLY_FLAG)
    assert event.text == "GPU_GET_PROTOCOL_FEATURES reply value=0x1 (EDID) (1 us)"
    assert seen.rules() == []
    gpu(Role.BACKEND, GpuMsg.GPU_GET_EDID, GpuEdidRequest(0))
    assert seen.rules() == ["feature"]
    gpu(Role.BACKEND, GpuMsg.GPU_SET_PROTOCOL_FEATURES, U64(1))
    gpu(Role.BACKEND, GpuMsg.GPU_GET_EDID, GpuEdidRequest(0))
    assert seen.rules() == ["feature"]
    gpu(Role.BACKEND, GpuMsg.GPU_SCANOUT, GpuScanout(0, 640, 480), flags=1)
    assert seen.rules() == ["feature", "version"]


def test_a_session_is_forgotten_with_its_last_channel() -> None:
    seen = Seen().negotiate()
    seen.open_channel()
    seen.record(Happening.CLOSE)
    assert not seen.back(BackendMsg.BACKEND_CONFIG_CHANGE_MSG, channel=1).text.startswith("message")
    seen.record(Happening.CLOSE, channel=1)
    assert not seen.tracer._linters
    assert not seen.tracer._channels


def test_sessions_that_never_began_are_not_hoarded() -> None:
    tracer = Tracer()
    for session in range(100):
        (event,) = tracer.feed(Record(0, session, 0, Happening.REMARK, text="nobody is there"))
        assert event.text == "nobody is there"
        assert not list(tracer.feed(Record(0, session, 0, Happening.CLOSE)))
        assert not list(tracer.feed(Record(0, session, 0, Happening.EOF, Role.FRONTEND)))
    assert not tracer._channels
    assert not tracer._linters


def test_names_of_a_reply_that_failed() -> None:
    seen = Seen().negotiate(protocol=int(ProtocolF.CONFIG))
    seen.front(FrontendMsg.GET_CONFIG, Config(0, 4, 0, bytes(4)))
    assert not seen.back(FrontendMsg.GET_CONFIG, Config(0, 0, 0, b"")).findings


@given(
    st.lists(
        st.tuples(
            st.sampled_from([Role.FRONTEND, Role.BACKEND]),
            st.one_of(
                st.binary(max_size=80),
                st.builds(
                    lambda number, flags, size, data: HEADER.pack(number, flags, size) + data,
                    st.integers(0, 50),
                    st.integers(0, 15),
                    st.integers(0, 64),
                    st.binary(max_size=64),
                ),
            ),
            st.integers(0, 3),
            st.integers(0, 2),
        ),
        max_size=30,
    )
)
def test_any_bytes(pieces: list[tuple[Role, bytes, int, int]]) -> None:
    """Nothing that passes can make the tracer fail, and what it says of the same bytes is the same."""
    records = [
        Record(0, 1, 0, Happening.OPEN, text="main"),
        Record(0, 1, 1, Happening.OPEN, text="back-end requests"),
        Record(0, 1, 2, Happening.OPEN, text="gpu"),
    ]
    records += [
        Record(number, 1, channel, Happening.DATA, sender, data, 0, (FdInfo("pipe"),) * fds)
        for number, (sender, data, fds, channel) in enumerate(pieces)
    ]
    records += [Record(99, 1, channel, Happening.CLOSE) for channel in range(3)]
    lines = []
    for _ in range(2):
        tracer = Tracer()
        lines.append([line for record in records for event in tracer.feed(record) for line in event.lines()])
    assert lines[0] == lines[1]


@given(st.sampled_from(ROWS), st.data())
def test_any_payload_of_a_row(row: Spec, data: st.DataObject) -> None:
    """What decodes may hold any numbers."""
    from user.wire import STRATEGIES

    seen = everything()
    ask = seen.front if row.sender is Role.FRONTEND else seen.back
    answer = seen.back if row.sender is Role.FRONTEND else seen.front
    channel = int(row.sender is Role.BACKEND)
    for _ in range(data.draw(st.integers(1, 3))):
        fds = [MEMFD] * data.draw(st.integers(0, 2))
        ask(row.id, data.draw(STRATEGIES[row.request]), fds, need_reply=True, channel=channel)
        if row.reply is not None:
            answer(row.id, data.draw(STRATEGIES[row.reply]), fds, channel=channel)
    json.dumps([event.as_dict() for event in seen.events])


def test_rules_have_names_and_sections() -> None:
    assert len(RULES) > 50
    assert {rule.severity for rule in RULES.values()} == set(Severity)
    for name, rule in RULES.items():
        assert rule.name == name
        assert rule.section
        assert rule.doc.endswith(".")


def test_features_of_a_session_are_named() -> None:
    seen = Seen()
    seen.front(FrontendMsg.GET_FEATURES)
    event = seen.back(FrontendMsg.GET_FEATURES, U64(int(VhostF.PROTOCOL_FEATURES)))
    assert "PROTOCOL_FEATURES" in event.text
    assert event.detail["payload"]["names"] == ["PROTOCOL_FEATURES"]


def test_features_of_the_device_that_it_seems_to_be() -> None:
    for bits, name in ((NetF.MRG_RXBUF, "MRG_RXBUF"), (BlkF.FLUSH | BlkF.SEG_MAX, "SEG_MAX FLUSH")):
        seen = Seen().negotiate(int(bits), offered=int(bits))
        assert f"({name})" in seen.text()
