"""The suite that every Store passes.

A test class derives from `Conformance` and gives `open`; `tests/kv/test_local.py` shows how. Cases use
nothing but the Store port: no revision is assumed to be a given number, keys of `c/` may be there from
the start, and an entry of the store's own may come in between.
"""

from tests.kv.cases_lease import CommitCases, LeaseCases, OnceCases
from tests.kv.cases_read import ReadCases
from tests.kv.cases_txn import TxnCases
from tests.kv.cases_watch import WatchCases
from tests.kv.subject import FakeClock, FakeEntropy, Subject

__all__ = ["Conformance", "FakeClock", "FakeEntropy", "Subject"]


class Conformance(TxnCases, ReadCases, WatchCases, LeaseCases, OnceCases, CommitCases):
    """All cases. Abstract: see `open`."""
