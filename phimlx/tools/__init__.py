"""Tools that do something: Python functions and MCP servers, called as a model asks."""

MAX_ROUNDS = 10
"""Replies in a row that may call tools; the next one has to answer."""
