"""Messages to token ids, and a reply's token ids back to text, reasoning and tool calls.

Knows nothing of weights or generation.
"""
