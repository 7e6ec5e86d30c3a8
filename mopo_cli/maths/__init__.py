"""Mathematics without models or files."""
