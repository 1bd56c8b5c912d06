"""Pictures, sounds and video: bytes in, arrays for the model out.

Knows what the encoders were trained to be given; knows nothing of a model or a prompt.
"""
