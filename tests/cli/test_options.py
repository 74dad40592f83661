"""How `mount.aspen` reads a mount: the spec, the options after -o, where the state is."""

import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.cli.options import MountOptions, parse_mount, parse_spec
from aspenfs.cli.paths import SOCKET_PATH_BYTES_MAX, state_directory


def parse(*option_lists: str, spec: str = "demo", uid: int = 0, sloppy: bool = False) -> MountOptions:
    environ = {"HOME": "/home/ann"}
    return parse_mount(spec, "/mnt/aspen", option_lists, environ=environ, uid=uid, sloppy=sloppy)


def test_defaults_are_safe() -> None:
    options = parse()
    assert not options.dev
    assert not options.suid
    assert not options.create
    assert not options.sync
    assert not options.read_only
    assert options.exec
    assert options.atime == "relatime"
    assert options.consistency == "open"
    assert (options.uid, options.gid, options.umask) == (None, None, None)


def test_root_shares_its_mount_with_others_and_a_user_does_not() -> None:
    assert parse(uid=0).allow_other
    assert not parse(uid=1000).allow_other
    assert parse("allow_other", uid=1000).allow_other
    assert not parse("noallow_other", uid=0).allow_other


@pytest.mark.parametrize(
    ("spec", "name", "subtree"),
    [
        ("demo", "demo", "/"),
        ("demo:/", "demo", "/"),
        ("demo:/files", "demo", "/files"),
        ("demo://files/./a b//", "demo", "/files/a b"),
        ("d-1.x_y:/kv/ä", "d-1.x_y", "/kv/ä"),
    ],
)
def test_spec_is_a_name_and_a_normal_subtree(spec: str, name: str, subtree: str) -> None:
    assert parse_spec(spec) == (name, subtree)


@pytest.mark.parametrize(
    "spec",
    ["", ":/files", "demo:files", "demo:", "a,b:/", "../x", "demo:/a/../b", "n" * 64, "-o", "de mo", "é"],
)
def test_bad_spec_is_refused_by_name(spec: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        parse_spec(spec)
    assert repr(spec) in str(caught.value)


def test_unknown_options_are_refused_all_at_once_with_near_matches() -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        parse("ro,nosiud,consistancy=open,zzz")
    text = str(caught.value)
    assert "unknown option 'nosiud' (did you mean nosuid" in text
    assert "unknown option 'consistancy' (did you mean consistency?)" in text
    assert "unknown option 'zzz'" in text
    assert "'ro'" not in text


def test_sloppy_passes_over_unknown_options_but_not_over_bad_values() -> None:
    assert parse("zzz,ro", sloppy=True).read_only
    with pytest.raises(errors.InvalidArgument):
        parse("umask=9", sloppy=True)


def test_options_meant_for_mount_fstab_and_systemd_are_dropped() -> None:
    dropped = "_netdev,nofail,user,user=ann,users,noauto,auto,defaults,x-systemd.automount,X-a=b,comment=c,rw"
    assert parse(dropped) == parse()


def test_default_permissions_is_always_on() -> None:
    assert "default_permissions" in parse().fuse_options()
    assert parse("default_permissions") == parse()


@pytest.mark.parametrize("word", ["remount", "strictatime", "allow_root"])
def test_options_that_cannot_be_had_are_refused_with_a_reason(word: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"^option {word}: "):
        parse(word)


def test_last_of_opposite_options_counts() -> None:
    assert not parse("ro,rw").read_only
    assert parse("rw", "ro").read_only
    assert not parse("suid,nosuid").suid
    assert parse("noatime,relatime").atime == "relatime"
    assert parse("umask=022,umask=077").umask == 0o077


def test_values_are_read_in_their_units() -> None:
    options = parse(
        "uid=12,gid=34,umask=0027,attr_timeout=0.5,entry_timeout=3,spin_us=50,consistency=strict,"
        "state_dir=/srv//state/,log_level=debug,fsname=shop"
    )
    assert (options.uid, options.gid, options.umask) == (12, 34, 0o27)
    assert (options.attr_timeout_s, options.entry_timeout_s, options.spin_us) == (0.5, 3.0, 50)
    assert (options.consistency, options.log_level) == ("strict", "debug")
    assert (options.state_dir, options.fsname) == ("/srv/state", "shop")


def test_addresses_get_their_port_and_each_advertised_one_counts() -> None:
    assert (parse().listen, parse().advertise) == (None, ())
    options = parse("listen=*,advertise=db1.example.net,advertise=[2001:db8::1]:7", "listen=192.0.2.7:0")
    assert options.listen == "192.0.2.7:0"
    assert options.advertise == ("db1.example.net:7420", "[2001:db8::1]:7")


def test_uid_may_be_a_name() -> None:
    somebody = pwd.getpwall()[-1]
    assert parse(f"uid={somebody.pw_name}").uid == somebody.pw_uid


@pytest.mark.parametrize(
    "option",
    [
        "umask=8",
        "umask=1777",
        "umask=-1",
        "umask=",
        "umask",
        "uid=no such user",
        "uid=4294967295",  # chown(2) reads it as "leave as it is"
        "gid=-1",
        "attr_timeout=-1",
        "attr_timeout=nan",
        "attr_timeout=1e3",
        "entry_timeout=3601",
        "spin_us=10001",
        "spin_us=0.5",
        "consistency=lease",
        "consistency=",
        "log_level=loud",
        "state_dir=here",
        "listen=host:port",
        "advertise=*:7420",  # nobody can connect to every address
        "advertise=",
        "fsname=a b",
        "ro=1",
        "sync=",
    ],
)
def test_bad_value_is_refused_with_the_option_named(option: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"^option {option.partition('=')[0]}\\b"):
        parse(option)


def test_empty_options_are_passed_over() -> None:
    assert parse(",ro,,", "", " sync ") == parse("ro,sync")


def test_fsname_is_the_spec_unless_chosen() -> None:
    assert parse(spec="demo").fsname == "demo"
    assert parse(spec="demo://files").fsname == "demo:/files"
    assert "fsname=shop" in parse("fsname=shop").fuse_options()


def test_kernel_is_told_of_flags_that_it_enforces() -> None:
    strictly = parse("ro,nodev,nosuid,noexec,noatime").fuse_options()
    assert {"ro", "nodev", "nosuid", "noexec", "noatime", "subtype=aspen", "allow_other"} <= strictly
    freely = parse("rw,dev,suid,exec,noallow_other").fuse_options()
    assert {"rw", "dev", "suid", "exec"} <= freely
    assert not {"allow_other", "noatime"} & freely


def test_dev_and_suid_have_names_that_old_mount_programs_hand_on() -> None:
    assert parse("allow_dev,allow_suid") == parse("dev,suid")


@given(
    st.builds(
        MountOptions,
        name=st.just("demo"),
        subtree=st.text(max_size=20),
        mountpoint=st.text(max_size=20),
        state_dir=st.text(max_size=20),
        allow_other=st.booleans(),
        fsname=st.text(max_size=9),
        umask=st.none() | st.integers(0, 0o777),
        attr_timeout_s=st.none() | st.floats(0, 3600),
        advertise=st.lists(st.text(max_size=9)).map(tuple),
    )
)
def test_json_carries_the_options_unchanged(options: MountOptions) -> None:
    assert MountOptions.from_json(options.to_json()) == options


def test_json_carries_a_mountpoint_that_is_not_utf8() -> None:
    odd = parse().at(os.fsdecode(b"/mnt/\xff"))
    assert os.fsencode(MountOptions.from_json(odd.to_json()).mountpoint) == b"/mnt/\xff"


# --- where the state is ---


def test_state_of_root_is_in_var_lib() -> None:
    assert state_directory({"XDG_STATE_HOME": "/xdg"}, 0).path == Path("/var/lib/aspenfs")


def test_state_of_a_user_follows_xdg() -> None:
    assert state_directory({"HOME": "/home/ann"}, 1000).path == Path("/home/ann/.local/state/aspenfs")
    assert state_directory({"HOME": "/home/ann", "XDG_STATE_HOME": "/xdg"}, 1000).path == Path("/xdg/aspenfs")
    relative = {"HOME": "/home/ann", "XDG_STATE_HOME": "xdg"}
    assert state_directory(relative, 1000).path == Path("/home/ann/.local/state/aspenfs")


def test_variable_overrides_the_usual_place_and_the_option_overrides_the_variable() -> None:
    environ = {"ASPEN_STATE_DIR": "/srv/a"}
    assert state_directory(environ, 0).path == Path("/srv/a")
    assert state_directory(environ, 1000, "/srv/b").path == Path("/srv/b")
    assert state_directory({"ASPEN_STATE_DIR": ""}, 0).path == Path("/var/lib/aspenfs")


def test_no_place_for_the_state_is_an_error_unless_one_is_named() -> None:
    with pytest.raises(errors.InvalidArgument, match="HOME"):
        state_directory({}, 1000)
    assert state_directory({}, 1000, "/srv/b").path == Path("/srv/b")


def test_state_directory_must_be_absolute() -> None:
    with pytest.raises(errors.InvalidArgument, match="absolute"):
        state_directory({"ASPEN_STATE_DIR": "state"}, 0)


def test_state_directory_leaves_room_for_its_control_socket() -> None:
    longest = "/" + "s" * (SOCKET_PATH_BYTES_MAX - len("//ctl.sock"))
    assert len(bytes(state_directory({}, 0, longest).control_socket)) == SOCKET_PATH_BYTES_MAX
    with pytest.raises(errors.InvalidArgument, match="too long"):
        state_directory({}, 0, longest + "s")
