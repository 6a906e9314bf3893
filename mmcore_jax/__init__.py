"""Bridges a vision-language model to a diffusion transformer, and trains the bridge in stages."""

__version__ = "0.1.0"
