"""Failures with a message of their own: a mistake of the user (exit status 2), and memory that ran out (1)."""


class UserError(Exception):
    """A mistake in the config or the input: what was found, where (key, file and line), what is allowed."""


class AcceleratorMemoryError(RuntimeError):
    """The accelerator's memory did not suffice: where, and which setting would do."""
