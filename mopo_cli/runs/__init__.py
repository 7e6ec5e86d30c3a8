"""Run directories: files, records, sessions, trackers."""
