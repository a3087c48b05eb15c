"""A checkpoint becomes a module on a device. Knows no requests."""
