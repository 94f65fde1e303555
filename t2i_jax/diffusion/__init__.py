"""The mathematics of diffusion, without networks.

A process says how pictures are corrupted; a parameterization what the network
predicts; a weighting which errors count; a time density which times are
trained; a grid where a sampler stops; a solver how it gets from one point to
the next; guidance how a condition is obeyed. Each is an object of its own, and
any goes with any other, but for what `combination` refuses.
"""
