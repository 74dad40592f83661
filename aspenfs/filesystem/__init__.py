"""The POSIX file system as a domain: rows in the Store, large bytes in Blobs. No kernel, no trio."""
