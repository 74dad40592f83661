# What tools/up, tools/down and tools/test share: messages, what must be installed, the Python environment.
# Sourced by them after TOOL and ROOT are set; bash.

VENV=$ROOT/.venv
DEBIAN_RUN=(
    # package       command that succeeds when it is there
    "fuse3          command -v fusermount3"
    "mount          command -v umount"
    "pkg-config     command -v pkg-config"
    "gcc            command -v gcc"
    "libc6-dev      test -e /usr/include/stdio.h"
    "libfuse3-dev   pkg-config --exists fuse3"
)
DEBIAN_DEV=(
    "attr           command -v setfattr"
    "acl            command -v setfacl"
    "git            command -v git"
    "sqlite3        command -v sqlite3"
    "rsync          command -v rsync"
    "make           command -v make"
    "iproute2       command -v ip"
)

say() { printf '%s: %s\n' "$TOOL" "$*"; }

# die CAUSE [NEXT-STEP [EXIT-CODE]]
die() {
    printf '%s: %s\n' "$TOOL" "$1" >&2
    if [ -n "${2:-}" ]; then printf '%s: next step: %s\n' "$TOOL" "$2" >&2; fi
    exit "${3:-1}"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "needs root for: $*" "run $TOOL as root, or install sudo"
    fi
}

# quietly COMMAND...: its output only if it fails.
quietly() {
    local output
    output=$(mktemp)
    if ! "$@" >"$output" 2>&1; then
        tail -n 40 "$output" >&2
        rm -f "$output"
        return 1
    fi
    rm -f "$output"
}

install_debian() {
    command -v apt-get >/dev/null ||
        die "missing here, and there is no apt-get: $*" "install what your system calls these, then run $TOOL again"
    say "installing Debian packages: $*"
    quietly as_root apt-get update || die "apt-get update failed" "mend the package sources (see above), then run $TOOL again"
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" ||
        die "apt-get cannot install: $*" "see above; install them by hand, then run $TOOL again"
}

# install_missing LINE...: lines as in DEBIAN_RUN.
install_missing() {
    local line package probe missing=()
    for line in "$@"; do
        read -r package probe <<<"$line"
        eval "$probe" >/dev/null 2>&1 || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then install_debian "${missing[@]}"; fi
}

# A Python that can make an environment and compile extensions: $PYTHON, else the first of the usual names. The system's
# comes first: distributions build theirs with profile-guided optimization, and one built without it costs the daemon an
# eighth of its speed (docs/performance.md).
find_python() {
    local candidate
    for candidate in ${PYTHON:-/usr/bin/python3 python3 python3.13 python3.12 python3.11}; do
        if "$candidate" - 2>/dev/null <<'END'
import ensurepip, os, sys, sysconfig
sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
END
        then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# The digest of all that the environment is made from; part is run or dev.
environment_digest() {
    local locks=(requirements-build.lock requirements.lock)
    if [ "$1" = dev ]; then locks+=(requirements-dev.lock); fi
    (cd "$ROOT" && { pwd; "$VENV/bin/python" -VV; cat pyproject.toml "${locks[@]}"; } | sha256sum)
}

pip_install() {
    quietly "$VENV/bin/python" -m pip install --disable-pip-version-check --no-deps "$@" ||
        die "pip could not install: $*" "see above; is the package index reachable (pip config list)?"
}

# set_up run|dev: everything that is missing, and nothing twice.
set_up() {
    local part=$1 python
    install_missing "${DEBIAN_RUN[@]}"
    if [ "$part" = dev ]; then install_missing "${DEBIAN_DEV[@]}"; fi
    # The checkout's own directory is the lock, so that two runs do not build one environment.
    exec {setup_lock}<"$ROOT"
    flock "$setup_lock"
    if ! "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$(find_python) || {
            install_debian python3 python3-venv python3-dev
            python=$(find_python)
        } || die "no Python 3.11 or newer with venv and headers" "name one: PYTHON=/path/to/python3 $TOOL"
        say "making the Python environment .venv with $python ($("$python" -V))"
        quietly "$python" -m venv --clear "$VENV" || die "cannot make $VENV" "see above"
    fi
    if [ "$(cat "$VENV/.run-digest" 2>/dev/null)" != "$(environment_digest run)" ]; then
        say "installing the locked Python packages into .venv"
        pip_install --require-hashes -r "$ROOT/requirements-build.lock"
        # The build tools are the locked ones too, not what an isolated build would fetch.
        pip_install --require-hashes --no-build-isolation -r "$ROOT/requirements.lock"
        pip_install --no-build-isolation --editable "$ROOT"
        environment_digest run >"$VENV/.run-digest"
    fi
    if [ "$part" = dev ] && [ "$(cat "$VENV/.dev-digest" 2>/dev/null)" != "$(environment_digest dev)" ]; then
        say "installing the locked test tools into .venv"
        pip_install --require-hashes -r "$ROOT/requirements-dev.lock"
        quietly "$VENV/bin/python" -m pip check || die "the lock files do not fit together" "tools/lock.py writes them anew"
        environment_digest dev >"$VENV/.dev-digest"
    fi
    exec {setup_lock}<&-
}

need_fuse_device() {
    if [ ! -c /dev/fuse ] && command -v modprobe >/dev/null; then as_root modprobe fuse 2>/dev/null || true; fi
    [ -c /dev/fuse ] || die "/dev/fuse is missing: nothing can be mounted here" \
        "load the kernel's module (modprobe fuse); give a container --device /dev/fuse --cap-add SYS_ADMIN${1:+; $1}"
}

# The file system type of what is mounted at the path $1; nothing if it is no mountpoint. Touches only the table.
mounted_type() {
    local path type=
    while read -r path mounted; do
        if [ "$(printf %b "$path")" = "$1" ]; then type=$mounted; fi
    done < <(sed -E 's/^([^ ]+ ){4}([^ ]+) .* - ([^ ]+) .*$/\2 \3/' /proc/self/mountinfo)
    printf %s "$type"
}

# is_daemon PID: whether it is alive and ours; a pid file may name a process that came later.
is_daemon() {
    [ -n "$1" ] && tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -q 'aspenfs\.cli\.daemon'
}

# wait_for_end PID SECONDS
wait_for_end() {
    local deadline=$((SECONDS + $2))
    while is_daemon "$1"; do
        if [ $SECONDS -ge $deadline ]; then return 1; fi
        sleep 0.1
    done
}

state_directory() {
    "$VENV/bin/python" -c 'import os; from aspenfs.cli.paths import state_directory as find
print(find(os.environ, os.geteuid()).path)'
}
