"""Triton kernels, one file per operator, with the code that launches them. Nothing here is imported before it is
needed.
"""
