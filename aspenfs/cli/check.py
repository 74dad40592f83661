"""`aspen check`: is every row and every byte as it should be, here, offline, or on all members."""

import sys
from collections.abc import Mapping
from typing import Any

import click

from aspenfs import errors
from aspenfs.cli.aspen import Settings
from aspenfs.cli.kv import json_option
from aspenfs.cli.lock import holder_pid
from aspenfs.cli.output import EXIT_CODES_HELP, EXIT_REFUSED, Failure, failures, print_json
from aspenfs.cli.table import print_table


@click.command(
    epilog=f"""\b
Examples:
  aspen check                    the running daemon checks itself, while it serves
  aspen check --cluster          do all members have the same state? Compared now, at one entry of the log
  aspen check --offline          after umount: the log too, and nothing can change meanwhile
  aspen check --offline --repair

\b
With --json: {{"clean", "findings": [{{"part", "where", "text", "mendable", "mended"}}], "totals"}}.
Repairing never deletes bytes that a name leads to: inodes without a name go to files/lost+found,
damaged blobs to blobs/quarantine.

\b
With --cluster --json: {{"clean", "index", "digest", "members": [{{"name", "id", "digest", "differs",
"cause"}}]}}.
"digest" is what a majority of the voters has, null if none has one and the same; "cause": why a member
told nothing. A member that differs from a majority serves nothing until it has fetched the state anew.

{EXIT_CODES_HELP}
Here 1 means: something is wrong, and is still so.
"""
)
@click.option("--offline", is_flag=True, help="Open the state directory itself; no daemon may run on it.")
@click.option("--cluster", is_flag=True, help="Have all members compare their states.")
@click.option("--repair", is_flag=True, help="Mend what can be mended without guessing. With --offline only.")
@json_option
@click.pass_obj
def check(settings: Settings, offline: bool, cluster: bool, repair: bool, as_json: bool) -> None:
    """Verify everything: log, state, blobs, and that names, inodes and bytes agree."""
    if cluster and (offline or repair):
        raise click.UsageError("--cluster asks the members that run: without --offline and --repair")
    if cluster:
        _compare(settings, as_json)
        return
    if repair and not offline:
        raise click.UsageError("--repair needs --offline: unmount first, then aspen check --offline --repair")
    findings, totals = _offline(settings, repair) if offline else _online(settings)
    left = [one for one in findings if not one["mended"]]
    if as_json:
        print_json({"clean": not left, "findings": findings, "totals": totals})
    else:
        _show(findings, totals, offline)
    if left:
        sys.exit(EXIT_REFUSED)


def _offline(settings: Settings, repair: bool) -> tuple[list[dict[str, object]], dict[str, int]]:
    from aspenfs.cli.checking import Totals, check_offline

    directory = settings.directory
    if not directory.path.is_dir():
        raise Failure(
            f"no node here: {directory.path} does not exist", advice="name another with --state-dir"
        )
    totals: list[Totals] = []
    with failures():
        try:
            found = [one._asdict() for one in check_offline(directory, repair=repair, done=totals.append)]
        except errors.Busy as error:
            raise Failure(
                f"{directory.path} is in use by the daemon with pid {holder_pid(directory)}",
                advice="leave --offline away to have the daemon check itself, or unmount first",
            ) from error
    return found, totals[0]._asdict() if totals else {}


def _online(settings: Settings) -> tuple[list[dict[str, object]], dict[str, int]]:
    with failures(), settings.client() as client:
        answer = client.call("check")
    names = ("part", "where", "text", "mendable", "mended")
    return [dict(zip(names, item, strict=True)) for item in answer.items], answer.result


def _compare(settings: Settings, as_json: bool) -> None:
    with failures(), settings.client() as client:
        found = client.follow("state.compare", lambda _: None)
    members, digest = found["members"], found["digest"] or None
    clean = digest is not None and not any(member["differs"] for member in members)
    if as_json:
        shown = [{name: member[name] for name in ("name", "id", "digest", "differs", "cause")}
                 for member in members]  # fmt: skip
        print_json({"clean": clean, "index": found["index"], "digest": digest, "members": shown})
    else:
        rows = [(member["name"], str(member["id"]), _digest(member["digest"]), _verdict(member, digest))
                for member in members]  # fmt: skip
        print_table(("NAME", "ID", "DIGEST", "STATE"), rows)
        everybody = "all members" if all(member["digest"] for member in members) else "all that told"
        told = f"{everybody} have the same state" if clean else "PROBLEM: the states differ"
        if digest is None and not any(member["differs"] for member in members):
            told = "too few members told: aspen status shows who is missing"
        click.echo(f"{told}, at entry {found['index']}")
    if not clean:
        sys.exit(EXIT_REFUSED)


def _digest(digest: str | None) -> str:
    return "-" if digest is None else digest[:16] or "unreadable"


def _verdict(member: Mapping[str, Any], majority: str | None) -> str:
    if member["digest"] is None:
        return str(member["cause"])
    if majority is None:
        return "no majority has the same"
    return "differs" if member["differs"] else "same"


def _show(findings: list[dict[str, object]], totals: dict[str, int], offline: bool) -> None:
    for one in findings:
        what = "mended" if one["mended"] else "can be mended" if one["mendable"] else "PROBLEM"
        click.echo(f"{what}: {one['part']}: {one['where']}: {one['text']}".replace(": :", ":"))
    if totals:
        click.echo(f"checked {totals['keys']} keys, {totals['inodes']} inodes, {totals['chunks']} chunks")
    if not findings:
        click.echo("clean")
    elif any(one["mendable"] and not one["mended"] for one in findings):
        click.echo(
            "to mend what can be mended: "
            + ("" if offline else "unmount, then ")
            + "aspen check --offline --repair"
        )
