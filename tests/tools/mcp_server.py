"""A small MCP server: `python mcp_server.py` over stdio, with `PORT` over streamable HTTP."""

import asyncio
import os
import sys
from typing import Annotated

from mcp.server import MCPServer
from mcp_types import CallToolResult, ImageContent, TextContent
from pydantic import Field

server = MCPServer("small")


@server.tool()
def add(a: int, b: Annotated[int, Field(description="The second.")]) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("it cannot be done")


@server.tool()
async def slow() -> str:
    """Take for ever."""
    await asyncio.Event().wait()
    return ""


@server.tool()
def picture() -> CallToolResult:
    """Show a picture."""
    dot = ImageContent(data="AAAA", mime_type="image/png")
    return CallToolResult(content=[dot, TextContent(text="A dot.")])


@server.tool()
def header(name: str) -> str:
    """Tell a variable of the environment."""
    return os.environ.get(name, "none")


if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
