"""The verbs: one file a command, which parses, calls and says."""
