"""New files on the host whose node leads: open before they are committed, and nobody is wronged by it."""

import contextlib
import errno
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from tests.mount.cluster.test_coherence import at_once, holding, python
from tests.mount.clusters import Cluster, Node

pytestmark = pytest.mark.mount
EARLY_S = 2.0  # open(2) returned, and others could not have answered
ATTEMPTS = 5  # at something that must happen while a lease lasts, on a busy machine
ROUNDS = 150  # of races for a name
RACES_S = 60.0


@pytest.fixture
def leader(cluster: Cluster) -> Node:
    """A node that leads and was never alone: its kernel asks at each close."""
    found = cluster.wait_leader()
    return found if found.number != 1 else lead(cluster, cluster[2])


def lead(cluster: Cluster, node: Node) -> Node:
    """Makes the node the leader."""
    for _ in range(20):
        if cluster.wait_leader() is node:
            return node
        node.aspen("leader", "transfer", f"n{node.number}", check=False)  # it may have to catch up first
        time.sleep(0.2)
    raise AssertionError("leadership does not move")


def test_others_see_a_file_that_is_open_and_not_closed(cluster: Cluster, leader: Node) -> None:
    other = next(node for node in cluster if node is not leader)
    opening = """
def steps():
    for n in range(40):
        file = os.open(f'open-{n}', os.O_CREAT | os.O_WRONLY)
        yield n
        os.close(file)
"""
    looking = """
def steps():
    for n in range(40):
        yield os.stat(f'open-{n}').st_nlink
"""
    with holding(leader, opening) as opened, holding(other, looking) as looked:
        for number in range(40):
            assert opened() == str(number)
            assert looked() == "1"


def test_open_returns_before_others_answer_and_close_does_not(cluster: Cluster, leader: Node) -> None:
    others = [node for node in cluster if node is not leader]
    script = """
def steps():
    open('before-early', 'w').close()  # a mount's first file waits: numbers for its inodes are a commit
    os.listdir('.')  # a read keeps the leader's lease
    yield 'ready'
    file = os.open('early', os.O_CREAT | os.O_WRONLY)
    yield 'opened'
    os.write(file, b'whole')
    os.close(file)
    yield 'closed'
"""
    for _ in range(ATTEMPTS):
        lead(cluster, leader)
        with holding(leader, script) as step, ThreadPoolExecutor(1) as one_by_one:
            assert step() == "ready"
            for node in others:
                node.pause()
            try:
                opening, closing = one_by_one.submit(step), one_by_one.submit(step)
                early = bool(wait([opening], EARLY_S).done)
                if early:
                    assert not wait([closing], EARLY_S).done
            finally:
                for node in others:
                    node.resume()
            assert (opening.result(), closing.result()) == ("opened", "closed")
        leader.sh(f"rm {leader.mountpoint}/files/early")
        if early:
            return
    raise AssertionError("open(2) always waited for the others")


def test_hosts_that_make_the_same_files_both_succeed(cluster: Cluster, leader: Node) -> None:
    script = """
for n in range(60):
    with open(f'both-{n}', 'wb') as file:
        file.write(sys.argv[1].encode() * 100)
print('ok')
"""
    done = at_once(*(lambda node=node: python(node, script, str(node.number)) for node in cluster))
    assert [out.split() for out in done] == [["ok"]] * len(cluster)
    reading = "print([open(f'both-{n}', 'rb').read() for n in range(60)])"
    contents = {python(node, reading) for node in cluster}
    assert len(contents) == 1
    for data in eval(contents.pop()):
        assert data in {str(node.number).encode() * 100 for node in cluster}


def test_if_another_host_makes_the_name_meanwhile_close_says_so(cluster: Cluster, leader: Node) -> None:
    other = next(node for node in cluster if node is not leader)
    script = """
def steps():
    n = 0
    open('before-mine', 'w').close()  # a mount's first file waits: numbers for its inodes are a commit
    while True:
        os.listdir('.')
        yield 'ready'
        file = os.open(f'mine-{n}', os.O_CREAT | os.O_WRONLY)
        os.write(file, b'mine')
        yield 'opened'
        try:
            os.close(file)
            yield 0
        except OSError as error:
            yield error.errno
        n += 1
"""
    with holding(leader, script) as step, ThreadPoolExecutor(1) as pool:
        for attempt in range(ATTEMPTS):
            lead(cluster, leader)
            assert step() == "ready"
            cluster.isolate(leader)
            try:
                opening = pool.submit(step)
                early = bool(wait([opening], EARLY_S).done)
                if early:
                    cluster.wait_leader(but=leader)
                    python(other, f"open('mine-{attempt}', 'w').write('theirs')")
            finally:
                cluster.mend()
            assert opening.result() == "opened"
            cluster.wait_usable(30)
            told = int(step())
            if early:
                assert told in (errno.ESTALE, errno.ETIMEDOUT)
                content = f"print(open('mine-{attempt}').read())"
                assert {python(node, content).strip() for node in cluster} == {"theirs"}
                return
            assert told in (0, errno.ESTALE, errno.ETIMEDOUT)
    raise AssertionError("open(2) always waited for the others")


def test_many_processes_make_files_in_one_directory_and_all_hosts_have_them(
    cluster: Cluster, leader: Node
) -> None:
    leader.sh(f"mkdir {leader.mountpoint}/files/crowd")
    script = f"""
import os, sys
for n in range(50):
    with open(f'{leader.mountpoint}/files/crowd/{{sys.argv[1]}}-{{n}}', 'w') as file:
        file.write(sys.argv[1] * n)
"""
    place = leader.network.place(leader.number)
    processes = [subprocess.Popen([*place, sys.executable, "-c", script, str(k)], cwd="/") for k in range(8)]
    assert [process.wait(timeout=90) for process in processes] == [0] * 8
    sizes = "print(sorted((name, os.stat('crowd/' + name).st_size) for name in os.listdir('crowd')))"
    expected = str(sorted((f"{k}-{n}", n) for k in range(8) for n in range(50)))
    assert {python(node, sizes).strip() for node in cluster} == {expected}


@pytest.mark.parametrize("tree", ["files", "kv"])
def test_who_loses_a_race_for_a_name_opens_only_what_it_may(
    cluster: Cluster, leader: Node, tree: str
) -> None:
    """The kernel that has sent CREATE believes that the file is the caller's own, and checks nothing."""
    other = next(node for node in cluster if node is not leader)
    leader.sh(f"mkdir {leader.mountpoint}/{tree}/whose && chmod 1777 {leader.mountpoint}/{tree}/whose")
    users = {leader: 0, other: 1000}
    script = """
import time
def steps():
    user = {user}
    os.chdir('../{tree}')
    if user:
        os.setgid(user)
        os.setuid(user)
    yield 'ready'
    n = 0
    while True:
        # Both have been told at once. The user is 4 ms early at the most, or late; later on it may be more.
        early = (n % 5 - 2) / 500 if user else 0
        time.sleep((0.004 - early) * (1 + n // {rounds}))
        try:
            file = os.open(f'whose/{{n}}', os.O_CREAT | os.O_RDWR, 0o600)
            found = 'own' if os.fstat(file).st_uid == user else 'other'
            os.close(file)
        except PermissionError:
            found = 'refused'
        n += 1
        yield found
"""
    with contextlib.ExitStack() as stack:
        steps = [
            stack.enter_context(holding(node, script.format(user=user, tree=tree, rounds=ROUNDS)))
            for node, user in users.items()
        ]
        assert at_once(*steps) == ["ready", "ready"]
        found: Counter[tuple[str, str]] = Counter()
        end = time.monotonic() + RACES_S
        while found.total() < ROUNDS or {user for _, user in found} != {"own", "refused"}:
            root, user = at_once(*steps)
            found[root, user] += 1
            assert root in ("own", "other")
            assert user in ("own", "refused")
            assert time.monotonic() < end, f"both were never at it at once: {found}"
