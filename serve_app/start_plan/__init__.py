"""What a start decides once: the checkpoint, the device, the dtype and the memory."""
