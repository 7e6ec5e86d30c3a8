"""Methods whose policy is told the user's wish in its prompt."""
