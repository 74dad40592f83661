"""cluster/: files that are made when they are opened."""

import json
import os
import stat
from typing import Any

import pytest
import trio

from aspenfs import errors
from aspenfs.views.cluster import ClusterTree, as_text, health, members, metrics
from tests.views.subject import ROOT, Mounted, whole

STATUS: dict[str, Any] = {
    "cluster": "demo",
    "leader": "node-1",
    "revision": 42,
    "health": {"ok": True},
    "members": [{"name": "node-1", "address": "10.0.0.1:7000", "state": "leader"},
                {"name": "n2", "address": None, "state": "learner"}],
    "events": [{"time": "2026-11-25T14:00:00Z", "text": "node-1 leads, term 3"}],
    "metrics": {"aspen_revision": {"help": "Newest revision\napplied", "type": "counter", "value": 42},
                "aspen_up": True},
}


def test_each_file_says_its_part() -> None:
    async def main() -> None:
        at = Mounted(ClusterTree(lambda: STATUS, 7))
        assert await at.names() == [b"events", b"health", b"leader", b"members", b"metrics", b"revision",
                                    b"status", b"status.json"]
        assert await at.read(b"events") == b"2026-11-25T14:00:00Z  node-1 leads, term 3\n"
        assert await at.read(b"leader") == b"node-1\n"
        assert await at.read(b"revision") == b"42\n"
        assert await at.read(b"health") == b"ok\n"
        assert json.loads(await at.read(b"status.json")) == STATUS
        assert b"cluster: demo\n" in await at.read(b"status")

    trio.run(main)


def test_files_have_size_0_and_are_read_past_the_page_cache() -> None:
    async def main() -> None:
        at = Mounted(ClusterTree(lambda: STATUS, 7))
        attr = await at.stat(b"status")
        assert (attr.size, attr.mode) == (0, stat.S_IFREG | 0o444)
        file = await at.open(b"status", os.O_RDONLY)
        assert file.direct_io

    trio.run(main)


def test_content_is_fixed_while_a_file_is_open() -> None:
    async def main() -> None:
        status = {"revision": 1}
        at = Mounted(ClusterTree(lambda: status, 7))
        file = await at.open(b"revision", os.O_RDONLY)
        status["revision"] = 2
        assert await whole(file, 1) == b"1\n"
        assert await at.read(b"revision") == b"2\n"

    trio.run(main)


def test_nothing_can_be_changed() -> None:
    async def main() -> None:
        at = Mounted(ClusterTree(lambda: STATUS, 7))
        for change in (at.create(b"x"), at.mkdir(b"x"), at.unlink(b"leader"), at.rename(b"leader", b"x"),
                       at.symlink(b"t", b"x"), at.open(b"leader", os.O_WRONLY)):
            with pytest.raises(errors.ReadOnly):
                await change
        with pytest.raises(errors.NotFound):
            await at.stat(b"nothing")
        with pytest.raises(errors.NotADirectory):
            await at.stat(b"leader/x")
        with pytest.raises(errors.IsADirectory):
            await at.tree.open(at.tree.root, os.O_RDONLY, ROOT)

    trio.run(main)


def test_text_is_for_people() -> None:
    assert as_text(STATUS) == (
        "cluster: demo\n"
        "leader: node-1\n"
        "revision: 42\n"
        "health:\n"
        "  ok: yes\n"
        "members:\n"
        "  name node-1, address 10.0.0.1:7000, state leader\n"
        "  name n2, address -, state learner\n"
    )
    assert members(STATUS) == (
        "name    address        state\n"
        "node-1  10.0.0.1:7000  leader\n"
        "n2      -              learner\n"
    )
    assert health({"health": {"ok": False, "cause": "no quorum", "advice": "start n2"}}) == (
        "not ok\ncause: no quorum\nadvice: start n2\n")


def test_metrics_are_prometheus_text() -> None:
    assert metrics(STATUS) == (
        "# HELP aspen_revision Newest revision\\napplied\n"
        "# TYPE aspen_revision counter\n"
        "aspen_revision 42\n"
        "aspen_up 1.0\n"
    )


def test_files_know_what_to_say_of_an_empty_status() -> None:
    async def main() -> None:
        at = Mounted(ClusterTree(dict, 7))
        texts = [await at.read(name) for name in await at.names()]
        assert texts == [b"", b"unknown\n", b"-\n", b"", b"", b"0\n", b"", b"{}\n"]

    trio.run(main)
