"""Configs: schema, composition, checks."""
