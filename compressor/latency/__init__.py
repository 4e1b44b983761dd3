"""Latency tables: measured, corrected, and what they predict."""
