"""Conversations that are kept: one database of this user's, read and written by several processes.

Knows messages and their order; knows nothing of models, and shows nothing. Of pictures, sounds and
videos it keeps where they were and their digest, never the bytes: what somebody deletes is gone
from here too.
"""
