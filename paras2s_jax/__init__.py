"""ParaS2S in JAX: benchmark, judge and RL recipe for speech models that listen to style."""

__version__ = "0.1.0"
