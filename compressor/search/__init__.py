"""Search agents that choose the width of every group."""
