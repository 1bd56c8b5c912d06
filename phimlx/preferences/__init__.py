"""What a user prefers: a file of settings, environment variables and personas, in one order.

A flag comes first, then an environment variable, then the file, then what the catalogue or the
model itself says. Knows names and bounds of settings; knows nothing of models.
"""
