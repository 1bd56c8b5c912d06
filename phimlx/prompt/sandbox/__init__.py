"""Renders chat templates: known ones in this process, any other in a worker process with limits.

Knows nothing of messages or tokens: variables go in, text comes out, anything else is PromptError.
"""
