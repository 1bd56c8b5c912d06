"""The one place that prints: what a command says, its progress, and the screen of a chat.

Knows people and terminals; knows nothing of how a model computes.
"""
