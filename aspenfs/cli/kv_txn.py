"""`aspen kv txn`: a transaction from a small text or from JSON.

Belongs here: both forms, read into the wire form of `docs/design/control-socket.md`, and the printing
of what came of it.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.client import Answer, Record, record
from aspenfs.cli.kv import json_option, record_json
from aspenfs.cli.output import (
    EXIT_COMPARE_FAILED,
    Failure,
    failures,
    flush,
    from_json_bytes,
    print_bytes,
    print_json,
    shown,
)
from aspenfs.kv.types import prefix_end
from aspenfs.limits import CONTROL_FRAME_BYTES_MAX

Body = dict[str, Any]
Transaction = tuple[list[Body], list[Body], list[Body]]  # compares, then, else


@click.command(epilog="""\b
The text: one clause a line; words may be quoted as in the shell; # begins a comment.
  if exists KEY | if absent KEY | if empty PREFIX
  if value KEY = VALUE | if mod|create|version KEY = NUMBER       also != < >
  then|else put KEY VALUE [LEASE] | append KEY VALUE
  then|else delete KEY | delete-prefix PREFIX
  then|else get KEY | ls PREFIX [LIMIT]

\b
Move a key, unless it changed meanwhile:
  aspen kv txn <<'END'
  if mod app/old = 1207
  if absent app/new
  then put app/new "the value"
  then delete app/old
  else get app/old
  END

\b
The same as JSON ("key_encoding": "base64" and "value_encoding": "base64" where it is not text):
  {"compare": [{"target": "mod", "key": "app/old", "operator": "=", "operand": 1207},
               {"target": "absent", "key": "app/new"}],
   "then": [{"op": "put", "key": "app/new", "value": "the value"}, {"op": "delete", "key": "app/old"}],
   "else": [{"op": "get", "key": "app/old"}]}
Further in JSON: {"op": "delete_range" | "range", "prefix": "app/"}, {"target": "empty", "prefix": "app/"}.

\b
Exit code 0: "then" was done; 3: a compare failed and "else" was done.
""")
@click.option("--file", metavar="FILE", help="Read the transaction from FILE, not from stdin.")
@json_option
@click.pass_obj
def txn(settings: Settings, file: str | None, as_json: bool) -> None:
    """Several compares and changes as one: all or nothing, nobody sees half of it.

    Reads a transaction from stdin. If all compares hold, what "then" says is done, else what "else"
    says. At most 128 clauses of each kind, and 1 MiB in all.
    """
    with failures():
        source = _read(file)
        try:
            compares, then, else_ = parse(source)
        except ValueError as error:
            raise click.UsageError(f"{file or 'stdin'}: {error}") from None
        if not then and not else_:
            raise click.UsageError(f"{file or 'stdin'}: nothing to do: no \"then\" and no \"else\"")
        with settings.client() as client:
            answer = client.txn(compares, then, else_)
        succeeded = answer.result["succeeded"]
        _show(answer, then if succeeded else else_, as_json)
        flush()
    if not succeeded:
        sys.exit(EXIT_COMPARE_FAILED)


def _read(file: str | None) -> bytes:
    size = CONTROL_FRAME_BYTES_MAX
    if file is None or file == "-":
        source = sys.stdin.buffer.read(size + 1)
    else:
        with open(file, "rb") as opened:
            source = opened.read(size + 1)
    if len(source) > size:
        raise Failure(f"a transaction of more than {size} bytes", name="TxnTooLarge")
    return source


def parse(source: bytes) -> Transaction:
    """A transaction from either form; ValueError says which line or clause is wrong."""
    if source.lstrip().startswith(b"{"):
        return _parse_json(source)
    compares, then, else_ = list[Body](), list[Body](), list[Body]()
    for number, line in enumerate(os.fsdecode(source).split("\n"), 1):
        try:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            match words[0]:
                case "if":
                    compares.append(_compare(words[1:]))
                case "then":
                    then.append(_operation(words[1:]))
                case "else":
                    else_.append(_operation(words[1:]))
                case other:
                    raise ValueError(f'a line begins with "if", "then" or "else", not {other!r}')
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return compares, then, else_


def _compare(words: Sequence[str]) -> Body:
    match words:
        case ["exists" | "absent" as target, key]:
            return {"target": target, "key": os.fsencode(key)}
        case ["empty", prefix]:
            return {"target": "empty", **_prefix(os.fsencode(prefix))}
        case ["value", key, operator, value]:
            return {"target": "value", "key": os.fsencode(key), "operator": operator,
                    "operand": os.fsencode(value)}
        case ["mod" | "create" | "version" as target, key, operator, number]:
            return {"target": target, "key": os.fsencode(key), "operator": operator,
                    "operand": int(number)}
    raise ValueError('after "if": exists KEY, absent KEY, empty PREFIX, value KEY = VALUE, or mod, create or '
                     'version KEY = NUMBER')


def _operation(words: Sequence[str]) -> Body:
    match words:
        case ["put", key, value]:
            return {"op": "put", "key": os.fsencode(key), "value": os.fsencode(value)}
        case ["put", key, value, lease]:
            return {"op": "put", "key": os.fsencode(key), "value": os.fsencode(value), "lease": int(lease)}
        case ["append", key, value]:
            return {"op": "append", "key": os.fsencode(key), "value": os.fsencode(value)}
        case ["delete" | "get" as op, key]:
            return {"op": op, "key": os.fsencode(key)}
        case ["delete-prefix", prefix]:
            return {"op": "delete_range", **_prefix(os.fsencode(prefix))}
        case ["ls", prefix]:
            return {"op": "range", **_prefix(os.fsencode(prefix))}
        case ["ls", prefix, limit]:
            return {"op": "range", **_prefix(os.fsencode(prefix)), "limit": int(limit)}
    raise ValueError("after 'then' or 'else': put KEY VALUE [LEASE], append KEY VALUE, delete KEY, "
                     "delete-prefix PREFIX, get KEY, or ls PREFIX [LIMIT]")


def _prefix(prefix: bytes) -> Body:
    return {"start": prefix, "end": prefix_end(prefix)}


def _parse_json(source: bytes) -> Transaction:
    document = json.loads(source)  # its errors are ValueErrors, and name the line
    unknown = sorted(set(document) - {"compare", "then", "else"})
    if unknown:
        raise ValueError(f'{unknown[0]!r} is not one of "compare", "then", "else"')

    def clauses(name: str, read: Callable[[Mapping[str, Any]], Body]) -> list[Body]:
        bodies = document.get(name, [])
        if not isinstance(bodies, list):
            raise ValueError(f"{name!r} must be a list")
        read_ones = []
        for number, body in enumerate(bodies, 1):
            if not isinstance(body, dict):
                raise ValueError(f"{name} {number}: must be an object")
            try:
                read_ones.append(read(body))
            except ValueError as error:
                raise ValueError(f"{name} {number}: {error}") from None
        return read_ones

    then, else_ = clauses("then", _json_operation), clauses("else", _json_operation)
    return clauses("compare", _json_compare), then, else_


def _json_clause(body: Mapping[str, Any], kinds: Sequence[str], named: str) -> Body:
    """What every clause has: its kind, and a key or a prefix. The daemon checks the rest."""
    kind = body.get(named)
    if kind not in kinds:
        raise ValueError(f'"{named}" is one of {" ".join(kinds)}')
    if "prefix" in body:
        return {named: kind, **_prefix(from_json_bytes(body, "prefix"))}
    return {named: kind, "key": from_json_bytes(body, "key")}


def _json_compare(body: Mapping[str, Any]) -> Body:
    kinds = ("exists", "absent", "empty", "value", "create", "mod", "version")
    clause = _json_clause(body, kinds, "target")
    if clause["target"] in ("exists", "absent", "empty"):
        return clause
    operand = from_json_bytes(body, "operand") if clause["target"] == "value" else body.get("operand")
    return clause | {"operator": body.get("operator", "="), "operand": operand}


def _json_operation(body: Mapping[str, Any]) -> Body:
    clause = _json_clause(body, ("put", "append", "delete", "delete_range", "get", "range"), "op")
    if clause["op"] in ("put", "append"):
        clause["value"] = from_json_bytes(body, "value")
    return clause | {name: body[name] for name in ("lease", "limit") if name in body}


def _show(answer: Answer, operations: Sequence[Body], as_json: bool) -> None:
    """What came of the branch that ran: a line for each operation, its records below it."""
    result = answer.result
    found: dict[int, list[Record]] = {}
    for item in answer.items:
        found.setdefault(item["response"], []).extend(record(fields) for fields in item["records"])
    if as_json:
        responses: list[Body] = []
        for number, (operation, response) in enumerate(zip(operations, result["responses"], strict=True)):
            body: Body = {"op": operation["op"]}
            if operation["op"] in ("get", "range"):
                body["records"] = [record_json(one) for one in found.get(number, [])]
            elif response is not None:
                body["deleted"] = response["count"]
            responses.append(body)
        print_json({"succeeded": result["succeeded"], "revision": result["revision"], "responses": responses})
        return
    branch, outcome = ("then", "succeeded") if result["succeeded"] else ("else", "compare failed")
    print_bytes([f"{outcome}: revision {result['revision']}\n".encode()])
    for number, (operation, response) in enumerate(zip(operations, result["responses"], strict=True)):
        subject = shown(operation["key"] if "key" in operation else operation["start"])
        count = "" if response is None else f": {response['count']}"
        print_bytes([f"{branch} {operation['op']} {subject}{count}\n".encode()])
        for one in found.get(number, []):
            print_bytes([f"  {shown(one.key)} {shown(one.value or b'')}\n".encode()])
