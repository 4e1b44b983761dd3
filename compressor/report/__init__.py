"""The page that says what was done and why."""
