"""The language of the control socket: frames, greeting, requests, replies, errors.

Belongs here: what both ends must agree on. Not here: sockets, trio, what a request does. The client
imports this file and must start fast, so it imports nothing heavy. `docs/design/control-socket.md`
is the same in prose.

A frame is a big-endian u32 length and that many bytes of msgpack: always one map with text keys.

    client                                   daemon
    {hello, versions, client}        ->
                                     <-      {hello, version, release, pid}  or  {error}, end
    {id, method, params}             ->
                                     <-      {id, item}   none, one or many
                                     <-      {id, result} or {id, error}     the last word on `id`
    {cancel: id}                     ->                                      (that request ends with an error)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack

from aspenfs import errors
from aspenfs.limits import CONTROL_FRAME_BYTES_MAX, CONTROL_ITEMS_MAX

GREETING = "aspen-control"
VERSION = 1
HEADER_BYTES = 4
CLIENT_ID_BYTES = 16
SOCKET_NAME = "ctl.sock"
SOCKET_PATH_BYTES_MAX = 107  # sun_path of Linux is 108 bytes with its closing NUL

Message = dict[str, Any]


def encode(message: Mapping[str, Any]) -> bytes:
    """The frame of `message`; TooLarge, or InvalidArgument for what msgpack cannot carry."""
    try:
        payload: bytes = msgpack.packb(message, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise errors.InvalidArgument(f"a message cannot be packed: {error}") from None
    if len(payload) > CONTROL_FRAME_BYTES_MAX:
        raise errors.TooLarge(f"a message of {len(payload)} bytes; the most is {CONTROL_FRAME_BYTES_MAX}")
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def payload_size(header: bytes) -> int:
    """How many bytes follow the header; ProtocolError where no message can be that long."""
    size = int.from_bytes(header, "big")
    if not 0 < size <= CONTROL_FRAME_BYTES_MAX:
        raise errors.ProtocolError(f"a frame of {size} bytes; 1 to {CONTROL_FRAME_BYTES_MAX} are allowed")
    return size


def decode(payload: bytes) -> Message:
    """The map in `payload`; ProtocolError for anything else.

    The bounds on arrays and maps keep a short message from announcing, level within level, arrays
    that would fill the memory before the first element is read.
    """
    try:
        message = msgpack.unpackb(payload, raw=False, strict_map_key=True, max_array_len=CONTROL_ITEMS_MAX,
                                  max_map_len=CONTROL_ITEMS_MAX, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:  # UnicodeDecodeError is a ValueError
        raise errors.ProtocolError(f"not msgpack that is allowed here: {error}") from None
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise errors.ProtocolError("a message must be a map with text keys")
    return message


# --- greeting ---


def hello(client: bytes) -> Message:
    return {"hello": GREETING, "versions": [VERSION], "client": client}


class Hello(NamedTuple):
    version: int
    client: bytes


def read_hello(message: Message) -> Hello:
    """What the daemon makes of a client's first message: NotSupported if no version is shared."""
    if message.get("hello") != GREETING:
        raise errors.ProtocolError("the first message must be a greeting")
    versions, client = message.get("versions"), message.get("client")
    if not isinstance(versions, list) or not all(type(version) is int for version in versions):
        raise errors.ProtocolError("versions must be a list of numbers")
    if not isinstance(client, bytes) or len(client) != CLIENT_ID_BYTES:
        raise errors.ProtocolError(f"client must be {CLIENT_ID_BYTES} bytes")
    if VERSION not in versions:
        raise errors.NotSupported(f"the daemon speaks version {VERSION} of the control protocol, the client "
                                  f"{versions}: use the aspen command that came with the daemon")
    return Hello(VERSION, client)


class Request(NamedTuple):
    id: int
    method: str
    params: Message


def read_request(message: Message) -> Request:
    number, method, params = message.get("id"), message.get("method"), message.get("params")
    if type(number) is not int or number < 0 or not isinstance(method, str) or not isinstance(params, dict):
        raise errors.ProtocolError("a request needs id (a number), method (text) and params (a map)")
    return Request(number, method, params)


# --- errors: the class's name crosses the socket, so both ends raise the same one ---


_NUMBERS = ((errors.Compacted, "oldest"), (errors.Lagged, "revision"), (errors.NotLeader, "leader"))


def encode_error(error: errors.AspenError) -> Message:
    body: Message = {"name": type(error).__name__, "message": str(error)}
    for kind, attribute in _NUMBERS:
        if isinstance(error, kind):
            body[attribute] = getattr(error, attribute)
    return body


def decode_error(body: Any) -> errors.AspenError:
    """The error that the other end raised; RemoteFailure if this end does not know its name."""
    if not isinstance(body, dict):
        return errors.ProtocolError("an error that is not a map")
    name, message = str(body.get("name")), str(body.get("message"))
    found = getattr(errors, name, None)
    if not (isinstance(found, type) and issubclass(found, errors.AspenError) and hasattr(found, "errno")):
        return errors.RemoteFailure(f"{name}: {message}")
    # Not called: what __init__ of some classes wants beside the text did not travel.
    error = found.__new__(found, message)
    for kind, attribute in _NUMBERS:
        if isinstance(error, kind):
            number = body.get(attribute)
            setattr(error, attribute, number if type(number) is int else 0)
    return error
