"""Raft: how nodes agree on one log. Pure: no clock, socket, file or randomness of its own."""
