"""Every bound of aspenfs, with its unit and its reason. Relations between bounds are asserted below."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# --- keys, values, transactions (the floor that etcd v3 offers) ---
KEY_BYTES_MAX = 1024  # a user key, without its keyspace prefix
VALUE_BYTES_MAX = 1 * MIB  # a value of kv/
STORE_KEY_BYTES_MAX = 4 * KIB  # any key inside the store (history keys escape and add a revision)
TXN_OPS_MAX = 128
TXN_BYTES_MAX = 1 * MIB + 64 * KIB  # encoded; one largest value and its overhead

# --- files ---
NAME_BYTES_MAX = 255  # a directory entry (POSIX NAME_MAX; what statfs reports)
SYMLINK_BYTES_MAX = 4095  # PATH_MAX - 1
FILE_BYTES_MAX = 1 << 46  # 64 TiB; EFBIG beyond
XATTR_VALUE_BYTES_MAX = 64 * KIB  # XATTR_SIZE_MAX of the kernel
XATTR_LIST_BYTES_MAX = 64 * KIB  # XATTR_LIST_MAX
XATTR_BYTES_MAX = 1 * MIB  # all values of an inode: one transaction removes them with it
LINKS_MAX = 65_000  # as ext4
INLINE_WRITE_BYTES_MAX = 16 * KIB  # larger writes go to blobs (measured threshold, DESIGN §3)
INLINE_EXTENT_BYTES_MAX = 64 * KIB  # an extent grown by small appends becomes a blob at this size
CHUNK_BYTES_MAX = 1 * MIB  # one blob; also FUSE's max_write
WRITE_BEHIND_FILE_BYTES_MAX = 8 * MIB  # written to one file, not committed; beyond it its writers wait
WRITE_BEHIND_BYTES_MAX = 64 * MIB  # and to all files of a mount
SESSION_TTL_MS = 15_000  # a host silent for so long loses what it alone kept of unlinked files
SESSION_KEEPALIVE_MS = 5_000  # it says so often that it lives: two may get lost

# --- chunk store ---
BLOB_SEGMENT_BYTES = 64 * MIB  # the unit of collection; more files below it, longer copying above
BLOB_CACHE_BYTES = 32 * MIB  # verified chunks in memory: some 30 sequential readers
BLOB_OPEN_FILES_MAX = 64  # handles of sealed segments kept open

# --- log and state ---
WAL_SEGMENT_BYTES = 64 * MIB
WAL_FRAME_BYTES_MAX = 4 * MIB
RESERVE_BYTES = 64 * MIB  # kept back for deleting on a full disk; half of a blob segment is moved into it
OVERLAY_BYTES_MAX = 64 * MIB  # accepted but not yet applied; beyond it writers wait for the disk
APPLY_BATCH_KEYS_MAX = 16_384  # in one transaction of the state; a larger one only costs memory
MAPPED_BYTES_MAX = 48 * MIB  # of the state's map in memory, code included; beyond it pages are given back
GIVE_BACK_S = 1  # and looked at this often: a page that is read again costs a fault
SYNC_INTERVAL_MS = 250  # accepted work that nobody waits for is fsynced this often
HISTORY_REVISIONS = 10_000  # revisions of user keys kept readable before compaction
WATCH_BUFFER_BATCHES = 1_024  # per watcher; beyond it the watcher gets Lagged
WATCH_BUFFER_BYTES = 16 * MIB  # of keys and values, per watcher, and for the ring of recent batches
COMPACT_REVISIONS_MAX = 1_000  # revisions that one log entry forgets: apply stays short
COMPACT_EFFECTS_MAX = 10_000  # and effects after which it takes no further revision
LEASE_EXPIRE_MAX = 1_000  # leases that one log entry ends; the others are next
TXN_DELETED_KEYS_MAX = 10_000  # keys that the range deletions of one transaction may remove
DEDUP_REVISIONS = 100_000  # log entries for which a client's last result is kept
DEDUP_RESULT_BYTES_MAX = 64 * KIB  # what is kept of it; a larger one is refused
LEASE_TTL_MS_MAX = 10 * 365 * 86_400_000  # ten years; with the time it fits 63 bits of ns
ATTRIBUTES_MAX = 64  # per record
ATTRIBUTE_BYTES_MAX = 4 * KIB  # one value
INODE_BLOCK = 4_096  # inode ids a host reserves at a time

# --- consensus ---
TICK_MS = 50  # the core's unit of time
NOTICE_MS = 12  # after which members have entries, and hear of commits, that nobody there waits for
HEARTBEAT_TICKS = 2  # a leader's sign of life
ELECTION_TICKS = 14  # silence after which a follower stands for election: 7 heartbeats; twice that at most
CLOCK_DRIFT_PPM_MAX = 1_000  # between two voters' clocks, as a lease supposes: NTP slews one by 500 at most
CLOCK_DOUBT_PPM = CLOCK_DRIFT_PPM_MAX // 2  # between the own clock and a voter's; beyond it no leases here
CLOCK_SAMPLE_S = 5  # between two looks at a voter's clock
CLOCK_READINGS = 3  # of it at each look; the one with the shortest round trip counts
CLOCK_SAMPLES_MAX = 12  # kept of the last minute; of each minute before the best one:
CLOCK_MINUTES_MAX = 10  # so that long round trips do not hide for ever what a clock gains
CLOCK_CLEAN_S = 60  # so long a clock must have run well before leases rest upon it again
CLOCK_LEAP_MS = 1  # boot time ahead of running time by so much at once: the machine slept
PROPOSAL_TIMEOUT_MS = 10_000  # a proposal or read that has no majority by then fails with NoQuorum
PROPOSALS_BYTES_MAX = 64 * MIB  # proposed here and not yet resolved; beyond it writers wait
RAFT_APPEND_BYTES_MAX = 1 * MIB  # entries in one append message, or one entry that is larger
RAFT_APPEND_ENTRIES_MAX = 32_768  # and entries; what one message may make a receiver allocate
RAFT_INFLIGHT_MESSAGES_MAX = 256  # appends on their way to one follower
RAFT_INFLIGHT_BYTES_MAX = 16 * MIB  # and their bytes
RAFT_UNCOMMITTED_BYTES_MAX = 64 * MIB  # in a leader's log behind its commit index; beyond it proposals wait
RAFT_UNAPPLIED_BYTES_MAX = 64 * MIB  # committed and not yet applied on a node; beyond it appends are dropped
RAFT_APPLY_BYTES_MAX = 4 * MIB  # handed out for applying in one turn
RAFT_READS_MAX = 4_096  # read requests that a leader keeps waiting; more are dropped, to be asked again
RAFT_CONTEXT_BYTES_MAX = 1 * KIB  # of a message or a change of the configuration
RAFT_LOG_BYTES_MAX = 32 * MIB  # entries in memory for followers that lag; who lags more gets a snapshot
LEARNER_LAG_MAX = 1_000  # entries behind the leader with which a learner may become a voter
PEER_REQUEST_BYTES_MAX = 4 * MIB  # one request or answer between nodes
BLOB_PIN_S = 120  # a chunk pushed or asked for is spared by collection so long, whatever names it
BLOB_PINS_MAX = 512 * KIB  # such chunks on one node, some 110 bytes each; more are refused for a while
BLOB_PUSH_BYTES_MAX = 64 * MIB  # of chunks held in memory until a majority has them; others are read again
BLOB_PUSH_REQUESTS_MAX = 4  # to one peer at once: the link works while the peer's disk does
BLOB_PUSH_QUEUE_MAX = 4_096  # chunks that one peer lags behind; what a majority has is then left to repair
BLOB_ASK_MAX = 1_024  # digests in one request; looking for them takes some 3 ms
BLOB_FACTS_MAX = 4_096  # chunks of which this node remembers who has them
BLOB_FETCH_AHEAD_BYTES = 16 * MIB  # of a file, fetched behind a chunk that a reader waits for
BLOB_FETCH_AHEAD_MAX = 256  # and chunks
BLOB_FETCH_REQUESTS_MAX = 4  # for chunks that nobody waits for yet, at once
BLOB_MISSING_MAX = 64 * KIB  # known to be missing here, some 200 bytes each; a walk finds the others later
SNAPSHOT_AGE_MAX_S = 600  # a snapshot being sent pins pages of the state so long at most
SNAPSHOT_IDLE_S_MAX = 60  # and is dropped when nobody has read from it for so long
SNAPSHOTS_MAX = 2  # being sent at a time; who asks for more waits
SNAPSHOT_BLOCK_BYTES = 1 * MIB  # of rows in one answer, or one row that is larger
SNAPSHOT_GROWTH_BYTES_MAX = 8 * GIB  # the state's file, which never shrinks, may grow on its account
SNAPSHOT_FREE_BYTES_MIN = 256 * MIB  # with less left on the disk it is dropped
DIGEST_PERIOD_S = 300  # between two comparisons of the states of members; longer where it costs more than:
DIGEST_MEAN_PERCENT = 1  # of one core, on the average, for walking over the state
DIGEST_PERCENT = 10  # of one core while it does
DIGEST_HURRY_PERCENT = 50  # when somebody waits, or when pinned pages have made the state's file grow by
DIGEST_HURRY_BYTES = 64 * MIB
DIGEST_GROWTH_BYTES_MAX = 1 * GIB  # a walk on whose account it has grown by so much is given up
DIGEST_AGE_MAX_S = 3_600  # and one that takes longer: some 700 M rows
DIGEST_AGAIN_S = 10  # to the next comparison, when states differed or a member did not tell
BACKUP_FRAME_BYTES_MAX = 3 * MIB  # one frame: a block of rows or a chunk; what a reader holds in memory
BACKUP_DIGESTS_BYTES = 16 * MIB  # names of chunks in memory; the others are in a file meanwhile

# --- between nodes ---
PEER_PORT = 7420
PEER_FRAME_BYTES_MAX = PEER_REQUEST_BYTES_MAX + 64 * KIB  # what may be sent in one piece
PEER_GREETING_BYTES_MAX = 16 * KIB  # of a frame from who has not said yet who it is
PEER_ITEMS_MAX = 128 * KIB  # of one array or map in a frame; what a decoder may allocate at once
PEER_BATCH_BYTES = 1 * MIB  # of what waits, sent in one go; what comes after it waits no longer than that
PEER_QUEUE_BYTES_MAX = 32 * MIB  # Raft messages waiting for one peer; beyond it they are dropped
PEER_REQUESTS_MAX = 64  # under way on one link; more wait their turn
PEER_REQUESTS_BYTES_MAX = 16 * MIB  # and their bytes
PEER_SMALL_REQUEST_BYTES = 64 * KIB  # a larger one goes over the bulk link, whatever its kind
PEER_STRANGERS_MAX = 64  # connections that have not said yet who they are; the oldest makes room
PEER_HANDSHAKE_S = 5  # until then a connection has said who it is, or is closed
PEER_CONNECT_S = 2  # for one address
PEER_PING_MS = 1_000  # a link says something at least this often
PEER_IDLE_MS = 4_000  # a link that heard nothing for so long is dead
PEER_BACKOFF_MS_MIN, PEER_BACKOFF_MS_MAX = 50, 1_000  # between attempts to connect, half of it random
PEER_LINK_BYTES_MAX = 128 * GIB  # then a new connection: one AES-GCM key is good for 388 GB (RFC 8446 §5.5)
PEER_LINK_S_MAX = 86_400  # and after this time: certificates are looked at again
PEER_ADDRESSES_MAX = 8  # of one node
PEER_FORMER_LIVES_MAX = 32  # whose marks a node tells: nobody can say whose an older start was
PEER_ADDRESS_BYTES_MAX = 270  # a DNS name of 253 bytes, its port, brackets
NODE_NAME_BYTES_MAX = 64  # as host names of Linux
MEMBERS_MAX = 64  # that are not removed; each mount is one
TICKET_TTL_S_MAX = 30 * 86_400
TICKET_KEPT_S = 7 * 86_400  # an expired ticket is known as such so long
TICKETS_MAX = 1_000  # open at the same time
JOIN_FAILURES_MAX = 10  # wrong secrets from one address in a row; then one every JOIN_FAILURE_S
JOIN_FAILURE_S = 6
JOINS_MAX = 8  # under way at one node; each holds a connection until the leader has answered
CERTIFICATE_S = 365 * 86_400  # of a node; renewed when two thirds are over
CA_CERTIFICATE_S = 20 * 365 * 86_400
CERTIFICATE_SKEW_S = 3_600  # a certificate begins so long before it was made: clocks differ
CA_CHECK_S = 10  # between two looks at certificates; a change in the store is seen at once

# --- what is shown of the cluster ---
EVENTS_MAX = 200  # in cluster/events, some 100 bytes each; the log has all

# --- control socket ---
CONTROL_FRAME_BYTES_MAX = 4 * MIB  # one message: a transaction or one page of a listing
CONTROL_ITEMS_MAX = 4_096  # of one array or map in a message; what a decoder may allocate at once
CONTROL_CONNECTIONS_MAX = 128  # more are told so and closed
CONTROL_REQUESTS_MAX = 64  # under way on one connection, watches among them; more get Overloaded
CONTROL_HELLO_SECONDS_MAX = 10  # a peer that has not said what it is by then is closed
CONTROL_PAGE_KEYS = 512  # records in one page; the loop serves others between pages
CONTROL_PAGE_BYTES = 256 * KIB  # a page is closed once it holds this much
CONTROL_DELETE_KEYS = 256  # keys that one step of a deletion by prefix removes; some ms of the loop

# --- the metrics address ---
METRICS_CONNECTIONS_MAX = 8  # scrapers at once; more wait
METRICS_IDLE_S_MAX = 30  # a connection without a request is closed then

# --- the kernel's side ---
REQUESTS_IN_FLIGHT_MAX = 256  # handlers at work at once; further requests wait in the kernel
ABSENT_NAMES_MAX = 65_536  # told to be absent within a second or two; beyond it any may be
NOTIFY_PENDING_MAX = 65_536  # invalidations not yet told; beyond it every known inode is told instead
LISTING_NAMES_MAX = 262_144  # kept in order for readers of directories, some 80 bytes each
LISTING_STRETCH_NAMES_MAX = 131_072  # kept of one directory by one pass; larger ones take several, each time
LISTING_STEP_NAMES = 1_024  # of such a pass before others get their turn: some 3 ms

assert VALUE_BYTES_MAX < TXN_BYTES_MAX < WAL_FRAME_BYTES_MAX < WAL_SEGMENT_BYTES
assert KEY_BYTES_MAX * 2 + 32 < STORE_KEY_BYTES_MAX
assert INLINE_WRITE_BYTES_MAX <= INLINE_EXTENT_BYTES_MAX <= CHUNK_BYTES_MAX < TXN_BYTES_MAX
assert CONTROL_PAGE_BYTES + 2 * VALUE_BYTES_MAX < CONTROL_FRAME_BYTES_MAX  # a page may end in a largest value
assert TXN_BYTES_MAX * 2 < CONTROL_FRAME_BYTES_MAX
assert max(CONTROL_PAGE_KEYS, TXN_OPS_MAX) <= CONTROL_ITEMS_MAX
assert CHUNK_BYTES_MAX < BLOB_SEGMENT_BYTES < 1 << 32
assert CHUNK_BYTES_MAX < WRITE_BEHIND_FILE_BYTES_MAX < WRITE_BEHIND_BYTES_MAX
assert 2 * SESSION_KEEPALIVE_MS < SESSION_TTL_MS
assert CHUNK_BYTES_MAX + 64 * KIB < PEER_REQUEST_BYTES_MAX
assert BLOB_ASK_MAX * 64 <= 64 * KIB  # so much of a request is room for digests
assert PEER_REQUEST_BYTES_MAX * BLOB_PUSH_REQUESTS_MAX <= BLOB_PUSH_BYTES_MAX
assert SNAPSHOT_BLOCK_BYTES + 2 * VALUE_BYTES_MAX < PEER_REQUEST_BYTES_MAX  # a largest row fits
assert max(SNAPSHOT_BLOCK_BYTES + 2 * VALUE_BYTES_MAX, CHUNK_BYTES_MAX) <= BACKUP_FRAME_BYTES_MAX
assert BACKUP_FRAME_BYTES_MAX + 4 * KIB < CONTROL_FRAME_BYTES_MAX
assert SNAPSHOT_FREE_BYTES_MIN > 2 * RESERVE_BYTES  # before the state finds no room
assert DIGEST_MEAN_PERCENT < DIGEST_PERCENT < DIGEST_HURRY_PERCENT < 100
assert DIGEST_AGAIN_S <= DIGEST_PERIOD_S
assert DIGEST_HURRY_BYTES < DIGEST_GROWTH_BYTES_MAX < SNAPSHOT_GROWTH_BYTES_MAX
assert PROPOSAL_TIMEOUT_MS < 1000 * BLOB_PIN_S / 4  # what a proposal names is there when it is applied
assert HEARTBEAT_TICKS * 4 < ELECTION_TICKS
assert CLOCK_CLEAN_S <= CLOCK_SAMPLE_S * CLOCK_SAMPLES_MAX  # a clean interval is among what is kept
assert TXN_BYTES_MAX + 16 < WAL_FRAME_BYTES_MAX < RAFT_INFLIGHT_BYTES_MAX
assert WAL_FRAME_BYTES_MAX < PEER_FRAME_BYTES_MAX < PEER_REQUESTS_BYTES_MAX < PEER_QUEUE_BYTES_MAX
assert RAFT_INFLIGHT_BYTES_MAX < PEER_QUEUE_BYTES_MAX  # flow control acts first
assert RAFT_APPEND_ENTRIES_MAX < PEER_ITEMS_MAX
assert 3 * PEER_PING_MS < PEER_IDLE_MS
assert LISTING_STEP_NAMES <= LISTING_STRETCH_NAMES_MAX <= LISTING_NAMES_MAX // 2  # two side by side
