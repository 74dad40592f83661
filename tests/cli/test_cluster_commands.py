"""`aspen ticket`, `member`, `leader`, `ca` as they print what a daemon answers; on real clusters they are
tested in tests/mount/cluster/."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from aspenfs import errors
from aspenfs.cli.aspen import aspen
from aspenfs.runtime.control_command import Call
from tests.runtime.controlled import Daemon, short_directory

REFUSED, USAGE, UNREACHABLE = 1, 2, 4
S_NS = 1_000_000_000
TICKET = {"ticket": "aspen1-abc", "id": "00ff00ff00", "expires_ns": 1_800_000_000 * S_NS, "began": False,
          "listen": "*:7420", "advertise": ["192.0.2.7:7420"]}  # fmt: skip


def row(name: str, node: int, role: str, state: str, **more: Any) -> dict[str, Any]:
    fixed = {"lag": 0, "topology": 1, "addresses": [f"{name}:7420"], "since_ns": None, "cause": ""}
    return {"id": node, "name": name, "role": role, "state": state, **fixed, **more}


class Answers:
    """Handlers that note what they were asked, of the daemon in `directory`."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.ticket = dict(TICKET)
        self.handlers = {
            method: self._handler(method)
            for method in ("ticket.create", "ticket.list", "ticket.revoke", "member.list", "member.change",
                           "leader.transfer", "ca.rotate")
        }  # fmt: skip

    def _handler(self, method: str) -> Any:
        async def answer(call: Call) -> Any:
            self.asked.append((method, dict(call.params)))
            return await getattr(self, method.replace(".", "_"))(call)

        return answer

    async def ticket_create(self, call: Call) -> Any:
        return self.ticket

    async def ticket_list(self, call: Call) -> Any:
        now_ns = time.time_ns()
        for state, node in (("open", 0), ("used", 7), ("expired", 0)):
            expires_ns = now_ns + (600 if state == "open" else -600) * S_NS
            await call.item(
                {
                    "id": f"{state}0",
                    "created_ns": now_ns,
                    "expires_ns": expires_ns,
                    "node": node,
                    "state": state,
                }
            )
        return {"count": 3}

    async def ticket_revoke(self, call: Call) -> Any:
        raise errors.NotFound("no ticket is called x")

    async def member_list(self, call: Call) -> Any:
        since_ns = time.time_ns() - 200 * S_NS
        return {"members": [
            row("db1", 1, "leader", "here"),
            row("db2", 22, "voter", "unreachable", since_ns=since_ns, cause="Connection refused", lag=1_234),
            row("db3", 33, "learner", "connected", lag=None),
            row("db3", 34, "voter", "connected"),
        ]}  # fmt: skip

    async def member_change(self, call: Call) -> Any:
        return {"node": 22, "name": "db2", "role": "learner"}

    async def leader_transfer(self, call: Call) -> Any:
        return {"node": 22, "name": "db2"}

    async def ca_rotate(self, call: Call) -> Any:
        for line in ("making a new CA", "waiting for node 22 to trust the new CA"):
            await call.item(line)
        return {"expires_ns": 1_800_000_000 * S_NS}


@pytest.fixture
def answers() -> Iterator[Answers]:
    with short_directory() as directory:
        answers = Answers(str(directory))
        with Daemon(directory / "ctl.sock", extra=answers.handlers):
            yield answers


def run(answers: Answers, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(aspen, ["--state-dir", answers.directory, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_ticket_create_prints_the_line_to_run(answers: Answers) -> None:
    lines = run(answers, "ticket", "create", "--ttl", "2h").splitlines()
    assert lines[0].startswith("ticket 00ff00ff00, good for one node until ")
    assert lines[1] == "  aspen join aspen1-abc /mnt/aspen"
    assert answers.asked == [("ticket.create", {"ttl_s": 7200, "listen": "", "advertise": []})]
    assert run(answers, "ticket", "create", "--learner").splitlines()[1].endswith(" /mnt/aspen --learner")
    assert run(answers, "ticket", "create", "-q") == "aspen1-abc\n"
    body = json.loads(run(answers, "ticket", "create", "--json"))
    assert body["command"] == ["aspen", "join", "aspen1-abc", "/mnt/aspen"]
    assert body["expires"] == "2027-01-15T08:00:00.000000000Z"


def test_ticket_create_says_where_a_node_listens_that_did_not_before(answers: Answers) -> None:
    answers.ticket["began"] = True
    said = run(answers, "ticket", "create", "--advertise", "a:1", "--advertise", "b:2")
    assert said.startswith("this node listens on *:7420 from now on, and is found at 192.0.2.7:7420\n")
    assert answers.asked[-1][1]["advertise"] == ["a:1", "b:2"]


def test_ticket_list_tells_what_became_of_each(answers: Answers) -> None:
    lines = run(answers, "ticket", "list").splitlines()
    assert lines[0].split() == ["ID", "STATE", "EXPIRES", "USED", "BY", "NODE"]
    assert "(in 9 min)" in lines[1] or "(in 10 min)" in lines[1]
    assert lines[2].split()[-1] == "7"
    assert lines[3].split()[-1] == "-"
    assert [one["node"] for one in json.loads(run(answers, "ticket", "list", "--json"))] == [None, 7, None]


def test_what_the_daemon_refuses_is_a_refusal(answers: Answers) -> None:
    assert "no ticket is called x" in run(answers, "ticket", "revoke", "x", code=REFUSED)
    assert "is not a time like" in run(answers, "ticket", "create", "--ttl", "soon", code=USAGE)


def test_member_list_is_a_table_with_how_long_who_is_away(answers: Answers) -> None:
    lines = run(answers, "member", "list").splitlines()
    assert lines[0].split()[:5] == ["NAME", "ID", "ROLE", "STATE", "LAG"]
    assert "unreachable for 3 min  1,234" in lines[2]
    assert lines[3].split()[4] == "-"
    body = json.loads(run(answers, "member", "list", "--json"))
    assert body[1]["cause"] == "Connection refused"
    assert body[1]["since"].endswith("Z")
    assert "since_ns" not in body[1]


def test_changes_of_members_say_what_is_now(answers: Answers) -> None:
    assert run(answers, "member", "demote", "db2") == "db2 (node 22) is a learner now\n"
    assert run(answers, "member", "remove", "22") == "db2 (node 22) is removed\n"
    assert answers.asked == [
        ("member.change", {"act": "demote", "member": "db2"}),
        ("member.change", {"act": "remove", "member": "22"}),
    ]
    assert run(answers, "leader", "transfer") == "db2 (node 22) leads now\n"
    assert answers.asked[-1] == ("leader.transfer", {"member": ""})


def test_rotation_of_the_ca_tells_how_far_it_is(answers: Answers) -> None:
    lines = run(answers, "ca", "rotate").splitlines()
    assert lines[:2] == ["making a new CA", "waiting for node 22 to trust the new CA"]
    assert json.loads(run(answers, "ca", "rotate", "--json")) == {"expires": "2027-01-15T08:00:00.000000000Z"}


def test_members_are_completed_by_name_or_by_id_where_that_is_not_unique(answers: Answers) -> None:
    shell = ShellComplete(aspen, {}, "aspen", "_ASPEN_COMPLETE")

    def completed(word: str) -> list[str]:
        arguments = ["--state-dir", answers.directory, "member", "remove"]
        return [item.value for item in shell.get_completions(arguments, word)]

    assert completed("") == ["db1", "db2", "33", "34"]
    assert completed("db") == ["db1", "db2"]


def test_without_a_daemon_it_says_how_to_start_one() -> None:
    with short_directory() as directory:
        result = CliRunner().invoke(aspen, ["--state-dir", str(directory), "member", "list"])
        assert result.exit_code == UNREACHABLE
        assert "aspen status" in result.output


COMMANDS = """
    init, join, ticket create, ticket list, ticket revoke, member list, member promote, member demote,
    member remove, leader transfer, ca rotate
"""


@pytest.mark.parametrize("name", [name.strip() for name in COMMANDS.split(",")])
def test_every_command_teaches(name: str) -> None:
    result = CliRunner().invoke(aspen, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert "Exit codes:" in result.output
    assert "--json" in result.output
