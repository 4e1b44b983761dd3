"""What decides the widths."""
