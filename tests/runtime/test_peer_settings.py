"""`peer.json`, and what is guessed where nobody said."""

import json
from pathlib import Path

import pytest

from aspenfs import errors
from aspenfs.runtime import peer_settings
from aspenfs.runtime.peer_settings import PeerSettings, decide, effective

SAID = PeerSettings("db1", "192.0.2.7:7421", ("db1.example.net:7421", "[2001:db8::7]:7420"))


def test_what_is_written_is_read_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    assert peer_settings.read(tmp_path) is None
    peer_settings.write(tmp_path, SAID)
    assert peer_settings.read(tmp_path) == SAID
    assert (tmp_path / "peer.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        json.dumps({"format": 1, "name": "a", "listen": "x:y:z", "advertise": ["a:1"]}),
        json.dumps({"format": 1, "name": "a", "listen": "*:1", "advertise": []}),
        json.dumps({"format": 1, "name": "a", "listen": "*:1", "advertise": 7}),
        json.dumps({"format": 1, "name": 7, "listen": "*:1", "advertise": ["a:1"]}),
        json.dumps({"format": 2, "name": "a", "listen": "*:1", "advertise": ["a:1"]}),
    ],
)
def test_what_is_no_settings_is_refused_with_the_name_of_the_file(tmp_path: Path, body: str) -> None:
    (tmp_path / "peer.json").write_text(body)
    with pytest.raises(errors.Corrupt, match=r"peer\.json"):
        peer_settings.read(tmp_path)


def test_who_listens_at_one_address_advertises_it() -> None:
    assert decide("a", "192.0.2.7:9").advertise == ("192.0.2.7:9",)
    assert decide("a", "db1.example.net").advertise == ("db1.example.net:7420",)


def test_who_listens_everywhere_advertises_what_others_may_reach() -> None:
    settings = decide("a")
    assert settings.listen == "*:7420"
    assert settings.advertise
    assert all(address.endswith(":7420") and "*" not in address for address in settings.advertise)


def test_a_port_that_is_chosen_later_cannot_be_guessed() -> None:
    with pytest.raises(errors.InvalidArgument, match="--advertise"):
        decide("a", "*:0")
    assert decide("a", "*:0", ["192.0.2.7:9"]).advertise == ("192.0.2.7:9",)


@pytest.mark.parametrize("name", ["a b", "7", "x" * 65, "a\nb"])
def test_names_that_could_be_mistaken_are_refused(name: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="node name"):
        decide(name, "192.0.2.7:9")


def test_mount_options_override_the_file(tmp_path: Path) -> None:
    assert effective(tmp_path, None, ()) is None
    fresh = effective(tmp_path, "192.0.2.9:1", ())
    assert fresh is not None
    assert fresh[1:] == ("192.0.2.9:1", ("192.0.2.9:1",))
    peer_settings.write(tmp_path, SAID)
    assert effective(tmp_path, None, ()) == SAID
    assert effective(tmp_path, None, ["x:1"]) == SAID._replace(advertise=("x:1",))
    # Who listens elsewhere is not found where it was.
    assert effective(tmp_path, "192.0.2.9:1", ()) == ("db1", "192.0.2.9:1", ("192.0.2.9:1",))
    assert effective(tmp_path, "*:1", ["x:1"]) == ("db1", "*:1", ("x:1",))
