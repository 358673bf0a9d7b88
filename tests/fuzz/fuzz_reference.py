"""`PayloadRef.from_json` and the addresses in a reference: a reference, or a typed error."""

from dray.errors import ConfigError, ProtocolError
from dray.protocol import PayloadRef
from dray.protocol.ref import MAX_REF_BYTES
from dray.transport.attempts import by_lane
from dray.transport.lanes import LANES, SHM, parse_endpoint

SEEDS = [
    b'{"p":"00112233445566778899aabbccddeeff","s":3,"q":41,"n":1048576,'
    b'"e":["unix:/run/user/1000/dray/1a2b3c4d/0.sock","tcp:127.0.0.1:40001"]}',
    b'{"p":"00112233445566778899aabbccddeeff","s":0,"q":18446744073709551615,"n":0,"e":["ucx:[::1]:65535"]}',
    b'{"p":"00112233445566778899aabbccddeeff","s":-1,"q":true,"n":1.5,"e":[]}',
    b'{"p":"00112233445566778899aabbccddeeff","s":0,"q":0,"n":0,"e":["tcp:a..b:80"]}',
    b'{"p":"00112233445566778899aabbccddeeff","s":0,"q":0,"n":0,"e":["unix:\\ud800"]}',
    b'{"p":"00112233445566778899aabbccddeeff","s":0,"q":0,"n":0,"e":["unix:\\u0000"],"p":1}',
    b"[" * 500,
]


def run(data: bytes) -> None:
    try:
        ref = PayloadRef.from_json(data)
    except ProtocolError:
        return
    assert len(data) <= MAX_REF_BYTES
    try:
        text = ref.to_json()
    except ProtocolError:  # written without escapes, it was shorter
        assert not data.decode(errors="replace").isprintable() or not data.isascii()
    else:
        assert PayloadRef.from_json(text) == ref
    for address in ref.endpoints:
        try:
            endpoint = parse_endpoint(address)
        except ConfigError:
            continue
        assert parse_endpoint(str(endpoint)) == endpoint
        # What sockets are given: a path, or a name that can be looked up.
        if endpoint.lane is SHM:
            assert 0 < len(endpoint.host.encode()) < 108
            assert "\0" not in endpoint.host
        else:
            assert endpoint.host.encode("idna")
            assert 0 < endpoint.port < 65536
    try:
        by_lane(ref.endpoints, tuple(LANES.values()))
    except ConfigError:
        return
