from pgolf.optim.dropin import Muon

__all__ = ["Muon"]
