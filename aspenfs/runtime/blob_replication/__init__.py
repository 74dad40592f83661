"""The chunks of a cluster on several nodes, beside its log (docs/design/blobs.md, "Several nodes").

replicator  BlobReplicator: what the file system, the store and the daemon call; it introduces the others
push        from the node that was given a chunk to the others, until a majority has it on disk
fetch       from the others, for a reader that waits, and ahead of it
receive     the answers to what other nodes ask
repair      finds out what is named and not here, and fetches it
garbage     finds out what is here and not named
pins        what other nodes were promised to find here, for a while
durable     one sync for all who wait
wire        what nodes ask each other
"""
