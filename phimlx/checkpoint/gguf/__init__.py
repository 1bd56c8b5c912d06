"""GGUF, llama.cpp's file format: headers, packed blocks, and the names and settings of models.

A file is somebody else's: its header is checked whole before a number of it is used.
"""
