"""State in one piece: for a node that is too far behind the log, for backups, for comparing nodes."""
