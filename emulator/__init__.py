"""RunPod's platform on loopback: the halves of it that a worker and its clients speak to.

Built from the SDK's source: the real SDK worker, the real `runpod` client and the real `openai`
client run against it unchanged. What no source shows is marked as a guess where it is done.
"""
