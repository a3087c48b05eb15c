"""What the deployment's constructor does: loads the model phase by phase. Read `load.py` first."""
