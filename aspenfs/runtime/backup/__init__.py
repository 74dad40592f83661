"""A cluster in one file: written while it serves, verified, made into a new cluster."""
