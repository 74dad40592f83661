"""Content-addressed chunks in local segment files (DESIGN §3 "Bytes", docs/design/blobs.md).

store     BlobStore: put, get, has, delete, sync, and the doors to the two below
collect   gives the space of deleted chunks back, in small steps
check     reads every chunk and compares it with its name, for `aspen check`
segments  the segment files: appending, syncing, sealing, removing
scan      what a segment holds when nothing but the segment itself can tell
index     where each chunk lies, in few bytes of memory
cache     chunks read and verified lately
format    the bytes on disk
"""
