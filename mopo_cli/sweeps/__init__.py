"""Runs at many points: the points, the pools that run them, and what they reached."""
