"""What a training step will need of a TPU slice, found by compiling it for one; see `plan.py`."""
