"""What the stages and greater_core.py stand on. Nothing in here imports from above."""
