"""Tools that do something: Python functions and MCP servers, called as a model asks."""
