"""Foundations of all other parts: errors, files, processes, the user's code, progress, records, versions."""
