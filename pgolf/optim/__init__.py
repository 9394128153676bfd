from pgolf.optim.muon import Muon

__all__ = ["Muon"]
