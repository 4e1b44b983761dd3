"""Limits that the slim network must keep."""
