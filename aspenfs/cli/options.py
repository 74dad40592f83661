"""What a mount was asked to be: NAME[:/subtree], and the options after -o, read strictly.

Belongs here: every option that `mount.aspen` knows, with its meaning and its default. Not here:
whether the machine can do it (`mount.py`), what the daemon makes of it (`daemon.py`).

An option that is not known is an error that names it: a mistyped `nosuid` must never mount with suid.
Of an option given twice, or together with its opposite, the last one counts, as in mount(8).
"""

import dataclasses
import difflib
import grp
import json
import os
import pwd
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, get_args

from aspenfs import errors
from aspenfs.cli.paths import state_directory

Atime = Literal["relatime", "noatime"]
Consistency = Literal["open", "strict", "stale"]
LogLevel = Literal["debug", "info", "warning", "error"]

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
TIMEOUT_S_MAX = 3600.0  # longer would outlive any patience with a stale name
SPIN_US_MAX = 10_000  # longer would starve the timers of the same loop
ID_MAX = 2**32 - 2  # (uid_t)-1 means "leave as it is" to chown(2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """One mount. `default_permissions` is not among them: the kernel always checks modes."""

    name: str  # of the cluster
    subtree: str  # what of it becomes the root of the mount: "/", "/files", "/files/a b"
    mountpoint: str  # absolute
    state_dir: str  # absolute
    allow_other: bool  # users other than the one who mounts may enter
    create: bool = False  # a state directory that holds no cluster gets a new one of one node
    foreground: bool = False
    read_only: bool = False
    acl: bool = False  # POSIX access control lists
    sync: bool = False  # every change waits until it is committed
    dev: bool = False
    suid: bool = False
    exec: bool = True
    atime: Atime = "relatime"
    uid: int | None = None  # everything seems to be owned by this user
    gid: int | None = None
    umask: int | None = None  # mode bits that nothing seems to have
    consistency: Consistency = "open"
    attr_timeout_s: float | None = None  # None: each tree's own
    entry_timeout_s: float | None = None
    spin_us: int | None = None  # how long to poll before sleeping; None: the daemon's own
    metrics: str | None = None  # HOST:PORT of a loopback address that serves them over HTTP
    log_level: LogLevel = "info"
    listen: str | None = None  # HOST:PORT for other nodes; None: what the state directory says
    advertise: tuple[str, ...] = ()  # HOST:PORT at which they find this node; (): so too
    fsname: str  # the first column of df(1); NAME[:/subtree] unless chosen

    def at(self, mountpoint: str) -> Self:
        """The same, with the mountpoint as resolved."""
        return dataclasses.replace(self, mountpoint=mountpoint)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        return cls(**{**fields, "advertise": tuple(fields["advertise"])})

    def fuse_options(self) -> set[str]:
        """What libfuse is told; the rest is the daemon's own business.

        `sync` is not among them: the kernel's MS_SYNCHRONOUS would only add a round trip to a
        write that already waits.
        """
        options = {
            f"fsname={self.fsname}",
            "subtype=aspen",
            "default_permissions",
            "ro" if self.read_only else "rw",
            "dev" if self.dev else "nodev",
            "suid" if self.suid else "nosuid",
            "exec" if self.exec else "noexec",
        }
        if self.atime == "noatime":
            options.add("noatime")
        if self.allow_other:
            options.add("allow_other")
        return options


def parse_mount(
    spec: str,
    mountpoint: str,
    option_lists: Sequence[str],
    *,
    environ: Mapping[str, str],
    uid: int,
    foreground: bool = False,
    sloppy: bool = False,
) -> MountOptions:
    """A mount as the command line of user `uid` words it; `option_lists` are the arguments of each -o.

    With `sloppy` (mount -s) unknown options are passed over. InvalidArgument says what is wrong, and
    with what.
    """
    name, subtree = parse_spec(spec)
    values: dict[str, Any] = {"allow_other": uid == 0, "foreground": foreground}
    unknown: list[str] = []
    for option in split_options(option_lists):
        key, has_value, text = option.partition("=")
        if key in _DROPPED or key.startswith(("x-", "X-")):
            continue
        if key in _SWITCHES:
            if has_value:
                raise errors.InvalidArgument(f"option {key} takes no value, but there is {text!r}")
            field, value = _SWITCHES[key]
            values[field] = value
        elif key in _VALUES:
            if not text:
                raise errors.InvalidArgument(f"option {key} needs a value: {key}=…")
            field, reader = _VALUES[key]
            value = reader(key, text)
            values[field] = (*values.get(field, ()), value) if field in _LISTS else value
        elif key in _REFUSED:
            raise errors.InvalidArgument(f"option {key}: {_REFUSED[key]}")
        else:
            unknown.append(key)
    if unknown and not sloppy:
        raise errors.InvalidArgument("; ".join(map(_unknown, unknown)))
    values.setdefault("fsname", name if subtree == "/" else f"{name}:{subtree}")
    values["state_dir"] = str(state_directory(environ, uid, values.get("state_dir")).path)
    return MountOptions(name=name, subtree=subtree, mountpoint=mountpoint, **values)


def parse_spec(spec: str) -> tuple[str, str]:
    """NAME[:/subtree] as (name, subtree); the subtree is normal: one slash between, none at the end."""
    name, has_subtree, path = spec.partition(":")
    if not NAME_PATTERN.fullmatch(name):
        raise errors.InvalidArgument(
            f"{spec!r}: a cluster's name is 1 to 63 letters, digits, dots, hyphens and underscores, "
            "the first a letter or digit; write NAME or NAME:/subtree"
        )
    if has_subtree and not path.startswith("/"):
        raise errors.InvalidArgument(f"{spec!r}: the subtree starts with a slash: {name}:/{path}")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise errors.InvalidArgument(f"{spec!r}: '..' has no place in a subtree")
    return name, "/" + "/".join(parts)


def split_options(option_lists: Iterable[str]) -> Iterator[str]:
    """The single options of all -o arguments, in order; empty ones are passed over."""
    for option_list in option_lists:
        yield from filter(None, (option.strip() for option in option_list.split(",")))


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, [*_SWITCHES, *_VALUES], n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"unknown option {key!r}{hint}"


def _choice(choices: tuple[str, ...]) -> Callable[[str, str], str]:
    def read(key: str, text: str) -> str:
        if text not in choices:
            raise errors.InvalidArgument(f"option {key} is one of {', '.join(choices)}; not {text!r}")
        return text

    return read


def _seconds(key: str, text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) <= TIMEOUT_S_MAX:
        return float(text)
    raise errors.InvalidArgument(f"option {key} is in seconds, 0 to {TIMEOUT_S_MAX:.0f}; not {text!r}")


def _microseconds(key: str, text: str) -> int:
    if re.fullmatch(r"\d{1,9}", text) and int(text) <= SPIN_US_MAX:
        return int(text)
    raise errors.InvalidArgument(f"option {key} is in microseconds, 0 to {SPIN_US_MAX}; not {text!r}")


def _mode_mask(key: str, text: str) -> int:
    if re.fullmatch(r"0*[0-7]{1,3}", text):
        return int(text, 8)
    raise errors.InvalidArgument(f"option {key} is octal, 0 to 777; not {text!r}")


def _user(key: str, text: str) -> int:
    return _id(key, text, lambda name: pwd.getpwnam(name).pw_uid)


def _group(key: str, text: str) -> int:
    return _id(key, text, lambda name: grp.getgrnam(name).gr_gid)


def _id(key: str, text: str, by_name: Callable[[str], int]) -> int:
    if re.fullmatch(r"\d{1,10}", text):
        if int(text) <= ID_MAX:
            return int(text)
        raise errors.InvalidArgument(f"option {key}: {text} is above {ID_MAX}")
    try:
        return by_name(text)
    except KeyError:
        raise errors.InvalidArgument(f"option {key}: this machine knows no {text!r}") from None


def _absolute(key: str, text: str) -> str:
    if not os.path.isabs(text):
        raise errors.InvalidArgument(f"option {key} is an absolute path; not {text!r}")
    return os.path.normpath(text)


def _address(key: str, text: str) -> str:
    from aspenfs.runtime.peers import addresses  # here: it brings trio, which most mounts need not wait for

    try:
        return str(addresses.parse(text, listen=key == "listen"))
    except errors.InvalidArgument as error:
        raise errors.InvalidArgument(f"option {key}: {error}") from None


def _metrics(key: str, text: str) -> str:
    from aspenfs.runtime import metrics  # here, as above

    try:
        return metrics.check(text)
    except errors.InvalidArgument as error:
        raise errors.InvalidArgument(f"option {key}: {error}") from None


def _plain(key: str, text: str) -> str:
    """Text that needs no quoting in libfuse's options and in /proc/mounts."""
    if not text.isprintable() or "\\" in text or " " in text:
        raise errors.InvalidArgument(f"option {key} is without spaces and backslashes; not {text!r}")
    return text


# Words without a value: the field that each sets, and to what.
_SWITCHES: dict[str, tuple[str, object]] = {
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "sync": ("sync", True),
    "async": ("sync", False),
    "dev": ("dev", True),
    "nodev": ("dev", False),
    "suid": ("suid", True),
    "nosuid": ("suid", False),
    "exec": ("exec", True),
    "noexec": ("exec", False),
    "atime": ("atime", "relatime"),  # the kernel's own meaning of it
    "relatime": ("atime", "relatime"),
    "noatime": ("atime", "noatime"),
    "allow_other": ("allow_other", True),
    "noallow_other": ("allow_other", False),
    # mount(8) before util-linux 2.39 keeps dev and suid to itself, as the defaults that they are there.
    "allow_dev": ("dev", True),
    "allow_suid": ("suid", True),
    "acl": ("acl", True),
    "noacl": ("acl", False),
    "create": ("create", True),
}

_VALUES: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "uid": ("uid", _user),
    "gid": ("gid", _group),
    "umask": ("umask", _mode_mask),
    "consistency": ("consistency", _choice(get_args(Consistency))),
    "attr_timeout": ("attr_timeout_s", _seconds),
    "entry_timeout": ("entry_timeout_s", _seconds),
    "spin_us": ("spin_us", _microseconds),
    "state_dir": ("state_dir", _absolute),
    "log_level": ("log_level", _choice(get_args(LogLevel))),
    "fsname": ("fsname", _plain),
    "listen": ("listen", _address),
    "advertise": ("advertise", _address),
    "metrics": ("metrics", _metrics),
}
_LISTS = frozenset({"advertise"})  # of these each one counts, not the last

# Meant for mount(8), fstab(5) and systemd, which hand some of them on to us; or always so.
# fmt: off
_DROPPED = frozenset({
    "_netdev", "nofail", "user", "users", "nouser", "owner", "noowner", "group", "nogroup", "noauto", "auto",
    "defaults", "comment", "default_permissions",
})
# fmt: on

_REFUSED = {
    "remount": "a mount cannot be changed while it is there; umount it and mount it again",
    "strictatime": "each read would be a write of the cluster; relatime and noatime are there",
    "allow_root": "allow_other is there, with the permissions checked by the kernel",
}
