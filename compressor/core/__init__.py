"""What every other part stands on: errors, files, child processes, progress, versions."""
