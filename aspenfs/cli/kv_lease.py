"""`aspen kv lease`: leases granted, kept alive, ended and listed."""

import os
import re
import time

import click

from aspenfs.cli.aspen import Settings
from aspenfs.cli.client import Client
from aspenfs.cli.kv import json_option
from aspenfs.cli.output import failures, flush, print_bytes, print_json
from aspenfs.errors import AlreadyExists, LeaseNotFound

_UNITS_MS = {"ms": 1, "": 1_000, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_ID_BITS = 48  # short enough to read aloud; a clash is noticed and another id is drawn


class Ttl(click.ParamType[int]):
    """30, 30s, 500ms, 5m, 1h, 7d as milliseconds."""

    name = "ttl"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)(ms|s|m|h|d|)", str(value))
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is not a time like 30s, 500ms, 5m, 1h or 7d", param, ctx)
        return int(match[1]) * _UNITS_MS[match[2]]


@click.group(epilog="""\b
Try:
  lease=$(aspen kv lease grant 30s)
  aspen kv put service/web/a 10.0.0.1:80 --lease "$lease"
  aspen kv lease keepalive "$lease"     as long as this runs, the key stays
""")
def lease() -> None:
    """Keys that go away by themselves: they are deleted when their lease ends.

    A lease ends when its time has passed without a keepalive, or when it is revoked.
    """


@lease.command(epilog="""\b
Examples:
  aspen kv lease grant 30s
  aspen kv lease grant 7d --id 4711
""")
@click.argument("ttl", type=Ttl())
@click.option("--id", "lease_id", type=click.IntRange(min=1), help="Choose the id.  [default: a random one]")
@json_option
@click.pass_obj
def grant(settings: Settings, ttl: int, lease_id: int | None, as_json: bool) -> None:
    """Grant a lease for TTL (30, 30s, 500ms, 5m, 1h, 7d) and print its id."""
    with failures(), settings.client() as client:
        granted = _grant(client, ttl, lease_id)
        if as_json:
            print_json({"lease": granted, "ttl_ms": ttl})
        else:
            print_bytes([b"%d\n" % granted])
        flush()


def _grant(client: Client, ttl_ms: int, lease_id: int | None) -> int:
    """The id is chosen here, so that asking again after a lost answer grants no second lease."""
    while True:
        chosen = lease_id or int.from_bytes(os.urandom(_ID_BITS // 8), "big") or 1
        try:
            client.call("lease.grant", ttl_ms=ttl_ms, lease=chosen)
        except AlreadyExists:
            if client.repeated:
                return chosen  # the first request was carried out, its answer was lost
            if lease_id is not None:
                raise
            continue
        return chosen


@lease.command()
@click.argument("lease_id", metavar="ID", type=click.IntRange(min=1))
@json_option
@click.pass_obj
def revoke(settings: Settings, lease_id: int, as_json: bool) -> None:
    """End the lease ID now and delete its keys."""
    with failures(), settings.client() as client:
        try:
            client.call("lease.revoke", lease=lease_id)
        except LeaseNotFound:
            if not client.repeated:
                raise
        if as_json:
            print_json({"revoked": lease_id})
            flush()


@lease.command(epilog="""\b
Examples:
  aspen kv lease keepalive 4711             until interrupted
  aspen kv lease keepalive --once 4711
""")
@click.argument("lease_id", metavar="ID", type=click.IntRange(min=1))
@click.option("--once", is_flag=True, help="Restart the lease's time once and end.")
@json_option
@click.pass_obj
def keepalive(settings: Settings, lease_id: int, once: bool, as_json: bool) -> None:
    """Keep the lease ID alive: its time starts anew, three times per TTL, until interrupted."""
    with failures(), settings.client() as client:
        while True:
            ttl_ms = client.call("lease.keepalive", lease=lease_id).result["ttl_ms"]
            if as_json:
                print_json({"lease": lease_id, "ttl_ms": ttl_ms})
            else:
                print_bytes([f"lease {lease_id} has {ttl_ms / 1000:g} s from now\n".encode()])
            flush()
            if once:
                return
            time.sleep(ttl_ms / 3000)


@lease.command("list")
@json_option
@click.pass_obj
def list_(settings: Settings, as_json: bool) -> None:
    """List all leases with the time that they have left."""
    with failures(), settings.client() as client:
        leases = [one for page in client.call("lease.list").items for one in page]
        if not as_json:
            print_bytes([f"{'LEASE':>20}  {'TTL':>10}  {'LEFT':>10}\n".encode()])
        for lease_id, ttl_ms, left_ms in leases:
            if as_json:
                print_json({"lease": lease_id, "ttl_ms": ttl_ms, "remaining_ms": left_ms})
            else:
                print_bytes([f"{lease_id:>20}  {ttl_ms / 1000:>9g}s  {left_ms / 1000:>9g}s\n".encode()])
        flush()
