"""The simulator itself: one seed is one course of events, faults can be left out, failures shrink."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aspenfs.sim.faults import KINDS, Swarm
from aspenfs.sim.sabotage import SABOTAGES, adjusted
from aspenfs.sim.scheduler import MS
from aspenfs.sim.simulation import Plan, describe, plan, run, shrink

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(600)  # up to a quarter of a minute of one core


def everything(seed: int, steps: int = 3_000) -> Plan:
    """A run with every kind of fault."""
    return replace(plan(seed, steps, 3), swarm=Swarm(KINDS, 200 * MS))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_seed_is_the_same_course_of_events(seed: int) -> None:
    first, again = run(everything(seed)), run(everything(seed))
    assert first == again
    assert first.transcript != run(everything(seed + 10)).transcript


def test_transcript_does_not_depend_on_whether_it_is_written() -> None:
    lines: list[str] = []
    written = run(everything(4), lines.append)
    assert written == run(everything(4))
    assert any("VOTE" in line for line in lines)
    assert any("fault" in line for line in lines)


def test_course_of_events_does_not_depend_on_hashes() -> None:
    program = (
        "import logging; logging.disable(logging.CRITICAL)\n"
        "from tests.sim.test_simulation import everything\n"
        "from aspenfs.sim.simulation import run\n"
        "print([run(everything(seed, 1500)).transcript for seed in (5, 6, 7)])"
    )
    outputs = set()
    for seed in ("0", "1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, timeout=500,
                              capture_output=True, text=True, check=True)  # fmt: skip
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert outputs.pop().count("'") == 6


def test_fault_that_is_left_out_does_not_happen_and_moves_no_other() -> None:
    whole = run(everything(8))
    number = whole.faults[2][0]
    less = run(replace(everything(8), left_out=frozenset({number})))
    assert number not in [one for one, _ in less.faults]
    assert less.faults[:2] == whole.faults[:2]


def test_failure_shrinks_to_few_faults() -> None:
    sabotage = SABOTAGES["lease-through-transfer"]
    with sabotage.applied():
        failing = next(
            chosen
            for seed in range(1, sabotage.seeds)
            if run(chosen := adjusted(plan(seed, sabotage.steps, 3), sabotage)).failed
        )
        before = run(failing)
        seen: list[int] = []
        small, after = shrink(failing, lambda left, runs: seen.append(left))
        assert run(small) == after
    assert after.check == before.check
    assert len(after.faults) < len(before.faults)
    assert any(words.startswith("transfer") for _, words in after.faults)
    assert seen == sorted(seen, reverse=True)


def test_plan_is_told_to_people() -> None:
    told = dict(describe(everything(9)))
    assert told["nodes"] == 3
    assert "blackout" in told["kinds of fault"]


def test_command_line_runs_a_seed_and_many(tmp_path: Path) -> None:
    def simulate(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(ROOT / "tools" / "simulate"), *options], timeout=500,
                              capture_output=True, text=True, check=False)  # fmt: skip

    transcript = tmp_path / "transcript"
    one = simulate("--seed", "3", "--steps", "800", "--transcript", str(transcript))
    assert one.returncode == 0, one.stdout + one.stderr
    assert "all promises kept" in one.stdout
    assert "leads in term" in transcript.read_text()
    many = simulate("--seeds", "3-5", "--steps", "500", "--json", str(tmp_path / "json"))
    assert many.returncode == 0, many.stdout + many.stderr
    assert '"runs": 3' in (tmp_path / "json").read_text()
    caught = simulate("--sabotage", "no-barrier")
    assert caught.returncode == 0, caught.stdout + caught.stderr
    assert "stale-read" in caught.stdout
