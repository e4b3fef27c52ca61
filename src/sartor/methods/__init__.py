"""Which parameters train: all of them, or those that PEFT adds."""

from sartor.methods.apply import MethodTraits, apply, trained_parameters, traits

__all__ = ["MethodTraits", "apply", "trained_parameters", "traits"]
