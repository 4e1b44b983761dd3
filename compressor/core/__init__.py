"""Foundations of all other parts: errors, files, child processes, progress, versions."""
