"""The gymnasium environment: one group a step."""
