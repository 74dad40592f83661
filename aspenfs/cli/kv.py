"""`aspen kv`: keys read and changed from the shell.

Belongs here: get, put, delete, cas, ls, and the arguments that all of `aspen kv` shares. Not here:
txn (`kv_txn.py`), watch (`kv_watch.py`), lease (`kv_lease.py`).
"""

import binascii
import os
import sys
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import Any, TypeVar

import click

from aspenfs.cli.aspen import LazyGroup, Settings
from aspenfs.cli.client import Record
from aspenfs.cli.completion import Key
from aspenfs.cli.output import (
    EXIT_CODES_HELP,
    EXIT_COMPARE_FAILED,
    Failure,
    failures,
    flush,
    json_bytes,
    local_time,
    print_bytes,
    print_json,
    shown,
    utc,
)
from aspenfs.kv.types import prefix_end
from aspenfs.limits import CONTROL_DELETE_KEYS, TXN_OPS_MAX, VALUE_BYTES_MAX

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_FLUSH_KEYS = 512

_HERE = "aspenfs.cli.kv"
COMMANDS = {
    "get": (_HERE, "get", "Print the value of a key."),
    "put": (_HERE, "put", "Set the value of a key."),
    "delete": (_HERE, "delete", "Delete keys, or all keys with a prefix."),
    "cas": (_HERE, "cas", "Set a value only if it is still what you think."),
    "ls": (_HERE, "ls", "List keys."),
    "txn": ("aspenfs.cli.kv_txn", "txn", "Several compares and changes as one, from a small text."),
    "watch": ("aspenfs.cli.kv_watch", "watch", "Print changes as they happen."),
    "lease": ("aspenfs.cli.kv_lease", "lease", "Keys that go away by themselves."),
}


@click.group(cls=LazyGroup, table=COMMANDS, epilog=f"""\b
Try:
  aspen kv put app/db/host db1.example.net
  aspen kv get app/db/host
  aspen kv ls --long app/
  aspen kv cas app/db/host db1.example.net db2.example.net
  aspen kv watch app/

\b
Keys and values are bytes: what the shell passes is taken as it is. In JSON they are text where they
are UTF-8; else base64, and "key_encoding" or "value_encoding" says so. --json prints one JSON
document per line. An argument that begins with "-" goes after "--".

{EXIT_CODES_HELP}""")
def kv() -> None:
    """Read and change keys. The same keys are files below kv/ of every mount.

    Reads see everything that was written anywhere before. What is written is on disk, and in the
    mount, when the command returns.
    """


def set_json(ctx: click.Context, param: click.Parameter, asked: bool) -> bool:
    ctx.find_root().meta["json"] = asked
    return asked


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, callback=set_json, is_eager=True,
                        help="Print JSON, one document per line; errors too.")(command)


def base64_option(command: F) -> F:
    return click.option("--key-base64", is_flag=True, help="Keys on the command line are base64.")(command)


def key_bytes(argument: str, as_base64: bool) -> bytes:
    """The key that an argument means: its very bytes, or what base64 they are."""
    data = os.fsencode(argument)
    if not as_base64:
        return data
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error as error:
        raise click.BadParameter(f"{shown(data)!r} is not base64: {error}", param_hint="KEY") from None


def value_bytes(argument: str | None, file: str | None) -> bytes:
    """The value that `VALUE`, `-` or `--file` means. Reads one byte more than is allowed, never more."""
    if (argument is None) == (file is None):
        raise click.UsageError("Give the value as VALUE, or - to read it from stdin, or --file FILE.")
    if argument is not None and argument != "-":
        value = os.fsencode(argument)
    elif file is not None and file != "-":
        with open(file, "rb") as source:
            value = source.read(VALUE_BYTES_MAX + 1)
    else:
        value = sys.stdin.buffer.read(VALUE_BYTES_MAX + 1)
    if len(value) > VALUE_BYTES_MAX:
        raise Failure(f"the value is longer than {VALUE_BYTES_MAX} bytes, which is the most a key can hold",
                      advice="keep it as a file below files/ of the mount", name="TooLarge")
    return value


def record_json(record: Record) -> dict[str, Any]:
    """A record as every --json of `aspen kv` prints it."""
    body: dict[str, Any] = json_bytes("key", record.key)
    if record.value is not None:
        body |= json_bytes("value", record.value)
    if record.size is not None:
        body["size"] = record.size
    body |= {"create_revision": record.create_revision, "mod_revision": record.mod_revision,
             "version": record.version, "lease": record.lease}
    if record.mtime_ns is not None:
        body["mtime"] = utc(record.mtime_ns)
    return body


@click.command(epilog="""\b
Examples:
  aspen kv get app/db/host
  aspen kv get app/logo.png --output logo.png
  aspen kv get app/db/host --revision 1207       as it was then
  aspen kv get app/db/host --json | jq .version
""")
@click.argument("key", type=Key())
@click.option("--revision", type=click.IntRange(min=0), default=0, help="As it was at this revision.")
@click.option("--output", "-o", metavar="FILE", default="-", help="Write the value to FILE; - is stdout.")
@json_option
@base64_option
@click.pass_obj
def get(settings: Settings, key: str, revision: int, output: str, as_json: bool, key_base64: bool) -> None:
    """Print the value of KEY: its bytes, with nothing added.

    Only on a terminal a line end is added, where the value has none.
    """
    name = key_bytes(key, key_base64)
    with failures(), settings.client() as client:
        record = client.get(name, revision=revision)
        if record is None:
            at = f" at revision {revision}" if revision else ""
            raise Failure(f"{shown(name)}: no such key{at}", advice="`aspen kv ls PREFIX` lists keys",
                          name="NotFound")
        value = record.value or b""
        if as_json:
            print_json(record_json(record))
        elif output != "-":
            with open(output, "wb") as target:
                target.write(value)
        else:
            print_bytes([value])
            if sys.stdout.isatty() and not value.endswith(b"\n"):
                print_bytes([b"\n"])
        flush()


@click.command(epilog="""\b
Examples:
  aspen kv put app/db/host db1.example.net
  aspen kv put app/offset -- -5
  printf %s "$secret" | aspen kv put app/token -
  aspen kv put app/logo.png --file logo.png
  aspen kv put service/web/a 10.0.0.1:80 --lease "$(aspen kv lease grant 30s)"
""")
@click.argument("key", type=Key())
@click.argument("value", required=False)
@click.option("--file", metavar="FILE", help="Read the value from FILE.")
@click.option("--lease", type=click.IntRange(min=0), default=0, help="The key goes when this lease ends.")
@json_option
@base64_option
@click.pass_obj
def put(settings: Settings, key: str, value: str | None, file: str | None, lease: int, as_json: bool,
        key_base64: bool) -> None:
    """Set KEY to VALUE; - reads the value from stdin.

    A key that hung on a lease is taken off it, unless --lease says otherwise.
    """
    name = key_bytes(key, key_base64)
    with failures(), settings.client() as client:
        data = value_bytes(value, file)
        answer = client.txn([], [{"op": "put", "key": name, "value": data, "lease": lease}])
        if as_json:
            print_json(json_bytes("key", name) | {"revision": answer.result["revision"]})


@click.command(epilog=f"""\b
Examples:
  aspen kv delete app/db/host app/db/port
  aspen kv delete --prefix app/old/
  aspen kv delete --force app/maybe            no error where it is not there

\b
Up to {TXN_OPS_MAX} keys go in one transaction: all or none. By prefix it is {CONTROL_DELETE_KEYS:,} keys at a
time: others may see it half done.
""")
@click.argument("keys", nargs=-1, required=True, type=Key(), metavar="KEY...")
@click.option("--prefix", is_flag=True, help="Delete all keys that begin with KEY.")
@click.option("--force", "-f", is_flag=True, help="A key that is not there is no error.")
@click.option("--yes", is_flag=True, help="With --prefix '': yes, delete every key there is.")
@json_option
@base64_option
@click.pass_obj
def delete(settings: Settings, keys: tuple[str, ...], prefix: bool, force: bool, yes: bool, as_json: bool,
           key_base64: bool) -> None:
    """Delete KEYs. Exit code 1 where one of them was not there."""
    names = list(dict.fromkeys(key_bytes(key, key_base64) for key in keys))
    if prefix and b"" in names and not yes:
        raise click.UsageError("An empty prefix is every key there is. Add --yes if that is what you want.")
    with failures(), settings.client() as client:
        deleted, missing = 0, list[bytes]()
        if prefix:
            for name in names:
                count = 0
                while True:
                    result = client.write("kv.delete_range", start=name, end=prefix_end(name)).result
                    count += result["deleted"]
                    if not result["more"]:
                        break
                deleted += count
                if not count:
                    missing.append(name)
        else:
            for batch in _batches(names, TXN_OPS_MAX):
                answer = client.txn([], [{"op": "delete", "key": name} for name in batch])
                for name, response in zip(batch, answer.result["responses"], strict=True):
                    deleted += response["count"]
                    if not response["count"]:
                        missing.append(name)
        if as_json:
            print_json({"deleted": deleted, "missing": [json_bytes("key", name) for name in missing]})
        if missing and not force:
            what = "no key begins with it" if prefix else "no such key"
            raise Failure("; ".join(f"{shown(name)}: {what}" for name in missing),
                          advice=f"{deleted} deleted; --force makes this no error", name="NotFound")


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@click.command(epilog="""\b
Examples:
  aspen kv cas app/leader '' host-a              was empty, becomes host-a
  aspen kv cas app/leader --absent host-a        only if the key is not there
  aspen kv cas app/config --revision 1207 - < new.json

\b
  until new=$(($(aspen kv get n) + 1)); aspen kv cas n $((new - 1)) $new >/dev/null; do :; done
""")
@click.argument("key", type=Key())
@click.argument("values", nargs=-1, required=True, metavar="[OLD] NEW")
@click.option("--absent", is_flag=True, help="Instead of OLD: only if KEY is not there.")
@click.option("--revision", type=click.IntRange(min=0), default=0,
              help="Instead of OLD: only if KEY was last changed at this revision (mod_revision).")
@click.option("--lease", type=click.IntRange(min=0), default=0, help="The key goes when this lease ends.")
@json_option
@base64_option
@click.pass_obj
def cas(settings: Settings, key: str, values: tuple[str, ...], absent: bool, revision: int, lease: int,
        as_json: bool, key_base64: bool) -> None:
    """Compare and set: KEY becomes NEW only if it holds OLD.

    NEW may be - for stdin. If the compare fails, nothing is changed, the value found goes to stdout,
    and the exit code is 3.
    """
    if absent and revision:
        raise click.UsageError("--absent and --revision exclude each other.")
    if len(values) != (1 if absent or revision else 2):
        raise click.UsageError("Give OLD and NEW, or --absent and NEW, or --revision N and NEW.")
    name = key_bytes(key, key_base64)
    compare: dict[str, Any]
    if absent:
        compare, wanted = {"target": "absent", "key": name}, "absent"
    elif revision:
        compare = {"target": "mod", "operator": "=", "key": name, "operand": revision}
        wanted = f"of revision {revision}"
    else:
        compare = {"target": "value", "operator": "=", "key": name, "operand": os.fsencode(values[0])}
        wanted = f"{shown(os.fsencode(values[0]), limit=60)!r}"
    with failures(), settings.client() as client:
        new = {"op": "put", "key": name, "value": value_bytes(values[-1], None), "lease": lease}
        result = client.txn([compare], [new]).result
        if result["succeeded"]:
            if as_json:
                print_json({"succeeded": True} | json_bytes("key", name) | {"revision": result["revision"]})
            return
        found = client.get(name, revision=result["revision"])  # what the compare saw, not what came after it
        if as_json:
            print_json({"succeeded": False, "found": None if found is None else record_json(found)})
        elif found is not None and found.value is not None:
            print_bytes([found.value])
        flush()
        state = "absent" if found is None else f"at revision {found.mod_revision}, version {found.version}"
        raise Failure(f"{shown(name)}: compare failed: it is {state}, not {wanted}",
                      advice="read it again and decide anew; nothing was changed",
                      exit_code=EXIT_COMPARE_FAILED, name="CompareFailed")


@click.command(epilog="""\b
Examples:
  aspen kv ls app/
  aspen kv ls --long app/
  aspen kv ls --json | jq -r 'select(.version > 10) | .key'
  aspen kv ls --null app/ | xargs -0 -n 100 aspen kv delete
""")
@click.argument("prefix", required=False, default="", type=Key())
@click.option("--limit", type=click.IntRange(min=0), default=0, help="Stop after this many keys.")
@click.option("--revision", type=click.IntRange(min=0), default=0, help="As it was at this revision.")
@click.option("--keys-only", is_flag=True, help="With --json: without values, which is faster.")
@click.option("--long", "-l", "long_", is_flag=True, help="With revision, version, lease, size and time.")
@click.option("--null", "-0", is_flag=True, help="End each key with NUL, for xargs -0.")
@json_option
@base64_option
@click.pass_obj
def ls(settings: Settings, prefix: str, limit: int, revision: int, keys_only: bool, long_: bool,
       null: bool, as_json: bool, key_base64: bool) -> None:
    """List the keys that begin with PREFIX, in byte order; all of them, however many.

    What is listed is the state of one moment, also if it takes long.
    """
    if long_ and (as_json or null):
        raise click.UsageError("--long is for people: it goes with neither --json nor --null.")
    start = key_bytes(prefix, key_base64)
    with failures(), settings.client() as client:
        listing = client.range(start, prefix_end(start), limit=limit, revision=revision,
                               keys_only=keys_only or not (as_json or long_), sizes_only=long_)
        if as_json:
            result = _each(listing, lambda record: print_json(record_json(record)))
        elif long_:
            result = _each(listing, lambda record: print_bytes([_long(record)]), header=_LONG_HEADER)
        else:
            end = b"\0" if null else b"\n"
            result = _each(listing, lambda record: print_bytes([record.key, end]))
        if limit and result["more"]:
            click.echo(f"aspen: stopped after {limit} keys (--limit), there are more", err=True)
        if not result["snapshot"]:
            click.echo("aspen: history was compacted meanwhile: later keys are newer than earlier", err=True)


def _each(listing: Generator[Record, None, dict[str, Any]], show: Callable[[Record], None], *,
          header: bytes = b"") -> dict[str, Any]:
    """Shows every record as it comes, below the header if there is one; returns the listing's result."""
    count = 0
    while True:
        try:
            record = next(listing)
        except StopIteration as stop:
            flush()
            result: dict[str, Any] = stop.value
            return result
        if not count:
            print_bytes([header])
        show(record)
        count += 1
        if count % _FLUSH_KEYS == 0:
            flush()


_LONG = "{:>10}  {:>7}  {:>15}  {:>8}  {:19}  {}\n"
_LONG_HEADER = _LONG.format("REVISION", "VERSION", "LEASE", "SIZE", "WRITTEN", "KEY").encode()


def _long(record: Record) -> bytes:
    written = "-" if record.mtime_ns is None else local_time(record.mtime_ns)
    return _LONG.format(record.mod_revision, record.version, record.lease or "-", record.size, written,
                        shown(record.key)).encode()
