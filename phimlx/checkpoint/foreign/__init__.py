"""Weights that other frameworks have quantized, decoded to the numbers that their libraries make.

One module for each framework knows its tensors; `methods` finds them by a config's `quant_method`.
"""
