"""Suites that measure ours beside the published PyTorch implementation, in one run, on the same work."""
