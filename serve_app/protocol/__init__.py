"""What clients say and hear: OpenAI, `/prompt`, chat template, text. No HTTP, no jobs."""
