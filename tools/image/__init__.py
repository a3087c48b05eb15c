"""Builds the image without a container engine, and runs it as one does."""
