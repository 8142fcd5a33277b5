"""Rows of committed levels in any order: memory maps, reads by position, decoded chunks."""
