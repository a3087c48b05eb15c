"""The rooms behind the RunPod door: jobs in, answers out. Knows no tokens."""
