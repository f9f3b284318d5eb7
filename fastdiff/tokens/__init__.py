"""Ways of working on fewer tokens: one file per method, found by its registered name."""
