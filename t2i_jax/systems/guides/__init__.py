"""Systems whose log-probabilities steer the sampler of another."""
