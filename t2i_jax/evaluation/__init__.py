"""What `python -m t2i_jax.evaluate` is made of: points, drawings kept, scores, plots, a report."""
