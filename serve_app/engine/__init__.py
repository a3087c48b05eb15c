"""Token ids in, token ids out. Knows no text, HTTP, Ray, RunPod or settings."""
