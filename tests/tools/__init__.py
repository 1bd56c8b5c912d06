"""Tests of tools that do something."""
