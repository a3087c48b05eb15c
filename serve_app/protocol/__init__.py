"""What clients say and hear: OpenAI, `/prompt`, chat template, text. Knows no HTTP and no RunPod."""
